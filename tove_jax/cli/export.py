"""`tove export`: write the trained student as a Hugging Face folder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tove_jax.cli.stored import of_run
from tove_jax.config.schema import Config
from tove_jax.errors import InputError

HELP = "write the trained student as a Hugging Face folder that transformers loads, or as MoVE-KD's released files"
FORMATS = ("hf", "released", "released-safetensors", "llava", "llava-original")
TAKES_CONFIG = True
settings = of_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--step", type=int, help="Checkpoint to export; the newest when left out.")
    parser.add_argument("--output", type=Path, help="Target folder; `export` in the run's folder when left out.")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="hf",
        help="`released`: MoVE-KD's mole_encoder.bin and encoder_adapter.bin (needs torch), or the same names in "
        "safetensors; into `released` in the run's folder when --output is left out. `llava`: the whole model, as "
        "LlavaForConditionalGeneration with its processor, or in LLaVA's own layout; into `llava` there.",
    )
    parser.add_argument("--prefix", default="", help="`released`: put before the tower's names.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="`llava`: of the weights.")
    parser.add_argument(
        "--encoder-adapters", action="store_true", help="`hf`: MoVE-KD's encoder adapters too, for a further stage."
    )


def run(args: argparse.Namespace) -> int:
    """Exports and prints the folder."""
    if args.format == "hf":
        folder = export_run(
            args.config, args.workdir, step=args.step, output=args.output, encoder_adapters=args.encoder_adapters
        )
    elif args.format.startswith("llava"):
        folder = export_run_llava(
            args.config,
            args.workdir,
            step=args.step,
            output=args.output,
            original=args.format == "llava-original",
            store=args.dtype,
        )
    else:
        suffix = ".bin" if args.format == "released" else ".safetensors"
        folder = export_run_released(
            args.workdir, step=args.step, output=args.output, suffix=suffix, prefix=args.prefix
        )
    print(folder)
    return 0


def export_run_released(
    workdir: Path, *, step: int | None = None, output: Path | None = None, suffix: str = ".bin", prefix: str = ""
) -> Path:
    """Exports a MoVE-KD run as the released files, see `tove_jax.hf.export.export_released`.

    Args:
      workdir: the run's folder.
      step: checkpoint; the newest when None.
      output: target folder; ``<workdir>/released`` when None.
      suffix: ``.bin`` or ``.safetensors``.
      prefix: put before the tower's names.

    Returns:
      The folder written.

    Raises:
      InputError: no checkpoint, another method's run, or the folder cannot be written.
    """
    from tove_jax.hf.export import export_released
    from tove_jax.train.checkpoint import load_student

    stored, params, _ = load_student(Path(workdir), step)
    folder = output or Path(workdir) / "released"
    export_released(stored, params, folder, suffix=suffix, prefix=prefix)
    return folder


def export_run(
    config: Config | None,
    workdir: Path,
    *,
    step: int | None = None,
    output: Path | None = None,
    encoder_adapters: bool = False,
) -> Path:
    """Exports a run's student with all that is known of it.

    Args:
      config: where things lie on this machine; the checkpoint's own settings decide the model. None:
        everything as stored.
      workdir: the run's folder; its metrics.json, if any, goes to the model card.
      step: checkpoint; the newest when None.
      output: target folder; ``<workdir>/export`` when None.
      encoder_adapters: write a MoVE-KD run's encoder adapters too.

    Returns:
      The folder written.

    Raises:
      InputError: no checkpoint, encoder adapters of a run that has none, an encoder that needs experts beside it, or the folder cannot be written.
    """
    from tove_jax.hf.export import export_student
    from tove_jax.train.checkpoint import load_student

    workdir = Path(workdir)
    stored, params, provenance = load_student(workdir, step)
    _refuse_experts(workdir, stored)
    told = _told(config, stored, workdir, provenance)
    folder = output or workdir / "export"
    adapters = params.get("method") if encoder_adapters else None
    if encoder_adapters and (stored.method.name != "move_kd" or not adapters):
        raise InputError(f"{workdir}: this run of '{stored.method.name}' has no encoder adapters to export")
    export_student(stored, params["student"], folder, provenance=told, adapters=adapters)
    return folder


def export_run_llava(
    config: Config | None,
    workdir: Path,
    *,
    step: int | None = None,
    output: Path | None = None,
    original: bool = False,
    store: str | None = None,
) -> Path:
    """Exports a run's encoder with its projector and language model, see `tove_jax.hf.llava_export.export`.

    Low-rank updates of the language model are merged into it.

    Args:
      config, workdir, step: see `export_run`.
      output: target folder; ``<workdir>/llava`` when None.
      original: in LLaVA's own layout.
      store: dtype of the arrays; None: that of the checkpoint, and float32 for what did not train.

    Returns:
      The folder written.

    Raises:
      InputError: no checkpoint, a run without such a language model, an encoder that needs experts beside it, or a
        folder that cannot be written.
    """
    import jax.numpy as jnp

    from tove_jax.data.view import View
    from tove_jax.eval.answerers import read_language
    from tove_jax.hf.card import model_card
    from tove_jax.hf.llava_export import export
    from tove_jax.models import vit
    from tove_jax.models.llama import merge_lora
    from tove_jax.models.llava import Llava
    from tove_jax.train.checkpoint import load_student

    workdir = Path(workdir)
    stored, params, provenance = load_student(workdir, step)
    if stored.language.kind != "llava":
        raise InputError(
            f"{workdir}: expected a run with language.kind 'llava', found {stored.language.kind!r}; its encoder alone is "
            "exported by --format=hf"
        )
    _refuse_experts(workdir, stored)
    exact = dataclasses.replace(stored, train=dataclasses.replace(stored.train, dtype="float32"))
    tokenizer, model, language = read_language(exact, workdir, step, provenance)
    decoder = model.decoder
    if "lora" in language:
        lora = language.pop("lora")
        language["model"] = merge_lora(decoder, language["model"], lora)
        decoder = decoder.clone(lora_rank=0)
    if model.projector is None:
        raise ValueError("a language model of kind 'llava' has a projector")
    whole = Llava(vit.from_config(stored.student), model.projector, decoder, stored.student.feature)
    card = model_card(stored, "", _told(config, stored, workdir, provenance), whole=True)
    folder = output or workdir / "llava"
    export(
        whole,
        {"student": params["student"], "language": language},
        folder,
        tokenizer=tokenizer,
        view=View.of_student(stored.student),
        student=stored.student,
        template=stored.text.template,
        layout="original" if original else "transformers",
        files={"README.md": card.encode()},
        store=None if store is None else jnp.dtype(store),
    )
    return folder


def _refuse_experts(workdir: Path, config: Config) -> None:
    from tove_jax import methods

    if beside := methods.get(config.method.name).deployed_experts(config):
        raise InputError(
            f"{workdir}: this encoder needs its experts beside it ({', '.join(beside)}), which no plain folder holds; "
            "merge them into one CLIP with `tove merge`, and export that"
        )


def _told(config: Config | None, stored: Config, workdir: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the model card tells of a run."""
    from tove_jax.eval.run import with_stored_settings
    from tove_jax.hf.load import read_json

    settings = with_stored_settings(stored, config)
    told = {
        "step": provenance.get("step"),
        "experts": _experts(settings, workdir, provenance),
        "data": _data(settings),
    }
    if (workdir / "metrics.json").is_file():
        told["metrics"] = read_json(workdir / "metrics.json")
    return told


