"""LLaVA-1.5 whose vision tower has LoRA experts in its MLPs (MoLA), for transformers 5; `LlavaProcessor` serves it."""

from transformers import AutoModel, LlavaForConditionalGeneration

from .configuration_mola_llava import MolaLlavaConfig
from .modeling_mola_clip import MolaCLIPVisionModel


class MolaLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`transformers.LlavaForConditionalGeneration` with that tower; same inputs, same outputs, same generation."""

    config_class = MolaLlavaConfig
    config: MolaLlavaConfig

    def __init__(self, config: MolaLlavaConfig):
        # The configuration may come from another copy of this folder's code than the model, so its own class counts.
        AutoModel.register(type(config.vision_config), MolaCLIPVisionModel, exist_ok=True)
        super().__init__(config)
