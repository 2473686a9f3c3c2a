"""`tove compare`: the methods of the demo, each taken apart as its paper does.

MoVE-KD's rows follow the order of the paper's ablation, each one step more than the row above; HAWAII's are
the fine-grained term alone, with token scores, and whole. All rows have the demo's recipe (see
`configs/demo.py`: random start, targets that stay as drawn, centred features) and so differ from the papers,
where a pretrained CLIP is kept close to itself.
"""

from pathlib import Path

from ml_collections import ConfigDict

from tove_jax.config import parse_arguments
from tove_jax.config.sweep import settings_of

DEMO = Path(__file__).parents[1] / "demo.py"


def get_sweep(arg: str = "") -> dict:
    """Takes ``smoke`` (seconds, for tests) and ``steps=N`` (of every row; 0: those of each method's demo)."""
    arguments = parse_arguments(arg, smoke=False, steps=0)
    rows: list[dict] = []

    def add(name: str, method: str, against: str = "", adapter: dict | None = None, **fields) -> None:
        config: ConfigDict = settings_of(DEMO, f"method={method}" + (",smoke" if arguments.smoke else ""))
        config.student.adapter.update(adapter or {})
        config.method.update(fields)
        config.train.steps = arguments.steps or config.train.steps
        rows.append({"name": name, "config": config} | ({"against": against} if against else {}))

    # Without the teacher weight the paper's teachers count alike; the demo's prior is a row of its own.
    move_kd = {"teacher_prior": (), "token_weighting": False, "teacher_weighting": False}
    add("plain", "move_kd", adapter={"kind": "none"}, **move_kd | {"target": "interpolate"})
    move_kd["target"] = "adapter"
    add("adapter", "move_kd", "plain", {"kind": "none"}, **move_kd)
    add("mole", "move_kd", "adapter", **move_kd)
    move_kd["token_weighting"] = True
    add("token", "move_kd", "mole", **move_kd)
    add("teacher", "move_kd", "token", **move_kd | {"teacher_weighting": True})
    add("prior", "move_kd", "token", **move_kd | {"teacher_prior": (0.8, 0.1, 0.1)})
    add("fine", "hawaii", coarse=False, token_scoring=False)
    add("fine+score", "hawaii", "fine", coarse=False)
    add("hawaii", "hawaii", "fine+score")
    add("tove", "tove")
    return {"baseline": "plain", "seeds": (1, 2) if arguments.smoke else (1, 2, 3), "rows": rows}
