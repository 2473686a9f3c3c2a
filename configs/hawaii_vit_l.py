"""HAWAII at the paper's size: CLIP ViT-L/14 at 336 pixels, MoLA of rank 32, Vicuna reading its tokens."""

from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw
from tove_jax.config.schema import HawaiiConfig
from tove_jax.config.stages import llava_stage, smoke
from tove_jax.errors import InputError, nearest
from tove_jax.methods.presets import apply

BASE = ("clip", "convnext_xxl", "eva02_l")
TEACHERS = {"base": BASE, "dagger": (*BASE, "pix2struct_l"), "double_dagger": (*BASE, "sam_l")}


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``teachers=base`` (or ``dagger``, ``double_dagger``), ``stage=1`` or ``2``, ``language``, ``seed=N`` and
    ``smoke``.

    Stage 1 trains projector, adapters, routers and heads on 558K captions, stage 2 everything on 665K conversations,
    whose questions the scores read, from the run that ``--config.train.start_from`` names; learning rates and batches
    are LLaVA-1.5's. ``language`` is ``7b``, ``13b``, or ``none`` to distil features alone. ``smoke`` is a tiny student
    with stand-ins for the teachers and a tiny language model, seconds long.
    """
    arguments = parse_arguments(arg, teachers="base", stage=1, language="7b", seed=42, smoke=False)
    if arguments.teachers not in TEACHERS:
        known = f"{nearest(arguments.teachers, TEACHERS)}; sets: {', '.join(TEACHERS)}"
        raise InputError(f"config argument teachers: no set '{arguments.teachers}'{known}")
    config = thaw(Config(title=f"hawaii_vit_l_{arguments.teachers}_stage{arguments.stage}"))
    config.method = thaw(HawaiiConfig())
    apply(config, "paper")
    config.features.experts = TEACHERS[arguments.teachers]
    config.student.update(initialize="openai/clip-vit-large-patch14-336", remat="dots")
    llava_stage(config, arguments.stage, arguments.language)
    config.train.seed = arguments.seed
    if arguments.smoke:
        smoke(config, alpha=4.0, router_width=16)
    return config
