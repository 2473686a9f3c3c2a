"""Configuration of a CLIP vision tower with LoRA experts in its MLPs."""

from transformers import CLIPVisionConfig


class MoleCLIPVisionConfig(CLIPVisionConfig):
    """CLIP's vision configuration and the settings of the LoRA experts.

    Args:
      adapter: ``experts`` E, ``rank`` r, ``alpha`` (the scale is alpha / rank), ``dropout`` before A
        while training, ``routing`` (``top1`` or ``dense``) and ``site`` (``linears``: experts beside
        both linears of the MLP; ``ffn``: one set beside the whole MLP). Other keys are kept.
      **kwargs: fields of `transformers.CLIPVisionConfig`.
    """

    model_type = "mole_clip_vision_model"

    def __init__(self, adapter: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        defaults = {"experts": 3, "rank": 32, "alpha": 1.0, "dropout": 0.05, "routing": "top1", "site": "linears"}
        self.adapter = {**defaults, **(adapter or {})}
