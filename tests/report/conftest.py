"""An invented run, so that pages are tested without a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tove_jax.config.schema import Config, HawaiiConfig, MergeConfig, ToVEConfig
from tove_jax.report.collect import ExpertFacts, Panel, PictureMaps, RunData, collect

EXPERTS = ("clip", "efficientnet_lite0", "hed", "pp_ocr_det")
CLASSES = ("Animals & Nature", "Food & Drink", "Objects", "Symbols")


def write_files(workdir: Path) -> None:
    """Writes metrics.jsonl, metrics.json and eval/predictions.json of an invented run."""
    generator = np.random.default_rng(0)
    (workdir / "eval").mkdir(parents=True)
    with open(workdir / "metrics.jsonl", "w") as file:
        for step in range(10, 1501, 10):
            fall = float(np.exp(-step / 400))
            row = {"step": step, "loss/kd": 0.2 + 2 * fall + 0.05 * generator.random(), "loss/balance": 0.36}
            row["loss/total"] = 0.5 * row["loss/kd"] + 0.01 * row["loss/balance"]
            shares = generator.dirichlet([30, 40, 20])
            for name, weight in zip(EXPERTS, (0.8, *(0.2 * shares)), strict=True):
                row[f"weight/{name}"] = float(weight)
                row[f"loss/{name}/patches"] = 0.1 + fall * generator.random()
            for layer in range(4):
                load = generator.dirichlet(np.array([20, 10 + 8 * layer, 15]))
                row |= {f"router/load/{layer}/{expert}": float(load[expert]) for expert in range(3)}
            row |= {
                "perf/images_per_s": 80 + 5 * generator.random(),
                "perf/data_wait": 0.01 * generator.random(),
            }
            if step == 700:
                row["loss/kd"] = None
            file.write(json.dumps(row) + "\n")
    metrics = {"train/loss/first": 1.2, "train/loss/last": 0.11, "eval/majority": 0.241, "eval/classes": 9}
    metrics |= {"eval/pictures/train": 1312, "eval/pictures/held_out": 441}
    values = {"pixels": 0.55, "init": 0.46, "student": 0.58, "clip": 0.46, "efficientnet_lite0": 0.65}
    values |= {"hed": 0.53, "pp_ocr_det": 0.49, "student_minus_init": 0.121, "student_minus_pixels": 0.03}
    for task, extra in (("knn", 0.0), ("probe", 0.04)):
        for name, value in values.items():
            ends = {
                "": value + extra,
                "_std": 0.022,
                "_low": value + extra - 0.045,
                "_high": value + extra + 0.045,
            }
            metrics |= {f"eval/{task}/{name}{end}": number for end, number in ends.items()}
    for name in EXPERTS:
        metrics[f"eval/feature_error/{name}"] = float(generator.uniform(0.3, 0.8))
        metrics[f"eval/linear_error/init/{name}"] = 0.8
        metrics[f"eval/linear_error/student/{name}"] = 0.6
    metrics |= {
        "eval/seeds/count": 3,
        "eval/seeds/knn/student/mean": 0.578,
        "eval/seeds/knn/student/std": 0.006,
    }
    (workdir / "metrics.json").write_text(json.dumps(metrics))
    truth = [CLASSES[index % 4] for index in range(60)]
    names = ("pixels", "init", "student", *EXPERTS)
    guesses = {name: [str(label) if generator.random() < 0.6 else "Objects" for label in truth] for name in names}
    predictions = {
        "classes": CLASSES,
        "ids": [f"id{i}" for i in range(60)],
        "truth": [CLASSES.index(label) for label in truth],
    }
    predictions["knn"] = {name: [CLASSES.index(label) for label in labels] for name, labels in guesses.items()}
    (workdir / "eval" / "predictions.json").write_text(json.dumps(predictions))


def pictures(count: int = 3) -> tuple[PictureMaps, ...]:
    """Returns invented pictures with both groups of panels."""
    generator = np.random.default_rng(1)
    y, x = np.mgrid[0:192, 0:192]
    result = []
    for number in range(count):
        image = np.stack([x + 20 * number, y, 255 - x], axis=-1).clip(0, 255).astype(np.uint8)
        image[(x - 96) ** 2 + (y - 96) ** 2 < 2500] = (250, 200, 40)
        panels = []
        for name in ("init", "student", "clip"):
            spot = np.exp(-((x - 60 - 30 * number) ** 2 + (y - 90) ** 2) / 2000)[..., None]
            panels.append(
                Panel(
                    f"attention of {name}",
                    "attention",
                    (image * (0.3 + 0.7 * spot)).astype(np.uint8),
                    f"{name} looks",
                    name,
                )
            )
        for name in ("init", "student", *EXPERTS):
            side = 8 if name in ("init", "student", "clip") else 14
            colours = generator.integers(0, 255, (side, side, 3)).astype(np.uint8)
            panels.append(Panel(name, "components", colours, f"components of {name}", name))
        origin = "held out" if number else "photograph"
        result.append(
            PictureMaps(f"p{number}", f"<picture> & number {number}", origin, "CC0 (someone)", image, tuple(panels))
        )
    return tuple(result)


def run(workdir: Path) -> RunData:
    """Returns a whole invented run, its files written into `workdir`."""
    write_files(workdir)
    config = Config(title="Demo on OpenMoji")
    config = dataclasses.replace(
        config, student=dataclasses.replace(config.student, image_size=64, width=192, layers=4)
    )
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    facts = tuple(
        ExpertFacts(
            name, f"Network {name}", "A. Author, arXiv 0000.00000", "some-package", "a1b2c3d4e5f60718",
            "Apache-2.0", "224 px, crop", "7 x 7 x 320 as bf16",
        )
        for name in EXPERTS
    )  # fmt: skip
    return collect(
        workdir,
        title="Demo on OpenMoji",
        experts=EXPERTS,
        config=plain,
        defaults=json.loads(json.dumps(dataclasses.asdict(Config()))),
        facts=facts,
        pictures_name="openmoji",
        pictures_licence="CC BY-SA 4.0",
        provenance={"step": 1500, "weights": {"clip": "0011223344556677"}},
        pictures=pictures(),
    )


def _changed(known: RunData, folder: str, method: Any, history: list[dict[str, Any]], **student: Any) -> RunData:
    """Returns an invented run of another method, with its settings and its history."""
    config = Config(title=folder, method=method)
    adapter = dataclasses.replace(config.student.adapter, **student)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, layers=4, adapter=adapter))
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return dataclasses.replace(known, title=folder, config=plain, defaults=plain, history=tuple(history))


def hawaii_run(known: RunData) -> RunData:
    """Returns an invented HAWAII run: two groups of routers, the general one of layer 1 collapsed."""
    history = []
    for step in range(1, 30):
        row: dict[str, Any] = {"step": step, "loss/total": 1 / step, "loss/fine": 0.5 / step, "loss/coarse": 0.4}
        for name in EXPERTS:
            row |= {f"loss/{name}/patches": 1 / step, f"target/{name}/variance": 0.1, f"score/{name}/peak": 1.2}
        row["target/coarse/variance"] = 0.2
        for layer in range(4):
            loads = (0.4, 0.3, 0.2, 0.1, *((0.03, 0.95, 0.02) if layer == 1 else (0.3, 0.3, 0.4)))
            row |= {f"router/load/{layer:02d}/{place}": load for place, load in enumerate(loads)}
        history.append(row)
    return _changed(known, "hawaii", HawaiiConfig(), history, kind="mola", teacher_experts=4, general_experts=3)


def tove_run(known: RunData) -> RunData:
    """Returns an invented ToVE run with the file of `tove detach`."""
    names, history = EXPERTS[1:], []
    for step in range(1, 30):
        row: dict[str, Any] = {"step": step, "loss/total": 3 / step, "loss/text": 3 / step, "loss/aux": 1e-12}
        for name, gate in zip(names, (0.5, 0.3, 0.2), strict=True):
            row |= {f"gate/{name}": gate, f"gate/share/{name}": gate}
        history.append({**row, "gate/entropy": 0.9})
    order, rows = names[::-1], []
    for gone in range(4):
        attached = [name for name in names if name not in order[:gone]]
        scores = {f"{task}{end}": 0.6 - 0.1 * gone for task in ("knn", "probe") for end in ("", "_low", "_high")}
        times = {"encoder_ms": 2.0, "experts_ms": 5.0 * len(attached), "total_ms": 2 + 5.0 * len(attached)}
        gone_last = order[gone - 1] if gone else None
        rows.append({"attached": attached, "detached": gone_last, "text": 3.25, **scores, **times})
    shares = {name: {"gate": 0.2, "share": 0.1} for name in names}
    latency = {"batch": 8, "repeats": 2, "device": "cpu", "included": "all that counts", "experts": {}}
    detach = {"pictures": {"calibration": 9, "held_out": 9}, "contribution": shares, "order": order}
    found = _changed(known, "tove", ToVEConfig(), history, kind="none")
    return dataclasses.replace(found, experts=names, detach={**detach, "latency": latency, "rows": rows})


def merged_run(known: RunData) -> RunData:
    """Returns an invented merge of a ToVE run, judged beside it."""
    metrics = dict(known.metrics)
    for task in ("knn", "probe"):
        for name, value in (("source", 0.61), ("student_minus_source", -0.03)):
            ends = {"": 0.0, "_low": -0.01, "_high": 0.01}
            metrics |= {f"eval/{task}/{name}{end}": value + more for end, more in ends.items()}
    metrics |= {"eval/merge/error/merged": 0.25, "eval/merge/error/tower": 1.5}
    history = [{"step": step, "loss/total": 1 / step, "merge/error": 1 / step} for step in range(1, 9)]
    source = ToVEConfig(attach_all=False, attached=("hed",))
    method = MergeConfig(source="somewhere/runs/demo_tove", source_method=source, blocks=2)
    return dataclasses.replace(_changed(known, "merged", method, history, kind="none"), metrics=metrics)


@pytest.fixture(scope="session")
def fabricated(tmp_path_factory) -> tuple[Path, RunData]:
    """Returns an invented run's folder and what the page is told of it."""
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    return workdir, run(workdir)
