"""`make demo-vlm`: a small language model from nothing reads a small encoder's tokens and answers about drawings.

Five runs that differ in the encoder alone, each with the same conversations, steps and language model:

    start      the random start of `make demo`, frozen
    distilled  the encoder of `make demo`, frozen
    text       the start, trained by the text loss
    both       the start, trained by the text loss and MoVE-KD's distillation
    stages     the encoder of `make demo`, trained further by both, as MoVE-KD's second stage follows its first
"""

from pathlib import Path

from ml_collections import ConfigDict

from tove_jax.config import parse_arguments
from tove_jax.config.sweep import settings_of
from tove_jax.errors import InputError, nearest

DEMO = Path(__file__).parent / "demo.py"
LANGUAGE = (("language/.*", 1.0),)
FROZEN, TRAINED = ((".*", None),), (("method/.*", None), ("student/.*", 1.0))
ENCODERS = {"start": FROZEN, "distilled": FROZEN, "text": TRAINED, "both": TRAINED, "stages": TRAINED}
DISTILLING = ("both", "stages")


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``encoder``, ``seed=N`` and ``smoke`` (seconds, for tests).

    ``distilled`` and ``stages`` begin with the run that ``--config.train.start_from`` names.
    """
    arguments = parse_arguments(arg, encoder="both", seed=42, smoke=False)
    if arguments.encoder not in ENCODERS:
        known = f"{nearest(arguments.encoder, ENCODERS)}; encoders: {', '.join(ENCODERS)}"
        raise InputError(f"config argument encoder: no encoder '{arguments.encoder}'{known}")
    config: ConfigDict = settings_of(DEMO, f"seed={arguments.seed}" + (",smoke" if arguments.smoke else ""))
    config.title = f"demo_vlm_{arguments.encoder}"
    config.data.source = "openmoji_questions"
    config.text.update(template="mistral_instruct", limit=136, buckets=(136,))
    config.language.update(kind="llava", vocabulary=512, width=128, layers=3, heads=4, kv_heads=4, mlp_width=384)
    config.optim.groups = LANGUAGE + ENCODERS[arguments.encoder]
    if arguments.encoder not in DISTILLING:
        config.method.update(kd_weight=0.0, balance_weight=0.0)
    config.optim.lr = 1e-3
    config.train.update(steps=400, batch=32)
    if arguments.smoke:
        config.language.update(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64)
        config.train.update(steps=4, batch=8, log_every=1, checkpoint_every=2)
    return config
