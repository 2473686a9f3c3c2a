"""MoVE-KD at the paper's size: CLIP ViT-L/14 at 336 pixels, MoLE of three experts of rank 32, Vicuna reading its tokens."""

from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw
from tove_jax.config.stages import llava_stage, smoke
from tove_jax.errors import InputError, nearest
from tove_jax.methods.presets import apply

TEACHERS = {
    "v1_0": ("clip", "eva02_l", "convnext_xxl"),
    "v1_1": ("clip", "sam_l", "eva02_l", "convnext_xxl"),
}


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``teachers=v1_0`` or ``v1_1``, ``stage=1`` or ``2``, ``preset``, ``language``, ``seed=N`` and ``smoke``.

    Stage 1 trains projector, adapters, routers and encoder adapters on 558K captions, stage 2 everything on 665K
    conversations, from the run that ``--config.train.start_from`` names. ``language`` is ``7b``, ``13b``, or ``none``
    to distil features alone. ``preset`` is ``paper``, ``reference`` or ``recommended``.
    ``smoke`` is a tiny student with stand-ins for the teachers and a tiny language model, seconds long.
    """
    arguments = parse_arguments(arg, teachers="v1_0", stage=1, preset="paper", language="7b", seed=42, smoke=False)
    if arguments.teachers not in TEACHERS:
        known = f"{nearest(arguments.teachers, TEACHERS)}; sets: {', '.join(TEACHERS)}"
        raise InputError(f"config argument teachers: no set '{arguments.teachers}'{known}")
    config = thaw(Config(title=f"move_kd_vit_l_{arguments.teachers}_stage{arguments.stage}"))
    apply(config, arguments.preset)
    config.features.experts = TEACHERS[arguments.teachers]
    config.student.update(initialize="openai/clip-vit-large-patch14-336", remat="dots")
    # The published views show different parts of a picture, so tokens of one place are compared with another's.
    config.features.views = "student" if arguments.preset == "recommended" else "published"
    llava_stage(config, arguments.stage, arguments.language)
    config.train.seed = arguments.seed
    if arguments.smoke:
        smoke(config)
    return config
