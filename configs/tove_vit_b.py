"""ToVE's transfer phase at the paper's size: CLIP ViT-B/16 at 224, five experts, on a captioned folder.

DPT's depth, NLL-AngMF's surface normals and DexiNed's edges are maps; DINOv2 and EVA-02-CLIP give tokens.
"""

from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw
from tove_jax.config.schema import ToVEConfig
from tove_jax.methods.presets import apply


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``preset=paper`` or ``recommended``, and ``pictures=N``, the training pictures of an epoch."""
    arguments = parse_arguments(arg, preset="paper", pictures=4_000_000)
    config = thaw(Config(title="tove_vit_b"))
    config.student.update(initialize="openai/clip-vit-base-patch16", image_size=224, patch_size=16)
    config.student.update(width=768, layers=12, heads=12, mlp_width=3072, feature="layers/-1")
    config.method = thaw(ToVEConfig())
    apply(config, arguments.preset)
    config.method.map_experts = ("depth", "normals", "edges")
    config.features.experts = ("depth", "normals", "edges", "dinov2_b", "eva02_clip_b")
    config.data.update(source="webdataset", path="shards/*.tar")
    # 20 epochs at batch 1024, 2,000 of the steps to warm up; ours, after the recipe of the work ToVE builds on.
    steps = max(1, 20 * arguments.pictures // 1024)
    config.train.update(steps=steps, batch=1024)
    config.optim.update(lr=3e-4, weight_decay=0.05, warmup=min(0.5, 2000 / steps))
    config.optim.groups = (("student/.*", None), ("method/.*", 1.0))
    return config
