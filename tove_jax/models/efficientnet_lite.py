"""EfficientNet-Lite0 with its classifier, for inference."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from tove_jax.models import efficientnet
from tove_jax.models.efficientnet import Depthwise, EfficientNet

HEAD_WIDTH = 1280

LOGICAL_AXES = (
    *((r"(.*/)?trunk/" + pattern.removeprefix("(.*/)?"), axes) for pattern, axes in efficientnet.LOGICAL_AXES),
    (r"(.*/)?classifier/kernel", ("embed", None)),
    (r"(.*/)?classifier/bias", (None,)),
)


class EfficientNetLite0(nn.Module):
    """The network, batch norms folded: the trunk without squeeze-and-excitation and with ReLU6.

    Attributes:
      classes: width of the classifier.
      depthwise: how depthwise convolutions run, see `tove_jax.models.efficientnet.DepthwiseConvolution`.
    """

    classes: int = 1000
    depthwise: Depthwise = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          images: float (B, S, S, 3), normalised; S a multiple of 32.

        Returns:
          logits (B, classes) and ``{"map": (B, S/32, S/32, 1280) after the last convolution,
          "pooled": (B, 1280) its mean over space}``.
        """
        trunk = EfficientNet(
            head_width=HEAD_WIDTH, squeeze=0, activation="relu6", depthwise=self.depthwise, name="trunk"
        )
        x = jax.nn.relu6(trunk(images)[0])
        pooled = x.mean((1, 2))
        logits = nn.Dense(self.classes, name="classifier")(pooled)
        return logits, {"map": x, "pooled": pooled}
