"""The ConvNeXt experts: ImageNet's, ConvNeXt-V2's, and the image tower of OpenCLIP's ConvNeXt-XXL."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from tove_jax.data.view import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, View
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.rules import Rule
from tove_jax.models.convnext import ConvNeXt

STRIDE = 32
STAGES = 4
PAPER = "Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv:2201.03545"
PAPER_V2 = (
    "Woo et al., ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders, CVPR 2023, arXiv:2301.00808"
)
PAPER_CLIP = (
    "Cherti et al., Reproducible scaling laws for contrastive language-image learning, CVPR 2023, arXiv:2212.07143"
)
# So the authors' repository and timm say; a copy's card may name another.
LICENCE_V2 = "CC-BY-NC-4.0"

_CONV = (2, 3, 1, 0)  # OIHW -> HWIO
_CONVS = (0, 3, 4, 2, 1)  # the same, stacked
_MATRIX = (0, 2, 1)


class Names(NamedTuple):
    """How one implementation calls the parts; ``{stage}`` is filled in, ``{layer}`` is the stacked axis."""

    stem: str
    stem_norm: str
    downsample_norm: str
    downsample: str
    block: str
    depthwise: str
    norm: str
    fc1: str
    response_norm: str
    fc2: str
    layer_scale: str
    final_norm: str


TRANSFORMERS = Names(
    stem="embeddings.patch_embeddings",
    stem_norm="embeddings.layernorm",
    downsample_norm="encoder.stages.{stage}.downsampling_layer.0",
    downsample="encoder.stages.{stage}.downsampling_layer.1",
    block="encoder.stages.{stage}.layers.{layer}.",
    depthwise="dwconv",
    norm="layernorm",
    fc1="pwconv1",
    response_norm="grn",
    fc2="pwconv2",
    layer_scale="layer_scale_parameter",
    final_norm="layernorm",
)
TIMM = Names(
    stem="stem.0",
    stem_norm="stem.1",
    downsample_norm="stages.{stage}.downsample.0",
    downsample="stages.{stage}.downsample.1",
    block="stages.{stage}.blocks.{layer}.",
    depthwise="conv_dw",
    norm="norm",
    fc1="mlp.fc1",
    response_norm="mlp.grn",
    fc2="mlp.fc2",
    layer_scale="gamma",
    final_norm="head.norm",
)


def rules(names: Names, lead: int) -> tuple[Rule, ...]:
    """Returns the table of both versions of ConvNeXt under the names of one implementation.

    Args:
      names: see `Names`.
      lead: leading axes of length 1 that this implementation gives the response norm.
    """

    def both(name: str, path: str, kind: str, axes: tuple[int, ...] | None = None) -> list[Rule]:
        return [Rule(f"{name}.weight", f"{path}/{kind}", axes), Rule(f"{name}.bias", f"{path}/bias")]

    found = both(names.stem, "stem", "kernel", _CONV) + both(names.stem_norm, "stem_norm", "scale")
    for stage in range(STAGES):

        def at(name: str, stage: int = stage) -> str:
            return name.replace("{stage}", str(stage))

        if stage:
            found += both(at(names.downsample_norm), f"downsample{stage}_norm", "scale")
            found += both(at(names.downsample), f"downsample{stage}", "kernel", _CONV)
        block, path = at(names.block), f"stage{stage}"
        found += both(block + names.depthwise, f"{path}/depthwise", "kernel", _CONVS)
        found += both(block + names.norm, f"{path}/norm", "scale")
        found += both(block + names.fc1, f"{path}/fc1", "kernel", _MATRIX)
        found += both(block + names.fc2, f"{path}/fc2", "kernel", _MATRIX)
        for kind, leaf in (("weight", "scale"), ("bias", "bias")):
            found.append(Rule(f"{block}{names.response_norm}.{kind}", f"{path}/response_norm/{leaf}", lead=lead))
        found.append(Rule(block + names.layer_scale, f"{path}/layer_scale"))
    return (*found, *both(names.final_norm, "norm", "scale"))


RULES = rules(TRANSFORMERS, lead=3)
TIMM_RULES = rules(TIMM, lead=0)


def without_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cuts the prefix of a classifier or a CLIP model, where there is one, from the names of the backbone."""
    return {re.sub(r"^(convnext(v2)?\.|visual\.trunk\.)", "", name): array for name, array in arrays.items()}


def features(module: nn.Module, params: Any, pixels: jax.Array) -> ExpertFeatures:
    """Returns the last stage's map (B, S/32, S/32, D) before norm and pooling, and the normed mean (B, D)."""
    patches, found = module.apply({"params": params}, pixels, intermediates=("pooled",))
    return ExpertFeatures(patches=patches, summary=found["pooled"])


