"""`tove sweep`: the runs of a sweep file, several at a time, here or on a cluster."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tove_jax.files.remote import disk_folder

HELP = "run a sweep file's settings and seeds: several at a time here, as a Slurm array, or as JobSets; then one table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("sweep", metavar="FILE.py[:ARGUMENT]", help="Sweep file, as of `tove compare`.")
    parser.add_argument("--workdir", type=disk_folder, default=Path("runs/compare"), help="Folder of all runs.")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="Only these rows.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="In place of the file's seeds.")
    parser.add_argument("--at-once", type=int, default=0, metavar="N", help="Runs at a time; here 1 when left out.")
    parser.add_argument("--slurm", action="store_true", help="As a Slurm array, a job a run.")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help="Further options of sbatch, in one word.")
    parser.add_argument("--gke", choices=("tpu", "gpu"), help="As JobSets on a GKE cluster, a set a run.")
    parser.add_argument("--launch", type=Path, default=Path("launch"), help="Folder of the launchers (launch).")
    parser.add_argument("--array-task", action="store_true", help="Do the run of this job of a Slurm array.")
    parser.add_argument("--dry-run", action="store_true", help="Print the commands of what is not done.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")


def run(args: argparse.Namespace) -> int:
    """Does, or hands over, what is not done; prints and writes the table when all is."""
    import subprocess

    from tove_jax.cli.compare import write_table
    from tove_jax.config.sweep import from_sweep_file
    from tove_jax.errors import InputError
    from tove_jax.eval import sweep as work
    from tove_jax.eval.compare import run_sweep
    from tove_jax.parallel import start

    if args.slurm and args.gke:
        raise InputError("--slurm, --gke: expected one of them")
    sweep = from_sweep_file(args.sweep).only(args.rows, args.seeds)
    found = work.tasks(sweep, args.workdir)
    if args.array_task:
        start.require_one("a run of a sweep")
        task = work.array_task(found)
        return run_sweep(sweep.only(task.rows, [task.seed]), args.workdir, progress=not args.quiet, part=True)
    left = [task for task in found if not task.done]
    if args.slurm:
        words = ["tove", "sweep", args.sweep, f"--workdir={args.workdir}"]
        words += ["--rows", *args.rows] if args.rows else []
        words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
        options = shlex.split(args.sbatch)
        commands = [work.slurm_command(found, words, args.launch, args.at_once, options)] if left else []
    elif args.gke:
        commands = [work.jobset_command(task, args.sweep, args.workdir, args.launch, args.gke) for task in left]
    else:
        commands = [work.command(task, args.sweep, args.workdir) for task in left]
    if args.dry_run:
        print(f"# {len(found) - len(left)} of {len(found)} runs are done")
        for command in commands:
            print(shlex.join(command))
        return 0
    if left and (args.slurm or args.gke):
        for command in commands:
            if status := subprocess.run(command, check=False).returncode:
                return status
        return 0
    if left and (status := work.run_local(found, args.sweep, args.workdir, args.at_once or 1, progress=not args.quiet)):
        return status
    write_table(sweep, args)
    return 0
