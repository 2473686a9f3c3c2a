"""`tove compare`: the methods of the demo, each taken apart as its paper does.

The papers begin with a CLIP that knows something, keep it close to itself and let others add to it. No CLIP is at
hand that could be shipped, so the comparison first makes one: a tower that learns what EfficientNet sees, once, and
then is every row's start, frozen copy and anchor. From there each row trains everything, as the papers' second stages do,
in few steps, with its paper's weights; but for HAWAII's heads, as said beside them.

MoVE-KD's rows follow the order of the paper's ablation, each one step more than the row above; HAWAII's are
the fine-grained term alone, with token scores, and whole; ToVE's are the encoder with all its experts, the same
without the one that knows most and without any, and merged into a plain tower. The whole MoVE-KD and HAWAII are
merged too. Patches have 16 pixels instead of the demo's 8, a quarter of the cost. Rows that distil see the same
pictures in the same order of batches.
"""

from pathlib import Path

from ml_collections import ConfigDict

from tove_jax.config import parse_arguments
from tove_jax.config.sweep import settings_of

DEMO = Path(__file__).parents[1] / "demo.py"
DISTILLING = {"train.steps": 600, "train.batch": 16, "optim.lr": 1e-3}
MERGING = 1200

# What the papers report: the first row is worse than the second. Beside it the paper's means, as far as known.
ORDERS = (
    ("plain", "adapter", "MoVE-KD: 66.3 < 66.7"),
    ("adapter", "mole", "MoVE-KD: 66.7 < 67.4"),
    ("mole", "token", "MoVE-KD: 67.4 < 67.7"),
    ("token", "teacher", "MoVE-KD: 67.7 < 68.0"),
    ("plain", "teacher", "MoVE-KD: 66.3 < 68.0"),
    ("fine", "fine+score", "HAWAII: 63.2 < 63.5"),
    ("fine+score", "hawaii", "HAWAII: 63.5 < 63.7"),
    ("fine", "hawaii", "HAWAII: 63.2 < 63.7"),
    ("tove-detached", "tove", "ToVE: experts help"),
    ("tove-merged", "tove", "ToVE: 74.0 < 74.4"),
    ("tove-detached", "tove-merged", "ToVE: merging keeps most"),
)


def get_sweep(arg: str = "") -> dict:
    """Returns the rows.

    Args:
      arg: takes ``smoke`` (seconds, for tests) and ``steps=N`` (of every row and every merge; 0: 600 of 16
        pictures, 1,200 of a merge, and 250 of 128 of ToVE, whose tower is frozen). The start has twice a row's.
    """
    arguments = parse_arguments(arg, smoke=False, steps=0)
    rows: list[dict] = []

    def demo(method: str) -> ConfigDict:
        config: ConfigDict = settings_of(DEMO, f"method={method}" + (",smoke" if arguments.smoke else ""))
        config.student.patch_size = 16
        if method != "tove" and not arguments.smoke:
            config.update_from_flattened_dict(DISTILLING)
        config.train.steps = arguments.steps or config.train.steps
        return config

    def add(name: str, method: str, against: str = "", adapter: dict | None = None, **fields) -> None:
        config = demo(method)
        if method == "hawaii":
            config.features.experts = experts
            config.student.adapter.teacher_experts = len(experts)
        if method != "tove":
            frozen = (("method/.*", None),) if method == "hawaii" else ()
            config.optim.groups = (*frozen, (".*", 1.0))
        config.student.adapter.update(adapter or {})
        config.method.update(fields)
        rows.append({"name": name, "config": config} | ({"against": against} if against else {}))

    def merge(name: str, of: str, factor: float) -> None:
        settings = {"train.steps": 4} if arguments.smoke else DISTILLING | {"train.steps": MERGING}
        settings |= {"train.steps": arguments.steps} if arguments.steps else {}
        settings["optim.groups"] = (("student/.*", factor), ("teacher/.*", None))
        rows.append({"name": name, "of": of, "merge": {}, "settings": settings})

    start = demo("move_kd")
    experts = start.features.experts
    start.student.adapter.kind = "none"
    start.method.teacher_prior = (1.0, *(0.0 for _ in experts[2:]))
    start.train.steps *= 2

    # CLIP counts 0.8, as released. Without the teacher weight the others count alike.
    move_kd = {"clip_weight": 0.8, "teacher_prior": (), "token_weighting": False, "teacher_weighting": False}
    add("plain", "move_kd", adapter={"kind": "none"}, **move_kd | {"target": "interpolate"})
    move_kd["target"] = "adapter"
    add("adapter", "move_kd", "plain", {"kind": "none"}, **move_kd)
    add("mole", "move_kd", "adapter", **move_kd)
    move_kd["token_weighting"] = True
    add("token", "move_kd", "mole", **move_kd)
    add("teacher", "move_kd", "token", **move_kd | {"teacher_weighting": True})
    # HAWAII has no anchor but its text loss. Without one, heads that train sink with the student; so they stay as
    # drawn, and the weight gives back the variance that this takes from their targets, as in the demo.
    hawaii = {"clip_target": "raw", "kd_weight": 16.0}
    add("fine", "hawaii", **hawaii, coarse=False, token_scoring=False)
    add("fine+score", "hawaii", "fine", **hawaii, coarse=False)
    add("hawaii", "hawaii", "fine+score", **hawaii)
    add("tove", "tove")
    hub = [spec.partition(":")[0] for spec in rows[-1]["config"].features.experts]
    rows.append({"name": "tove-one", "of": "tove", "detached": hub[:1]})
    rows.append({"name": "tove-detached", "of": "tove", "detached": hub})
    # What ToVE's experts say is new to the tower; the trained towers begin close to where they shall end.
    merge("tove-merged", "tove", 1.0)
    merge("teacher-merged", "teacher", 0.1)
    merge("hawaii-merged", "hawaii", 0.1)
    seeds = (1, 2) if arguments.smoke else (1, 2, 3)
    return {"baseline": "plain", "seeds": seeds, "rows": rows, "orders": ORDERS, "start": start}
