"""A model that answers as a function says, and tasks of painted pictures, for tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourAnswerer:
    """Names the colour of a picture's corner; likes choices that hold it."""

    def __init__(self, stop_after=None):
        self.calls = 0
        self.sizes = []
        self.prompts = []
        self._stop_after = stop_after

    def _name(self, pictures):
        if not pictures:
            return "nothing"
        corner = tuple(int(value) for value in pictures[0][0, 0])
        return next(name for name, value in COLOURS.items() if value == corner)

    def _count(self, prompts):
        if self._stop_after is not None and self.calls >= self._stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.sizes.append(len(prompts))
        self.prompts += prompts

    def answer(self, pictures, prompts, decoding):
        self._count(prompts)
        return [
            ("yes" if self._name(shown) in prompt else "no") if "Is" in prompt else self._name(shown)
            for shown, prompt in zip(pictures, prompts, strict=True)
        ]

    def rank(self, pictures, prompts, choices, mean=False):
        self._count(prompts)
        found = []
        for shown, told in zip(pictures, choices, strict=True):
            name = self._name(shown)
            found.append(np.array([-1.0 if name in text else -len(text) - 2.0 for text in told], np.float32))
        return found


def paint(folder: Path, count: int = 6) -> list[str]:
    """Paints pictures 0.png, 1.png and so on in turn red, green and blue; returns their colours."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [list(COLOURS)[number % 3] for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (3, 2), COLOURS[name]).save(folder / f"{number}.png")
    return names


def write_pope(folder: Path, count: int = 6, kind: str = "random") -> Path:
    """Writes POPE questions about painted pictures: of each two, whose right answers are yes and no."""
    lines = []
    for number, name in enumerate(paint(folder, count)):
        for asked in (name, "purple"):
            label = "yes" if asked == name else "no"
            record = {"question_id": len(lines) + 1, "image": f"{number}.png", "text": f"Is it {asked}?"}
            lines.append(json.dumps({**record, "label": label}))
    path = folder / f"coco_pope_{kind}.json"
    path.write_text("\n".join(lines))
    return path