def _experts(config: Config, workdir: Path, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what is known of every expert of the run, with the hash of its weights."""
    from tove_jax.experts import registry
    from tove_jax.experts.run import chosen_experts, expert_cards

    try:
        cards = expert_cards(config, workdir)
    except InputError:  # its package or the start is not on this machine; the published card is
        cards = {}
    known, experts = registry.cards(), []
    for name, spec in chosen_experts(config).items():
        found = cards.get(name) or known.get(name)
        # Of a foreign expert whose model and features are elsewhere, only its spec is known here.
        card = dict(vars(found)) if found else {"weights": spec}
        if name == "clip":
            # Not the path of the machine that trained.
            start = Path(config.student.initialize)
            card["weights"] = (start.name if start.is_dir() else str(start)) if config.student.initialize else "random"
            card["licence"] = card["licence"] if config.student.initialize else "none: random weights"
        hashed = provenance.get(f"expert/{name}", "")
        experts.append({**card, "name": spec, "weights_hash": hashed})
    return experts


def _data(config: Config) -> dict[str, Any] | None:
    """Returns name, licence and numbers of the pictures, or None where they are not on this machine."""
    from tove_jax.eval.predictors import run_folder_source

    try:
        source, train, held_out = run_folder_source(config)
    except InputError:
        return None
    return {"name": source.name, "licence": source.licence, "train": len(train), "held_out": len(held_out)}
