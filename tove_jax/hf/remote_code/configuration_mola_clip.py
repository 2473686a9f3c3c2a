"""Configuration of a CLIP vision tower with two groups of LoRA experts in its MLPs."""

from transformers import CLIPVisionConfig


class MolaCLIPVisionConfig(CLIPVisionConfig):
    """CLIP's vision configuration and the settings of the LoRA experts.

    Args:
      adapter: ``teacher_experts`` and ``general_experts``, the size of each group; ``rank`` r, ``alpha`` (the
        scale is alpha / rank), ``dropout`` before A while training, ``router_width``, ``dora``, and ``site``
        (``linears``: experts beside both linears of the MLP; ``ffn``: beside the whole MLP). Other keys
        are kept.
      **kwargs: fields of `transformers.CLIPVisionConfig`.
    """

    model_type = "mola_clip_vision_model"

    def __init__(self, adapter: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        groups = {"teacher_experts": 3, "general_experts": 3, "router_width": 256}
        defaults = {"rank": 32, "alpha": 32.0, "dropout": 0.05, "site": "linears", "dora": False}
        self.adapter = {**groups, **defaults, **(adapter or {})}
