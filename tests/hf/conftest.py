"""Small students and where transformers may keep code: nowhere near the user's own caches."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tove_jax.config.schema import AdapterConfig, StudentConfig
from tove_jax.hf import clip, rules

# Read by huggingface_hub and transformers when first imported, which is inside tests only.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="tove_jax_modules_")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="session")
def make_student():
    """A student of the goldens' shape; adapter fields may be given."""

    def make(kind="mole", **adapter) -> StudentConfig:
        fields = {"experts": 3, "rank": 4, "alpha": 1.0, **adapter}
        return StudentConfig(
            image_size=28,
            patch_size=7,
            width=32,
            layers=3,
            heads=4,
            mlp_width=64,
            adapter=AdapterConfig(kind=kind, **fields),
        )

    return make


@pytest.fixture(scope="session")
def make_params():
    """Random parameters of a student."""

    def make(student: StudentConfig, seed=0):
        rng = np.random.default_rng(seed)
        shapes = clip.shapes(student)
        return rules.unflatten({path: rng.normal(0, 0.2, s).astype(np.float32) for path, s in shapes.items()})

    return make


@pytest.fixture(scope="session")
def golden():
    """One of the authors' towers: released arrays, settings and results."""

    def load(name: str):
        with np.load(GOLDENS / f"mole_tower_{name}.npz") as file:
            content = dict(file)
        arrays = {key.removeprefix("weights/"): a for key, a in content.items() if key.startswith("weights/")}
        return arrays, json.loads(str(content["config_json"])), content

    return load


def same(a, b) -> None:
    """Asserts two trees are equal to the bit."""
    a, b = rules.flatten(a), rules.flatten(b)
    assert sorted(a) == sorted(b)
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert a[path].tobytes() == b[path].tobytes() and a[path].shape == b[path].shape, path


@pytest.fixture(scope="session")
def assert_same():
    """Two trees are equal to the bit."""
    return same
