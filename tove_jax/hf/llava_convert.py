"""Brings a LLaVA of any layout into the one that transformers loads, or into the original one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from tove_jax.errors import InputError
from tove_jax.hf.llava import HUB_FILES, load
from tove_jax.hf.llava_config import find_layout
from tove_jax.hf.llava_export import export
from tove_jax.hf.load import locate, read_json
from tove_jax.hf.rules import flatten


def is_llava(folder_or_hub_id: str | Path) -> bool:
    """Whether a folder, or what the hub has under this id, is a LLaVA of any layout."""
    try:
        return find_layout(read_json(locate(folder_or_hub_id, also=HUB_FILES) / "config.json")) is not None
    except InputError:
        return False


def convert_llava(
    source: str | Path,
    output: Path | str,
    *,
    layout: Literal["transformers", "original"] = "transformers",
    template: str = "v1",
    **options: Any,
) -> list[str]:
    """Reads a whole model, checks every name and shape, and writes it.

    Args:
      source: folder or hub id, see `tove_jax.hf.llava.load`.
      output: folder to write.
      layout: see `tove_jax.hf.llava_export.export`.
      template: likewise.
      **options: ``language``, ``vision`` and ``adapter`` of `tove_jax.hf.llava.load`; ``tokenizer`` of the export.

    Returns:
      Lines that say what came in.

    Raises:
      InputError: as those two.
    """
    tokenizer = options.pop("tokenizer", None)
    model, params, extras = load(source, **options)
    export(model, params, output, like=extras, layout=layout, template=template, tokenizer=tokenizer)
    tower, decoder = model.tower, model.decoder
    adapter = extras.student.adapter
    count = sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())
    return [
        f"read     {source}: LLaVA{'-NeXT' if model.anyres else ''} in the {extras.described.layout} layout, "
        f"{count:,} parameters",
        f"tower    {tower.depth} layers, width {tower.width}, {tower.image_size} px; experts: {adapter.kind}",
        f"decoder  {decoder.depth} layers, width {decoder.width}, {decoder.vocabulary} tokens; projector "
        f"{model.projector.kind}",
        f"written  {output} ({layout} layout)",
    ]
