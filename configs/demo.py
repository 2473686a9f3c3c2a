"""`make demo`: a small CLIP-style student that starts from nothing and learns from real experts.

Two cores, a few minutes. With MoVE-KD and HAWAII the whole student trains, since there is no pretrained
start to keep; HAWAII runs the student once more for every expert, so it sees fewer pictures in the
same time, in smaller batches. With ToVE the random CLIP stays frozen, so all that its tokens come to know is
what the gate lets in; what is merged from them into a plain tower then trains whole.
"""

from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw
from tove_jax.config.schema import HawaiiConfig, ToVEConfig
from tove_jax.errors import InputError, nearest
from tove_jax.methods.presets import apply


def _move_kd(config: ConfigDict) -> None:
    config.student.adapter.update(rank=8, dropout=0.0)
    # Targets that train are safe beside a pretrained CLIP, whose own tokens hold the student in place.
    # Here they would sink to what a random student gives (`target/*/variance` goes to zero),
    # so the encoder adapters stay the random projections they start as, of centred features.
    config.features.standardize = "centred"
    config.method.target = "interpolate"
    config.optim.groups = (("method/.*", None), ("student/.*", 1.0))
    # A random CLIP has nothing to keep and no opinion of the others. The classifier leads, as CLIP
    # does in the paper.
    config.method.update(clip_weight=0.0, teacher_weighting=False, teacher_prior=(0.8, 0.1, 0.1))
    config.optim.weight_decay = 0.1
    config.train.update(steps=1000, batch=64)


def _hawaii(config: ConfigDict) -> None:
    config.method = thaw(HawaiiConfig())
    apply(config, "recommended")
    # A random CLIP has nothing to teach, so there is none to anchor to either.
    experts = tuple(spec for spec in config.features.experts if spec != "clip")
    config.features.update(experts=experts, standardize="centred")
    config.method.clip_target = "mlp"
    config.student.adapter.update(teacher_experts=len(experts), rank=8, alpha=8.0, router_width=64)
    # Where everything trains and no text loss holds the student, heads and student agree on constants within
    # 20 steps (`target/*/variance` goes to zero). Heads that stay as drawn are targets that cannot collapse.
    config.optim.groups = (("method/.*", None), (".*", 1.0))
    # They shrink features of variance 1 to 0.03; the weight gives that back, or the routers' balance would lead.
    config.method.kd_weight = 16.0
    config.optim.lr = 1e-3
    config.train.update(steps=1000, batch=16)


def _tove(config: ConfigDict) -> None:
    config.method = thaw(ToVEConfig())
    apply(config, "recommended")
    config.method.update(hidden=config.student.width, vocabulary=512)
    config.features.experts = tuple(spec for spec in config.features.experts if spec != "clip")
    config.optim.groups = (("student/.*", None), ("method/.*", 1.0))
    config.train.steps = 250


METHODS = {"move_kd": _move_kd, "hawaii": _hawaii, "tove": _tove}


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``method=move_kd``, ``hawaii`` or ``tove``, ``seed=N`` and ``smoke`` (seconds, for tests)."""
    arguments = parse_arguments(arg, method="move_kd", seed=42, smoke=False)
    if arguments.method not in METHODS:
        known = f"{nearest(arguments.method, METHODS)}; methods: {', '.join(METHODS)}"
        raise InputError(f"config argument method: no demo of '{arguments.method}'{known}")
    config = thaw(Config(title="demo" if arguments.method == "move_kd" else f"demo_{arguments.method}"))
    config.student.update(image_size=64, patch_size=8, width=192, layers=4, heads=3, mlp_width=768)
    config.student.feature = "layers/-1"
    config.data.flip = True
    config.features.experts = ("clip", "efficientnet_lite0", "hed:112", "pp_ocr_det:160")
    config.optim.update(lr=2e-3, warmup=0.1, weight_decay=0.05)
    config.train.update(steps=400, batch=128, seed=arguments.seed, dtype="float32", log_every=10, checkpoint_every=100)
    METHODS[arguments.method](config)
    if arguments.smoke:
        config.data.limit = 48
        config.train.update(steps=4, batch=8, log_every=1, checkpoint_every=2)
        config.student.update(width=32, layers=2, heads=2, mlp_width=64)
    return config
