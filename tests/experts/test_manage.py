"""Joining and pruning stores."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from tests.experts.test_extract import CARD, COUNT, HOST, OPTIONS, Toys, _content
from tove_jax.cli import features as command
from tove_jax.cli.main import main
from tove_jax.config.schema import Config, DataConfig, FeaturesConfig
from tove_jax.errors import InputError
from tove_jax.experts import manage
from tove_jax.experts.extract import extract
from tove_jax.experts.manage import merge, prune, unwanted
from tove_jax.experts.manifest import Manifest
from tove_jax.experts.media import SUFFIXES
from tove_jax.experts.statistics import fit_phi_s
from tove_jax.experts.store import FeatureStore, verify_store


def _extract(folder, indices=range(COUNT), expert=HOST, **options):
    return extract(expert, Toys(), indices, folder, **{**OPTIONS, **options})


def _same(found, wanted):
    found, wanted = FeatureStore.open(found), FeatureStore.open(wanted)
    for id in found.ids:
        for name, value in found.read(id).items():
            assert value.tobytes() == wanted.read(id)[name].tobytes(), id


@pytest.fixture(scope="module", params=SUFFIXES)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "toy"
    _extract(folder, medium=request.param, codec="pca:6+int8")
    return folder


def test_shares_of_several_hosts(whole, tmp_path):
    """The second host begins with the first one's manifest and axes; a third comes later for what is missing."""
    manifest = Manifest.read(whole)
    options = {"medium": manifest.medium, "codec": manifest.codec}
    parts = [tmp_path / str(host) for host in range(3)]
    _extract(parts[0], share=(0, 3), **options)
    for part in parts[1:]:
        part.mkdir()
        for file in ("manifest.json", "basis.safetensors"):
            shutil.copy(parts[0] / file, part / file)
    _extract(parts[1], share=(1, 3), **options)
    joined = merge(parts[:2], tmp_path / "some")
    assert not joined.complete
    _extract(parts[2], share=(0, 2), **options)
    _extract(tmp_path / "some", **options)
    assert _content(tmp_path / "some") == _content(whole)
    merge([*parts[:2], tmp_path / "some"], tmp_path / "all")
    assert _content(tmp_path / "all") == _content(whole)


def test_stores_of_different_pictures(tmp_path):
    _extract(tmp_path / "a", range(15))
    _extract(tmp_path / "b", range(10, COUNT))
    _extract(tmp_path / "whole")
    manifest = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert manifest.complete and verify_store(tmp_path / "c") == (COUNT, [])
    assert FeatureStore.open(tmp_path / "c").ids == Toys().ids
    _same(tmp_path / "c", tmp_path / "whole")
    wanted = Manifest.read(tmp_path / "whole").statistics
    np.testing.assert_allclose(manifest.statistics.std, wanted.std, rtol=1e-4)
    source = Toys()
    assert extract(HOST, source, range(COUNT), tmp_path / "c", **OPTIONS) == manifest and not source.reads
    (tmp_path / "c" / manifest.shards[-2].file).unlink()
    extract(HOST, source, range(COUNT), tmp_path / "c", **OPTIONS)
    assert source.reads == manifest.shards[-2].records
    _same(tmp_path / "c", tmp_path / "whole")


def _other(**card):
    return dataclasses.replace(HOST, card=dataclasses.replace(CARD, **card))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": dataclasses.replace(HOST, weights_hash="g" * 64)}, "weights"),
        ({"expert": _other(name="sam")}, "expert 'toy', not 'sam'|expert 'sam', not 'toy'"),
        ({"codec": "int8"}, "codec int8"),
        ({"medium": "arrayrecord"}, "medium is 'arrayrecord', but 'mmap'"),
        ({"view": CARD.view.flipped()}, "view is"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_refuses_to_join_what_differs(tmp_path, options, message):
    _extract(tmp_path / "a", range(6))
    _extract(tmp_path / "b", range(6, 12), **options)
    with pytest.raises(InputError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_refuses_other_axes_a_record_that_differs_and_a_folder_that_is_there(tmp_path):
    for name, indices in (("a", range(20)), ("b", range(20, 40))):
        _extract(tmp_path / name, indices, codec="pca:4+int8")
    with pytest.raises(InputError, match="principal axes"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    twice = dataclasses.replace(HOST, apply=lambda params, pixels: HOST.apply(params, 255 - pixels))
    _extract(tmp_path / "d", range(6))
    _extract(tmp_path / "e", range(5, 9), expert=twice)
    with pytest.raises(InputError, match="record 'toy 5' differs from the one in"):
        merge([tmp_path / "d", tmp_path / "e"], tmp_path / "c")
    with pytest.raises(InputError, match="it exists"):
        merge([tmp_path / "d", tmp_path / "e"], tmp_path / "a")
    with pytest.raises(InputError, match="two stores"):
        merge([tmp_path / "d"], tmp_path / "c")


def test_copies_where_there_are_no_links(whole, tmp_path, monkeypatch):
    def refuse(*unused):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(manage.os, "link", refuse)
    merge([whole, whole], tmp_path / "c")
    assert _content(tmp_path / "c") == _content(whole)


def test_prune(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "toy")
    fit_phi_s(folder)
    kept = [id for number, id in enumerate(Toys().ids) if number < 12 or number % 5 == 0]
    manifest, dropped = prune(folder, set(kept).__contains__)
    assert dropped == COUNT - len(kept) and verify_store(folder) == (len(kept), [])
    assert FeatureStore.open(folder).ids == tuple(kept)
    assert manifest.phi_s is None and manifest.basis_hash == Manifest.read(whole).basis_hash
    _same(folder, whole)
    source = Toys()
    indices = [source.ids.index(id) for id in kept]
    options = {"codec": manifest.codec, "medium": manifest.medium}
    assert extract(HOST, source, indices, folder, **OPTIONS, **options) == manifest and not source.reads
    before = _content(folder)
    assert prune(folder, lambda id: True) == (manifest, 0)
    with pytest.raises(InputError, match="none of its"):
        prune(folder, lambda id: False)
    assert _content(folder) == before


def test_prune_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manage, "make_source", lambda config: Toys())
    config = Config(data=DataConfig(held_out=0.3, limit=20, flip=True), features=FeaturesConfig(experts=("toy:8",)))
    folder = tmp_path / "features"
    _extract(folder / "toy")
    _extract(folder / "toy@flip", view=CARD.view.flipped())
    _extract(folder / "sam", expert=_other(name="sam"))
    found = unwanted(config, tmp_path)
    assert found[folder / "sam"] is None
    assert len(found[folder / "toy"]) == COUNT - 20 < len(found[folder / "toy@flip"])
    for delete in (False, True):
        args = command.argparse.Namespace(action="prune", config=config, workdir=tmp_path, delete=delete)
        assert command.run(args) == 0
        assert f"{folder / 'toy'}: {COUNT - 20} records of other pictures" in capsys.readouterr().out
        assert (folder / "sam").exists() is not delete
        assert len(FeatureStore.open(folder / "toy")) == (20 if delete else COUNT)
    assert unwanted(config, tmp_path) == {}


def test_the_commands_errors(tmp_path, capsys):
    _extract(tmp_path / "a", range(6))
    for words, message in (
        (["merge", str(tmp_path / "a"), str(tmp_path / "a")], "--into"),
        (["prune"], "expected --config, --workdir"),
        (["verify"], "expected the path"),
    ):
        assert main(["features", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["features", "merge", str(tmp_path / "a"), str(tmp_path / "a"), "--into", str(tmp_path / "b")]) == 0
    assert "6 records of toys" in capsys.readouterr().out
