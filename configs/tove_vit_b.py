"""ToVE's transfer phase at the paper's size: CLIP ViT-B/16, five experts, RoBERTa made causal reading the tokens.

DPT's depth, NLL-AngMF's surface normals and DexiNed's edges are maps; DINOv2 and EVA-02-CLIP give tokens.
"""

from ml_collections import ConfigDict

from tove_jax.config import Config, parse_arguments, thaw
from tove_jax.config.schema import ToVEConfig
from tove_jax.errors import InputError, nearest
from tove_jax.methods.presets import apply

# Picture size, pixels; peak learning rate; batch; epochs; template. Ours, after the recipe of the work ToVE builds on.
STAGES = {
    "pretrain": (224, 3e-4, 1024, 20, "caption"),
    "caption": (480, 5e-5, 256, 3, "caption"),
    "vqa": (480, 5e-5, 512, 10, "vqa"),
}
WARMUP = 2000


def get_config(arg: str = "") -> ConfigDict:
    """Takes ``stage=pretrain``, ``caption`` or ``vqa``, ``preset=paper`` or ``recommended``, ``language``, ``pictures=N``.

    Pre-training teaches gate, projector and stems, and what RoBERTa has beside its own blocks (cross-attention,
    adaptors, head), on captioned pictures; the other stages train the language model too, from the run that
    ``--config.train.start_from`` names. ``language`` is ``roberta``, or ``none`` for a small caption head in its
    place. ``pictures`` are those of an epoch.
    """
    arguments = parse_arguments(arg, stage="pretrain", preset="paper", language="roberta", pictures=4_000_000)
    for name, known in (("stage", tuple(STAGES)), ("language", ("roberta", "none"))):
        found = arguments[name]
        if found not in known:
            raise InputError(
                f"config argument {name}: expected {', '.join(known)}, found '{found}'{nearest(found, known)}"
            )
    size, rate, batch, epochs, template = STAGES[arguments.stage]
    config = thaw(Config(title=f"tove_vit_b_{arguments.stage}"))
    config.student.update(initialize="openai/clip-vit-base-patch16", image_size=size, patch_size=16)
    config.student.update(width=768, layers=12, heads=12, mlp_width=3072, feature="layers/-1")
    config.method = thaw(ToVEConfig())
    apply(config, arguments.preset)
    config.method.map_experts = ("depth", "normals", "edges")
    config.features.experts = ("depth", "normals", "edges", "dinov2_b", "eva02_clip_b")
    config.mesh.update(data=-1, fsdp=-1, tensor=-1)
    config.data.update(source="webdataset", path="shards/*.tar")
    steps = max(1, epochs * arguments.pictures // batch)
    config.train.update(steps=steps, batch=batch)
    config.optim.update(lr=rate, weight_decay=0.05, warmup=min(0.5, WARMUP / steps))
    if arguments.language == "roberta":
        # RoBERTa is under the MIT licence.
        config.language.update(kind="tove", initialize="FacebookAI/roberta-base", vocabulary=50265, label_smoothing=0.1)
        config.language.update(width=768, layers=12, heads=12, mlp_width=3072, adaptor_width=384)
        config.text.update(template=template, limit=48, buckets=(24, 48))
        config.method.text_weight = 0.0
    frozen = () if arguments.stage == "pretrain" else (("language/.*", 1.0),)
    config.optim.groups = (("student/.*", None), *frozen, *Config().optim.groups)
    return config
