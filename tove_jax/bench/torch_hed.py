"""Features of the expert `hed` in torch, for the other side of the benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np


def hed_features(params: Any, normalized: np.ndarray) -> tuple[Any, np.ndarray]:
    """Returns what computes, in torch, the features of the expert `hed`: VGG16 as far as conv5_3.

    Args:
      params: of the expert, NumPy.
      normalized: float32 (B, size, size, 3), as its view normalises.

    Returns:
      A function of nothing that returns when it is done, and its result (B, size/16, size/16, 512) as NumPy.
    """
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = []
    for name in sorted(name for name in params if name.startswith("conv")):
        kernel, bias = (np.asarray(params[name][part]) for part in ("kernel", "bias"))
        weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy(), device=device)
        layers.append((name, weight, torch.tensor(bias, device=device)))
    pixels = torch.tensor(normalized.transpose(0, 3, 1, 2).copy(), device=device)

    def run() -> Any:
        x = pixels
        with torch.no_grad():
            for name, weight, bias in layers:
                if name.endswith("_1") and name != "conv1_1":
                    x = functional.max_pool2d(x, 2)
                x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return x

    return run, run().permute(0, 2, 3, 1).cpu().numpy()
