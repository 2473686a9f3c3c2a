"""HAWAII at the paper's size: CLIP ViT-L/14 at 336 pixels, MoLA of rank 32, features alone."""

from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw
from tove_jax.config.schema import HawaiiConfig
from tove_jax.errors import InputError, nearest
from tove_jax.methods.presets import apply

BASE = ("clip", "convnext_xxl", "eva02_l")
TEACHERS = {"base": BASE, "dagger": (*BASE, "pix2struct_l"), "double_dagger": (*BASE, "sam_l")}
# Of the experts that are at hand everywhere, as many as there are teachers.
SMOKE = ("clip", "efficientnet_lite0", "hed:112", "pp_ocr_det:160")


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``teachers=base`` (or ``dagger``, ``double_dagger``), ``stage=1`` or ``2``, ``seed=N`` and ``smoke``.

    Stage 1 trains adapters, routers and heads on 558K pictures, stage 2 everything on 665K; learning rates
    and batches are LLaVA-1.5's. ``smoke`` is a tiny student with stand-ins for the teachers, seconds long.
    """
    arguments = parse_arguments(arg, teachers="base", stage=1, seed=42, smoke=False)
    if arguments.teachers not in TEACHERS:
        known = f"{nearest(arguments.teachers, TEACHERS)}; sets: {', '.join(TEACHERS)}"
        raise InputError(f"config argument teachers: no set '{arguments.teachers}'{known}")
    if arguments.stage not in (1, 2):
        raise InputError(f"config argument stage: expected 1 or 2, found {arguments.stage}")
    config = thaw(Config(title=f"hawaii_vit_l_{arguments.teachers}_stage{arguments.stage}"))
    config.method = thaw(HawaiiConfig())
    apply(config, "paper")
    config.features.experts = TEACHERS[arguments.teachers]
    config.student.update(initialize="openai/clip-vit-large-patch14-336", remat="dots")
    config.data.update(source="llava")
    config.train.update(seed=arguments.seed)
    if arguments.stage == 1:
        config.train.update(steps=558_128 // 256, batch=256)
    else:
        config.optim.update(lr=2e-5, groups=((".*", 1.0),))
        config.train.update(steps=665_298 // 128, batch=128)
    if arguments.smoke:
        config.features.experts = SMOKE[: len(config.features.experts)]
        config.data.update(source="openmoji", limit=48)
        config.student.update(initialize="", image_size=64, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
        config.student.feature = "layers/-1"
        config.student.adapter.update(rank=4, alpha=4.0, router_width=16)
        config.train.update(steps=4, batch=8, dtype="float32", log_every=1, checkpoint_every=2)
    return config
