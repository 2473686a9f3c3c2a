"""Pictures and texts: sources, decoding, views, the split and the loader."""

from __future__ import annotations

import dataclasses

from tove_jax.config.schema import DataConfig
from tove_jax.data.cache import cache_folder
from tove_jax.data.picture import PictureSource
from tove_jax.errors import InputError
from tove_jax.files import remote

_WITHOUT_PATH = ("openmoji", "openmoji_questions", "photographs")
_QUESTIONS = ("vqav2", "gqa", "textvqa", "vizwiz", "pope", "vsr", "scienceqa")
_WITH_PATH = ("folder", "webdataset", "llava", "coco", *_QUESTIONS)


def make_source(config: DataConfig) -> PictureSource:
    """Opens the source that a config names.

    Args:
      config: ``config.data``; `source`, `path`, `images`, `annotations`, `image_size` and `cache` are read.

    Returns:
      The whole source: the split and `limit` are `tove_jax.data.split.split`'s. Sources of conversations have
      ``dialogues`` too; `tove_jax.data.dialogue.dialogues_of` makes them of captions for the others.

    Raises:
      InputError: unknown source, a path that is missing or not wanted, or what the source refuses.
    """
    if config.source not in _WITHOUT_PATH + _WITH_PATH:
        raise InputError(f"data.source: expected {', '.join(_WITHOUT_PATH + _WITH_PATH)}, found {config.source!r}")
    if config.source in _WITHOUT_PATH and config.path:
        raise InputError(f"data.path: the source {config.source} takes no path, found {config.path!r}")
    if config.source in _WITH_PATH and not config.path:
        raise InputError(f"data.path: the source {config.source} needs a path, found none")
    if config.annotations and config.source not in _QUESTIONS:
        raise InputError(f"data.annotations: the source {config.source} takes none, found {config.annotations!r}")
    config = _on_disk(config)
    if config.source == "openmoji":
        from tove_jax.data.openmoji import open_openmoji

        return open_openmoji(config.image_size, cache_folder(config.cache))
    if config.source == "openmoji_questions":
        from tove_jax.data.questions import OpenMojiQuestions

        return OpenMojiQuestions(config.image_size, cache_folder(config.cache))
    if config.source == "photographs":
        from tove_jax.data.photographs import PhotographSource

        return PhotographSource()
    if config.source == "folder":
        from tove_jax.data.folder import FolderSource

        return FolderSource(config.path)
    if config.source == "webdataset":
        from tove_jax.data.webdataset import WebDatasetSource, expand_pattern

        return WebDatasetSource(expand_pattern(config.path), cache=cache_folder(config.cache))
    images = config.images
    if config.source == "llava":
        from tove_jax.data.llava import LlavaSource

        return LlavaSource(config.path, images, blank_size=config.image_size)
    if config.source == "coco":
        from tove_jax.data.coco import CocoSource

        return CocoSource(config.path, images)
    from tove_jax.data.vqa import VqaSource

    return VqaSource(config.source, config.path, images, config.annotations, blank_size=config.image_size)


def _on_disk(config: DataConfig) -> DataConfig:
    """Returns settings whose paths are on a disk: what lies in an object store is copied, see `files.remote`.

    ``images`` is settled to the folder of ``path`` where it is left open. Of a pattern of tars, the folder is copied.
    """
    if config.source in _WITHOUT_PATH:
        return config
    cache = cache_folder(config.cache)
    if config.source == "webdataset" and remote.is_remote(config.path):
        path = str(remote.local(remote.parent(config.path), cache) / config.path.rpartition("/")[2])
    else:
        path = str(remote.local(config.path, cache))
    images = config.images or remote.parent(config.path)
    if config.source not in ("folder", "webdataset"):
        images = str(remote.local(images, cache))
    annotations = config.annotations and str(remote.local(config.annotations, cache))
    return dataclasses.replace(config, path=path, images=images, annotations=annotations)
