"""`make demo`: a small CLIP-style student that starts from nothing and learns from real experts.

Two cores, a few minutes. Everything trains, since there is no pretrained start to keep.
"""


from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``method=move_kd``, ``seed=N`` and ``smoke`` (seconds, for tests)."""
    arguments = parse_arguments(arg, method="move_kd", seed=42, smoke=False)
    config = thaw(Config(title="demo"))
    config.student.update(image_size=64, patch_size=8, width=192, layers=4, heads=3, mlp_width=768)
    config.student.feature = "layers/-1"
    config.student.adapter.rank = 8
    config.data.flip = True
    config.features.experts = ("clip", "efficientnet_lite0", "hed:112", "pp_ocr_det:160")
    config.optim.update(lr=2e-3, warmup=0.1, weight_decay=0.05, groups=((".*", 1.0),))
    config.train.update(steps=400, batch=128, seed=arguments.seed, dtype="float32", log_every=10, checkpoint_every=100)
    if arguments.smoke:
        config.data.limit = 48
        config.train.update(steps=4, batch=8, log_every=1, checkpoint_every=2)
        config.student.update(width=32, layers=2, heads=2, mlp_width=64)
    return config
