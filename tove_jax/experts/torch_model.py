"""A torch model as an expert, for extraction: ``torch:package.module:callable`` or ``torch:<HF folder or hub id>``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tove_jax.config.specs import ForeignSpec
from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import foreign
from tove_jax.experts.base import Expert
from tove_jax.experts.foreign import Settings
from tove_jax.experts.function import source_hash
from tove_jax.files.weights import hash_arrays
from tove_jax.hf.load import locate, read_json

# Where models of pictures and texts keep the part that sees.
_TOWERS = ("vision_model", "vision_encoder", "vision_tower")
# A head over CLS that many checkpoints lack: it is then random, and left out.
_POOLER = "pooler."


def load(spec: ForeignSpec, *, weights: Path | None = None, size: int | None = None, dtype: str = "float32") -> Expert:
    """Loads a torch model, on a GPU that torch knows or else the CPU.

    A callable ``package.module:callable`` is called without arguments and returns a `torch.nn.Module` or a
    function. That takes float32 (B, 3, S, S), normalised by the view, and returns what
    `tove_jax.experts.foreign.to_features` takes: tokens (B, N, D), a map (B, D, H, W), or a dict with ``patches``
    and perhaps ``summary``. The callable carries its settings, see `tove_jax.experts.function.expert`. The hash is
    of the module's state dict, or for a function of the file that defines the callable.

    A folder or hub id is opened by transformers' `AutoModel`; code that it brings along is never run. Patches are
    the last hidden state without the tokens before the patches, the summary is the pooler's output, or CLS where
    the checkpoint has no pooler. The view is read from preprocessor_config.json. The hash is of the state dict.

    Args:
      spec: with callable, folder or hub id as source.
      weights: another folder; not for a callable.
      size: pixels a side, where it is not the model's own.
      dtype: in which a module computes.

    Raises:
      InputError: torch is not installed; no such model, or one whose weights are not all there; a view that
        cannot be expressed; outputs of another kind.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"expert {spec.name}: {spec.origin} needs torch, which is not installed; run `pip install tove_jax[torch]`"
        ) from error
    kinds = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in kinds:
        raise InputError(f"expert {spec.name}: dtype: expected {', '.join(kinds)}, found {dtype!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in spec.source:
        if weights is not None:
            raise InputError(f"expert {spec.name}: a callable takes no weights, found {weights}")
        model, settings, digest = _from_callable(spec, size)
    else:
        model, settings, digest = _from_folder(spec, weights, size)
    module = hasattr(model, "to")
    if module:
        model = model.to(device=device, dtype=kinds[dtype])

    def run(pixels: np.ndarray) -> Any:
        inputs = torch.from_numpy(pixels)
        inputs = inputs.to(device=device, dtype=kinds[dtype] if module else torch.float32)
        with torch.inference_mode():
            return _arrays(model(inputs))

    return foreign.make_expert(spec, settings, run, digest)


def _arrays(values: Any) -> Any:
    """Returns the same with NumPy arrays in place of tensors."""
    if hasattr(values, "detach"):
        return values.detach().float().cpu().numpy()
    return {name: _arrays(value) for name, value in values.items()} if isinstance(values, dict) else values


def _hash(module: Any) -> str:
    """Returns the hash of a module's state dict, bit for bit also for dtypes that NumPy lacks."""
    import torch

    arrays = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        arrays[name] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return hash_arrays(arrays)


def _from_callable(spec: ForeignSpec, size: int | None) -> tuple[Any, Settings, str]:
    import torch

    make = foreign.import_callable(spec.source, spec.name)
    settings = foreign.settings_of(make, spec.name).sized(size)
    model = make()
    if isinstance(model, torch.nn.Module):
        return model.eval(), settings, _hash(model)
    if not callable(model):
        raise InputError(
            f"expert {spec.name}: {spec.source}: expected it to return a torch.nn.Module or a function, "
            f"found {type(model).__name__}"
        )
    return model, settings, source_hash(make, spec.name)


def _from_folder(spec: ForeignSpec, weights: Path | None, size: int | None) -> tuple[Any, Settings, str]:
    import torch
    from transformers import AutoModel

    try:
        folder = locate(weights or spec.source)
    except InputError as error:
        raise InputError(f"expert {spec.name}: {error}; or package.module:callable") from error
    try:
        whole, told = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder}: expected a checkpoint of transformers' AutoModel: {reason}") from error
    tower = next((name for name in _TOWERS if hasattr(whole, name)), None)
    model = getattr(whole, tower) if tower else whole
    inside = f"{tower}." if tower else ""
    missing = {name.removeprefix(inside) for name in told["missing_keys"] if name.startswith(inside)}
    others = sorted(name for name in missing if not name.startswith(_POOLER))
    if others or told["mismatched_keys"]:
        names = ", ".join(others[:5] or map(str, list(told["mismatched_keys"])[:5]))
        raise InputError(f"{folder}: the checkpoint lacks weights of {type(model).__name__}, or has others: {names}")
    model = model.eval()
    if missing and hasattr(model, "pooler"):
        model.pooler = None
    settings = _settings_of_folder(folder, spec).sized(size)
    return _Encoder(model, settings.view.size, str(folder)), settings, _hash(model)


def _settings_of_folder(folder: Path, spec: ForeignSpec) -> Settings:
    path = folder / "preprocessor_config.json"
    values = read_json(path)
    edge = values["size"].get("shortest_edge") if isinstance(values.get("size"), dict) else None
    if "crop_pct" in values and edge is not None:
        # ConvNeXt's processor: scaled to edge / crop_pct and cut, or from 384 pixels on squashed.
        if edge < 384:
            values = {**values, "size": {"shortest_edge": int(edge / (values["crop_pct"] or 224 / 256))}}
            values |= {"crop_size": {"height": edge, "width": edge}, "do_center_crop": True}
        else:
            values = {**values, "size": {"height": edge, "width": edge}}
    view = View.from_preprocessor(values, str(path))
    return Settings(view, title=f"{spec.source} (transformers)")


class _Encoder:
    """A transformers model as a function to patches and summary."""

    def __init__(self, model: Any, size: int, where: str) -> None:
        self.model, self.where = model, where
        patch, registers = getattr(model.config, "patch_size", None), getattr(model.config, "num_register_tokens", 0)
        self.cells = (size // patch) ** 2 if isinstance(patch, int) else None
        self.prefixes = [(registers or 0) + heads for heads in (0, 1, 2)]

    def to(self, **where: Any) -> _Encoder:
        self.model = self.model.to(**where)
        return self

    def __call__(self, pixels: Any) -> dict[str, Any]:
        found = self.model(pixel_values=pixels)
        hidden, pooled = found.last_hidden_state, getattr(found, "pooler_output", None)
        if hidden.ndim == 3:
            if self.cells is None or hidden.shape[1] - self.cells not in self.prefixes:
                expected = "a patch_size" if self.cells is None else f"{self.cells} patches and at most a few before"
                raise InputError(f"{self.where}: expected {expected} of the model, found {hidden.shape[1]} tokens")
            prefix = hidden.shape[1] - self.cells
            pooled = hidden[:, 0] if pooled is None and prefix else pooled
            hidden = hidden[:, prefix:]
        result = {"patches": hidden}
        if pooled is not None:
            result["summary"] = pooled.reshape(len(pooled), -1)
        return result
