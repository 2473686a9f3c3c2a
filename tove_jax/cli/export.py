"""`tove export`: write the trained student as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write the trained student as a Hugging Face folder that transformers loads"
TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--step", type=int, help="Checkpoint to export; the newest when left out.")
    parser.add_argument("--output", type=Path, help="Target folder; `export` in the run's folder when left out.")


def run(args: argparse.Namespace) -> int:
    """Exports and prints the folder."""
    folder = export_run(args.config, args.workdir, step=args.step, output=args.output)
    print(folder)
    return 0


def export_run(config, workdir: Path, *, step: int | None = None, output: Path | None = None) -> Path:
    """Exports a run's student with all that is known of it.

    Args:
      config: the run's settings as asked for now; the checkpoint's own settings decide the model.
      workdir: the run's folder; its metrics.json, if any, goes to the model card.
      step: checkpoint; the newest when None.
      output: target folder; ``<workdir>/export`` when None.

    Returns:
      The folder written.

    Raises:
      InputError: no checkpoint, or the folder cannot be written.
    """
    from tove_jax.experts import registry
    from tove_jax.hf.export import export_student
    from tove_jax.hf.load import read_json
    from tove_jax.train.checkpoint import load_student

    saved, params, provenance = load_student(workdir, step)
    known = registry.cards()
    experts = []
    for spec in saved.features.experts:
        name = spec.partition(":")[0]
        card = vars(known[name]) if name in known else {"name": name}
        experts.append({**card, "name": spec, "weights_hash": provenance.get(f"expert/{spec}", "")})
    metrics = Path(workdir) / "metrics.json"
    told = {"step": provenance.get("step"), "experts": experts, "data": provenance.get("data")}
    if metrics.is_file():
        told["metrics"] = read_json(metrics)
    folder = output or Path(workdir) / "export"
    export_student(saved, params.get("student", params), folder, provenance=told)
    return folder
