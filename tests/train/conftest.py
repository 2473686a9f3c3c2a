"""One small run's folder: pictures, two real experts' features and a start, made once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tove_jax.config import from_file

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "--config.data.source=folder",
    "--config.data.limit=0",
    "--config.student.image_size=32",
    "--config.student.adapter.rank=2",
    "--config.features.experts=('clip', 'pp_ocr_det:32')",
    "--config.features.standardize=none",
    "--config.train.steps=6",
    "--config.train.checkpoint_every=2",
    "--config.student.adapter.dropout=0.05",
]


def overrides(folder, *more, method="move_kd"):
    return [
        *OVERRIDES,
        # The demo's weights of the teachers are for its own experts.
        *(["--config.method.teacher_prior=()"] if method == "move_kd" else []),
        f"--config.data.path={folder / 'pictures'}",
        f"--config.features.path={folder / 'features'}",
        *more,
    ]


def make_pictures(folder, count=24):
    """Puts pictures of three labels into ``pictures``."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "pictures" / f"label{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with ``pictures``, ``features`` and ``start``."""
    from tove_jax.experts.run import extract_all

    folder = tmp_path_factory.mktemp("prepared")
    make_pictures(folder)
    config = from_file(str(ROOT / "configs/demo.py:smoke"), overrides(folder))
    extract_all(config, folder, progress=False)
    return folder


@pytest.fixture
def run_folder(prepared, tmp_path):
    """A fresh run's folder that shares pictures and features."""
    shutil.copytree(prepared / "start", tmp_path / "run" / "start")
    return tmp_path / "run"


@pytest.fixture
def configure(prepared):
    """Returns ``configure(*overrides) -> Config`` of the small run."""
    return lambda *more: from_file(str(ROOT / "configs/demo.py:smoke"), overrides(prepared, *more))
