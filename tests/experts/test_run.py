"""The views of one run's experts: as published, or cut as the student cuts."""

import dataclasses

import numpy as np
import pytest

from tove_jax.config.schema import Config, FeaturesConfig, StudentConfig, ViewConfig
from tove_jax.data.picture import Picture
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import registry
from tove_jax.experts.base import Expert, ExpertCard, ExpertFeatures
from tove_jax.experts.run import as_viewed, expert_cards, extract_all, open_stores

SAM = View(size=32, fit="letterbox", interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
CARD = ExpertCard("letterboxed", "Letterboxed", "", "", "none", SAM, (4, 4), 3, backend="host")


def run(views, fit="crop"):
    student = StudentConfig(view=ViewConfig(fit=fit))
    return Config(student=student, features=FeaturesConfig(experts=("letterboxed",), views=views, codec="float32"))


def test_only_the_cut_changes():
    assert as_viewed(run("published", "pad"), CARD) is CARD
    for fit in ("crop", "pad"):
        card = as_viewed(run("student", fit), CARD)
        assert card == dataclasses.replace(CARD, view=dataclasses.replace(SAM, fit=fit))
    # A border that the published view cuts away is shown, as the student sees it.
    bordered = dataclasses.replace(CARD, view=View(size=32, resize=40))
    assert as_viewed(run("student"), bordered).view == View(size=32)


class Source:
    """One wide picture: left third red, middle green, right blue."""

    name, licence, ids = "wide", "none", ("0",)
    labels = captions = (None,)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        image = np.zeros((32, 96, 3), np.uint8)
        for third in range(3):
            image[:, 32 * third : 32 * third + 32, third] = 255
        return Picture("0", image)


@pytest.fixture
def registered(monkeypatch):
    def load(*, weights=None):
        def apply(params, pixels):
            return ExpertFeatures(np.asarray(pixels, np.float32).reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)))

        return Expert(CARD, {}, "0" * 64, apply)

    monkeypatch.setitem(registry._ENTRIES, CARD.name, registry.Entry(CARD, load, lambda *, weights=None: CARD))


def test_features_are_extracted_and_opened_through_the_runs_view(registered, tmp_path):
    for views, greens in (("published", False), ("student", True)):
        config = run(views)
        assert expert_cards(config, tmp_path)["letterboxed"].view.fit == ("crop" if greens else "letterbox")
        workdir = tmp_path / views
        extract_all(config, workdir, source=Source(), progress=False)
        patches = open_stores(config, workdir)["letterboxed"].read("0")["patches"]
        # The centre cut shows the green third alone; the letterbox shows all three, and padding below.
        assert (patches[..., 1] > 250).all() == greens
    with pytest.raises(InputError, match="fit"):
        open_stores(run("student"), tmp_path / "published")
