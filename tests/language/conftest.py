from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def goldens():
    return Path(__file__).parents[1] / "goldens"
