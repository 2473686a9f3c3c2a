"""Runs the sections of `tove bench` within their time, and writes down what they found."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from tove_jax.bench import deployed, feeding, sections, starting
from tove_jax.bench.timing import Clock, Row, load, machine, versions
from tove_jax.errors import InputError, nearest

SUITES = ("cpu", "gpu", "input")
SECTIONS = {
    "step": 0.46,
    "adapters": 0.09,
    "language": 0.14,
    "extraction": 0.05,
    "export": 0.05,
    "input": 0.11,
    "start": 0.1,
}
"""Sections in their order, with the share of the time that each may take; what one leaves goes to the next."""


def bench(
    suite: str = "cpu",
    *,
    only: Sequence[str] = (),
    small: bool = False,
    minutes: float = 0.0,
    folder: str | None = None,
    after: dict[str, Any] | None = None,
    command: str = "",
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a suite.

    Args:
      suite: ``cpu``, ``gpu``, which wants a GPU, or ``input``, which is that section alone.
      only: names of sections, or parts of the names of cases; none: everything.
      small: tiny shapes, which show that it works and nothing else.
      minutes: begin no case after its section's share of so many minutes, and end turns early; 0: no limit. A case
        that compiles is not interrupted.
      folder: where the sections input and start write; None: the system's temporary folder.
      after: what an earlier call returned; the cases that it measured are left out.
      command: what is written down as the command.
      told: called with a line of progress.

    Returns:
      What `text` prints and JSON holds: ``suite``, ``command``, ``seconds``, ``versions``, ``machine``, ``rows``,
      ``measured``, the cases by section, ``left_out``, the cases that were not measured with the reason, and ``wrong``, how many of these because their
      sides compute different things.

    Raises:
      InputError: an unknown suite or name, or a GPU suite without one.
    """
    if suite not in SUITES:
        raise InputError(f"--suite: no suite '{suite}'{nearest(suite, SUITES)}; suites: {', '.join(SUITES)}")
    if suite == "gpu" and jax.default_backend() != "gpu" and not small:
        raise InputError(f"--suite=gpu: expected a GPU, found {jax.devices()[0].device_kind}")
    chosen = choose(suite, only, small, folder)
    done = [] if after is None else [tuple(one) for one in after["measured"]]
    chosen = {name: [case for case in cases if (name, case.name) not in done] for name, cases in chosen.items()}
    cache = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling takes is a figure
    whole, spent = Clock(60 * minutes), 0.0
    found: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    measured: list[tuple[str, str]] = []
    wrong = 0
    described = machine()
    total = sum(SECTIONS[section] for section in chosen)
    try:
        for section, cases in chosen.items():
            spent += SECTIONS[section] / total
            clock = whole.until(spent)
            for case in cases:
                if clock.left <= 0:
                    left_out.append({"section": section, "case": case.name, "why": "out of time"})
                    continue
                told(f"{section}: {case.name}")
                try:
                    made = case.run(clock)
                except sections.Unmeasured as error:
                    told(error.details or str(error))
                    left_out.append({"section": section, "case": case.name, "why": str(error)[:200]})
                    continue
                except Exception as error:  # one case that fails, for want of memory say, leaves the others
                    wrong += isinstance(error, InputError)
                    told(traceback.format_exc())
                    why = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"
                    left_out.append({"section": section, "case": case.name, "why": why})
                    continue
                finally:
                    sections.release()
                measured.append((section, case.name))
                for row in made:
                    told(f"  {row.side}: {row.rate:.4g} {row.unit}/s, {row.ratio:.2f} times the first's time")
                    found.append({"section": section, **as_json(row)})
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    return {
        "suite": suite,
        "small": small,
        "command": command,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - whole.began, 1),
        "versions": versions(),
        "machine": {**described, "load_after": load()},
        "rows": found,
        "measured": measured,
        "left_out": left_out,
        "wrong": wrong,
    }


