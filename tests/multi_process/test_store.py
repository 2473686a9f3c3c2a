"""Processes whose run lies in an object store, which is all that they share: S3, as moto serves it."""

import fsspec
import numpy as np
import pytest

from tests.multi_process.conftest import losses
from tests.multi_process.test_train import TOLERANCE
from tove_jax.files.bucket import Bucket

URL = "s3://bucket/run"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("s3://bucket")
    yield Bucket(URL)
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def assert_same(bucket, single, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(bucket.read("metrics.jsonl"))
    found, wanted = losses(tmp_path), losses(single)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), **TOLERANCE)


def test_two_then_one(launch, bucket, single, tmp_path):
    """Each of the two sends what it holds; one that goes on alone reads all of it."""
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    status, _, err = launch(2, "train", URL, "--quiet", *mesh, restarts=2).wait()
    assert status == 0, err
    assert_same(bucket, single, tmp_path)
    parts = [name for name in bucket.sizes("checkpoints/6") if name.endswith(".part")]
    assert {name.split("-")[1] for name in parts} == {"00000", "00001"}

    bucket.remove(["checkpoints/6.json"])  # as if killed before it was whole
    status, _, err = launch(1, "train", URL, "--quiet").wait()
    assert status == 0 and "resumed at step 4" in err, err
    assert_same(bucket, single, tmp_path)
