"""Brings any supported folder or file into the one form that the rest of the package reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tove_jax.config.schema import Config, StudentConfig
from tove_jax.errors import InputError
from tove_jax.files.weights import hash_arrays
from tove_jax.hf import rules
from tove_jax.hf.export import export_student, save_start
from tove_jax.hf.load import import_encoder_adapters, import_mole_encoder, import_student, with_image_size


def convert(
    source: str | Path,
    output: Path | str,
    *,
    adapter: Path | str | None = None,
    encoder_adapters: Path | str | None = None,
    plain: bool = False,
    image_size: int | None = None,
) -> list[str]:
    """Imports a checkpoint, checks every name and shape, and writes it as an export.

    Args:
      source: folder or hub id of a CLIP or of an exported student.
      output: folder to write; read it with `tove_jax.hf.load.import_student`, or, when it has no LoRA
        experts, name it in ``student.initialize``.
      adapter: MoVE-KD's ``mole_encoder.bin`` to put on top of `source`; encoder adapters in it come along.
      encoder_adapters: MoVE-KD's ``encoder_adapter.bin``; None: those of `source`, when it is an export with some.
      plain: leave LoRA experts and encoder adapters out.
      image_size: side to which position embeddings are resized, pixels.

    Returns:
      Lines that say what came in.

    Raises:
      InputError: as `import_student` and `export_student`.
    """
    fields, params = import_mole_encoder(adapter, source) if adapter else import_student(source)
    fields, params = with_image_size(fields, params, image_size)
    teachers: dict[str, Any] = {}
    for file in () if plain else (source, adapter, encoder_adapters):
        if file is None or (file is source and not Path(source).is_dir()):
            continue  # a hub id names a CLIP
        found = import_encoder_adapters(file)
        if file is encoder_adapters and not found:
            raise InputError(f"{file}: expected encoder adapters (sam_adapter_1.weight), found none")
        teachers |= found
    student = StudentConfig(**fields)
    config = Config(title=Path(str(source)).name, student=dataclasses.replace(student, initialize=str(source)))
    if plain:
        save_start(config, params, output)
    else:
        export_student(config, params, output, adapters=teachers)
    count = sum(leaf.size for leaf in rules.flatten(params).values())
    adapter = student.adapter
    experts = adapter.experts if adapter.kind == "mole" else adapter.teacher_experts + adapter.general_experts
    kept = "none" if plain or adapter.kind == "none" else f"{experts} of rank {adapter.rank}"
    return [
        f"read     {source}: {student.layers} layers, width {student.width}, {count:,} parameters",
        f"experts  {kept}",
        f"encoder adapters  {', '.join(teachers) or 'none'}",
        f"hash     {hash_arrays(rules.flatten(params))} (of the parameter tree as read)",
        f"written  {output}",
    ]