def choose(suite: str, only: Sequence[str], small: bool, folder: str | None) -> dict[str, list[sections.Case]]:
    """Returns the cases of a suite by section, in order.

    Raises:
      InputError: a name that fits no section and no case.
    """
    scale = sections.scale_of(suite, small)
    every = {
        "step": lambda: sections.step_cases(scale),
        "adapters": lambda: sections.adapter_cases(scale),
        "language": lambda: sections.language_cases(scale),
        "extraction": lambda: sections.extraction_cases(scale),
        "export": lambda: deployed.export_cases(scale),
        "input": lambda: feeding.cases(scale, small, folder),
        "start": lambda: starting.start_cases(scale, folder),
    }
    made = {name: make() for name, make in every.items() if suite != "input" or name == "input"}
    if not only:
        return made
    for word in only:
        names = [case.name for cases in made.values() for case in cases]
        if word not in made and not any(word in name for name in names):
            raise InputError(
                f"--only: no section or case '{word}'{nearest(word, made)}; sections: {', '.join(made)}; cases: "
                + "; ".join(names)
            )
    kept = {
        name: [case for case in cases if any(word == name if word in made else word in case.name for word in only)]
        for name, cases in made.items()
    }
    return {name: cases for name, cases in kept.items() if cases}


def as_json(row: Row) -> dict[str, Any]:
    """Returns a row with its rate, facts that are not known left out."""
    facts = {name: value for name, value in row.facts.items() if value not in (None, "")}
    return {**dataclasses.asdict(row), "rate": row.rate, "facts": facts}


def text(found: dict[str, Any]) -> str:
    """Returns what `bench` found as Markdown."""
    told, on = found["versions"], found["machine"]
    lines = [
        f"`{found['command']}`" if found["command"] else f"suite {found['suite']}",
        "",
        f"{on['kind']} x {on['devices']}, {on['cores']} cores, load {on['load']} before and {on['load_after']} after; "
        + ", ".join(f"{name} {version}" for name, version in told.items()),
    ]
    for section in SECTIONS:
        part = [row for row in found["rows"] if row["section"] == section]
        if not part:
            continue
        lines += ["", f"### {section}", ""]
        lines += [
            "| case | side | time, ms (quartiles) | a second | times the first's time | on processors, ms (times the first's) | TFLOP/s | MFU | memory, MiB | compile, s | |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        case = ""
        for row in part:
            seconds, facts = row["seconds"], row["facts"]
            spread = f" ({_ms(seconds['low'])} to {_ms(seconds['high'])})" if seconds["runs"] > 1 else ""
            cells = [
                row["case"] if row["case"] != case else "",
                row["side"],
                _ms(seconds["median"]) + spread,
                f"{row['rate']:.3g} {row['unit']}",
                f"{row['ratio']:.2f}",
                f"{_ms(facts['cpu_s'])} ({facts['cpu_ratio']:.2f})" if "cpu_s" in facts else "",
                f"{facts['tflops']:.3g}" if "tflops" in facts else "",
                f"{facts['mfu']:.1%}" if "mfu" in facts else "",
                f"{facts['memory_mib']:.0f}" if "memory_mib" in facts else "",
                f"{facts['compile_s']:.1f}" if "compile_s" in facts else "",
                facts.get("note", ""),
            ]
            case = row["case"]
            lines.append("| " + " | ".join(cells) + " |")
    if found["left_out"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {one['section']}: {one['case']}: {one['why']}" for one in found["left_out"]]
    return "\n".join(lines) + "\n"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def to_json(found: dict[str, Any]) -> bytes:
    """Returns the JSON of what `bench` found."""
    return (json.dumps(found, indent=1) + "\n").encode()


def earlier(path: Path) -> dict[str, Any]:
    """Reads the JSON of an earlier call.

    Raises:
      InputError: no such file, or something else in it.
    """
    try:
        found = json.loads(path.read_text())
        if not all(isinstance(section, str) and isinstance(name, str) for section, name in found["measured"]):
            raise ValueError("names of sections and cases that are no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--after: {path}: expected the output of tove bench, found {error!r}") from None
    return found


def command_line(argv: Sequence[str] | None = None) -> str:
    """Returns the command as it was typed."""
    return shlex.join(["tove", "bench", *(sys.argv[2:] if argv is None else argv)])
