"""The photographs inside scikit-image's wheel, for reports; those whose terms scikit-image states."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from tove_jax.data.decode import read_picture
from tove_jax.data.picture import Picture
from tove_jax.errors import InputError


class _Photograph(NamedTuple):
    file: str
    label: str
    caption: str
    licence: str


_PHOTOGRAPHS = (
    _Photograph("astronaut.png", "people", "an astronaut in an orange suit", "public domain (NASA)"),
    _Photograph("camera.png", "people", "a man with a camera on a tripod", "CC0 (Lav Varshney)"),
    _Photograph("chelsea.png", "animals", "a tabby cat", "CC0 (Stefan van der Walt)"),
    _Photograph("coffee.png", "objects", "a cup of espresso on a wooden table", "CC0 (Rachel Michetti)"),
    _Photograph("coins.png", "objects", "rows of ancient coins", "no known restrictions (Brooklyn Museum)"),
    _Photograph("clock_motion.png", "objects", "a blurred wall clock", "public domain (Stefan van der Walt)"),
    _Photograph("rocket.jpg", "vehicles", "a rocket on its launch pad at night", "public domain (SpaceX)"),
    _Photograph("hubble_deep_field.jpg", "space", "galaxies in the deep field", "public domain (NASA)"),
    _Photograph("retina.jpg", "medicine", "the retina of an eye", "CC0 (Mikael Häggström)"),
    _Photograph("ihc.png", "medicine", "stained colonic glands", "no known restrictions (CMMI)"),
    _Photograph("text.png", "text", "handwritten formulas on paper", "public domain"),
    _Photograph("brick.png", "textures", "a brick wall", "CC0 (CC0Textures)"),
    _Photograph("grass.png", "textures", "grass", "CC0"),
    _Photograph("gravel.png", "textures", "gravel", "CC0 (CC0Textures)"),
)


class PhotographSource:
    """Photographs that come inside scikit-image's wheel; nothing is downloaded, skimage not imported.

    Attributes:
      licences: terms of each picture, as scikit-image states them.

    Raises:
      InputError: scikit-image is not installed, or its wheel holds none of them.
    """

    name = "photographs"
    licence = "CC0 or public domain, a picture at a time (scikit-image's data)"

    def __init__(self) -> None:
        found = importlib.util.find_spec("skimage")
        if found is None or not found.submodule_search_locations:
            raise InputError("data.source photographs needs scikit-image: pip install scikit-image")
        folder = Path(found.submodule_search_locations[0]) / "data"
        there = [photograph for photograph in _PHOTOGRAPHS if (folder / photograph.file).is_file()]
        if not there:
            raise InputError(f"{folder}: expected scikit-image's photographs, found none")
        self._paths = [folder / photograph.file for photograph in there]
        self.ids = [path.stem for path in self._paths]
        self.labels = [photograph.label for photograph in there]
        self.captions = [photograph.caption for photograph in there]
        self.licences = [photograph.licence for photograph in there]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Picture:
        """Reads and decodes one photograph."""
        return Picture(
            id=self.ids[index],
            image=read_picture(self._paths[index]),
            caption=self.captions[index],
            label=self.labels[index],
        )