def _row(
    name: str,
    title: str,
    hub: str,
    depths: tuple[int, ...],
    width: int,
    parameters: int,
    *,
    second: bool = False,
) -> Published:
    """One row of transformers' ConvNextModel or ConvNextV2Model; widths double from stage to stage."""
    module = ConvNeXt(tuple(width * 2**stage for stage in range(STAGES)), depths, response_norm=second)
    return Published(
        card=ExpertCard(
            name=name,
            title=title,
            paper=PAPER_V2 if second else PAPER,
            weights=hub,
            licence=LICENCE_V2 if second else "Apache-2.0",
            view=View(224, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=256),
            grid=(7, 7),
            width=module.widths[-1],
            summary_width=module.widths[-1],
            checked_against="transformers' ConvNextV2Model" if second else "transformers' ConvNextModel",
            parameters=parameters,
        ),
        build=lambda size: module,
        rules=RULES,
        features=features,
        ignore=(r"classifier\.(weight|bias)",),
        canonical=without_prefix,
        multiple=STRIDE,
    )


XXL = ConvNeXt((384, 768, 1536, 3072), (3, 4, 30, 3), norm_epsilon=1e-5, final_epsilon=1e-5)

ROWS: tuple[Published, ...] = (
    *(
        _row(f"convnext_{size.lower()}", f"ConvNeXt-{size} ({data})", hub, depths, width, count)
        for size, data, hub, depths, width, count in (
            ("T", "ImageNet-1k", "facebook/convnext-tiny-224", (3, 3, 9, 3), 96, 27_820_128),
            ("S", "ImageNet-1k", "facebook/convnext-small-224", (3, 3, 27, 3), 96, 49_454_688),
            ("B", "ImageNet-22k", "facebook/convnext-base-224-22k", (3, 3, 27, 3), 128, 87_566_464),
            ("L", "ImageNet-22k", "facebook/convnext-large-224-22k", (3, 3, 27, 3), 192, 196_230_336),
            ("XL", "ImageNet-22k", "facebook/convnext-xlarge-224-22k", (3, 3, 27, 3), 256, 348_147_968),
        )
    ),
    Published(
        card=ExpertCard(
            name="convnext_xxl",
            title="OpenCLIP ConvNeXt-XXL (LAION-2B, soup)",
            paper=f"{PAPER}; trained as in {PAPER_CLIP}",
            weights="laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
            licence="MIT",
            # Trained at 256 px; MoVE-KD and HAWAII run it at 1024 px.
            view=View(1024, mean=CLIP_MEAN, std=CLIP_STD),
            grid=(32, 32),
            width=3072,
            summary_width=3072,
            checked_against="timm's convnext_xxlarge",
            parameters=843_398_016,
        ),
        build=lambda size: XXL,
        rules=TIMM_RULES,
        features=features,
        # The projection to CLIP's joint space, and the text tower beside it.
        ignore=(
            r"(visual\.)?head\.(proj|fc)\..*",
            r"(text\.)?(transformer|token_embedding|ln_final)\..*",
            r"(text\.)?(positional_embedding|text_projection|attn_mask)",
            r"logit_(scale|bias)",
        ),
        canonical=without_prefix,
        multiple=STRIDE,
        file="open_clip_pytorch_model.bin",
    ),
    *(
        _row(f"convnextv2_{size.lower()}", f"ConvNeXt-V2-{size} ({data})", hub, depths, width, count, second=True)
        for size, data, hub, depths, width, count in (
            ("A", "ImageNet-1k", "facebook/convnextv2-atto-1k-224", (2, 2, 6, 2), 40, 3_387_400),
            ("F", "ImageNet-1k", "facebook/convnextv2-femto-1k-224", (2, 2, 6, 2), 48, 4_848_240),
            ("P", "ImageNet-1k", "facebook/convnextv2-pico-1k-224", (2, 2, 6, 2), 64, 8_553_280),
            ("N", "ImageNet-22k", "facebook/convnextv2-nano-22k-224", (2, 2, 8, 2), 80, 14_982_800),
            ("T", "ImageNet-22k", "facebook/convnextv2-tiny-22k-224", (3, 3, 9, 3), 96, 27_866_496),
            ("B", "ImageNet-22k", "facebook/convnextv2-base-22k-224", (3, 3, 27, 3), 128, 87_692_800),
            ("L", "ImageNet-22k", "facebook/convnextv2-large-22k-224", (3, 3, 27, 3), 192, 196_419_840),
            ("H", "ImageNet-1k", "facebook/convnextv2-huge-1k-224", (3, 3, 27, 3), 352, 657_472_640),
        )
    ),
)
