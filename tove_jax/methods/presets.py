"""Named settings of a method: what the paper prints, what its authors' code does, what we advise.

Each difference from the released code, which the schema's defaults follow, carries its reason here.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from tove_jax.config.schema import AdapterConfig, HawaiiConfig, MoveKDConfig, ToVEConfig
from tove_jax.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method's settings and those of the student's adapters."""

    method: MoveKDConfig | HawaiiConfig | ToVEConfig
    adapter: AdapterConfig


PAPER = Preset(
    MoveKDConfig(
        # W^tok is one softmax of scaled attention scores; the code takes a softmax of probabilities.
        token_weight_source="scores",
        # Both softmaxes are printed with 1/sqrt(d).
        teacher_score_scale="inverse_sqrt_width",
        # No second softmax is printed.
        saturation_rule=False,
        # The printed total is the text loss and 0.5 times the distillation loss.
        balance_weight=0.0,
    ),
    # One expert's output is added to that of the whole feed-forward network.
    AdapterConfig(site="ffn"),
)

REFERENCE = Preset(
    MoveKDConfig(
        # The code averages over the rows of one process, which drives one device.
        saturation_scope="device",
        # The released wrapper flattens SAM's channel-first map as if channels came last.
        sam_layout="scrambled",
    ),
    AdapterConfig(),
)

RECOMMENDED = Preset(
    MoveKDConfig(
        # A softmax over probabilities is nearly uniform (a patch with 0.3 of the attention gets 1.35
        # times the rest), so the second term would only double the first.
        token_weight_source="probs",
        # Unscaled products of 1024 channels make the softmax a hard choice.
        teacher_score_scale="inverse_sqrt_width",
        # With the scale there is little left to saturate, and the rule makes the loss jump.
        saturation_rule=False,
        # Otherwise encoder adapters can lower the loss by moving weight to the teacher that is easiest to match.
        stop_gradient_teacher_weight=True,
        # Pooled over layers, one layer's idle expert is excused by another layer's busy one.
        balance_pool="layer",
        # The features of a black picture teach nothing.
        kd_on_text_only=False,
    ),
    AdapterConfig(
        # Training starts from CLIP exactly, not from CLIP disturbed by random experts.
        b_init="zeros",
        # A balance loss alone can teach even load but not which token suits which expert.
        router_gradient="straight_through",
    ),
)

PRESETS: dict[str, Preset] = {"paper": PAPER, "reference": REFERENCE, "recommended": RECOMMENDED}

# No code is public. alpha = rank, so that an expert is added as printed, with weight one; B starts at zero, as is
# usual with LoRA; a balance loss alone cannot teach the content-dependent routing that the paper shows; the
# paper's DoRA row needs a weight matrix, so experts sit beside the linears and not beside the whole network.
MOLA = AdapterConfig(kind="mola", alpha=32.0, b_init="zeros", router_gradient="straight_through")

HAWAII_PAPER = Preset(HawaiiConfig(), MOLA)

HAWAII_RECOMMENDED = Preset(
    HawaiiConfig(
        # The heads train with the student and nothing else holds their outputs apart; CLIP's own tokens cannot collapse.
        clip_target="raw",
    ),
    MOLA,
)

HAWAII_PRESETS: dict[str, Preset] = {"paper": HAWAII_PAPER, "recommended": HAWAII_RECOMMENDED}

# The paper prints the residual, the gate and the shared second layer; nothing was released.
TOVE_PAPER = Preset(ToVEConfig(), AdapterConfig(kind="none"))

TOVE_RECOMMENDED = Preset(
    ToVEConfig(
        # Experts' features differ in scale by orders of magnitude; without a norm the loudest wins.
        norm="layer",
        # Training starts from CLIP exactly.
        zero_init=True,
    ),
    AdapterConfig(kind="none"),
)

TOVE_PRESETS: dict[str, Preset] = {"paper": TOVE_PAPER, "recommended": TOVE_RECOMMENDED}

BY_METHOD: dict[str, dict[str, Preset]] = {"move_kd": PRESETS, "hawaii": HAWAII_PRESETS, "tove": TOVE_PRESETS}


def apply(settings: ConfigDict, name: str) -> ConfigDict:
    """Writes a preset into ``settings.method`` and ``settings.student.adapter``.

    Args:
      settings: a whole run's, as `tove_jax.config.thaw` gives them; changed in place. Its method's name
        says whose presets are meant.
      name: ``paper``, ``reference`` (where the authors released code) or ``recommended``.

    Returns:
      The settings.

    Raises:
      InputError: no such preset.
    """
    presets = BY_METHOD.get(settings.method.name, {})
    if name not in presets:
        known = f"{nearest(name, presets)}; presets of {settings.method.name}: {', '.join(presets)}"
        raise InputError(f"no preset '{name}'{known}")
    preset = presets[name]
    settings.method.update(dataclasses.asdict(preset.method))
    settings.student.adapter.update(dataclasses.asdict(preset.adapter))
    return settings
