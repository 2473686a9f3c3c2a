"""Pictures: sources, decoding, views, the split and the loader."""

from __future__ import annotations

from pathlib import Path

from tove_jax.config.schema import DataConfig
from tove_jax.data.cache import cache_folder
from tove_jax.data.picture import PictureSource
from tove_jax.errors import InputError


def make_source(config: DataConfig) -> PictureSource:
    """Opens the source that a config names.

    Args:
      config: ``config.data``; `source`, `path`, `images`, `image_size` and `cache` are read.

    Returns:
      The whole source: the split and `limit` are `tove_jax.data.split.split`'s.

    Raises:
      InputError: unknown source, a path that is missing or not wanted, or what the source refuses.
    """
    if config.source in ("openmoji", "photographs") and config.path:
        raise InputError(f"data.path: the source {config.source} takes no path, found {config.path!r}")
    if config.source in ("folder", "llava", "webdataset") and not config.path:
        raise InputError(f"data.path: the source {config.source} needs a path, found none")
    if config.source == "openmoji":
        from tove_jax.data.openmoji import open_openmoji

        return open_openmoji(config.image_size, cache_folder(config.cache))
    if config.source == "photographs":
        from tove_jax.data.photographs import PhotographSource

        return PhotographSource()
    if config.source == "folder":
        from tove_jax.data.folder import FolderSource

        return FolderSource(config.path)
    if config.source == "llava":
        from tove_jax.data.llava import LlavaSource

        images = config.images or str(Path(config.path).parent)
        return LlavaSource(config.path, images, blank_size=config.image_size)
    if config.source == "webdataset":
        from tove_jax.data.webdataset import WebDatasetSource, expand_pattern

        return WebDatasetSource(expand_pattern(config.path), cache=cache_folder(config.cache))
    raise InputError(
        f"data.source: expected openmoji, photographs, folder, llava or webdataset, found {config.source!r}"
    )
