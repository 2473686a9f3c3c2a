"""LLaVA-1.5 whose vision tower has LoRA experts in its MLPs (MoLE), for transformers 5; `LlavaProcessor` serves it."""

from transformers import AutoModel, LlavaForConditionalGeneration

from .configuration_mole_llava import MoleLlavaConfig
from .modeling_mole_clip import MoleCLIPVisionModel


class MoleLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`transformers.LlavaForConditionalGeneration` with that tower; same inputs, same outputs, same generation."""

    config_class = MoleLlavaConfig
    config: MoleLlavaConfig

    def __init__(self, config: MoleLlavaConfig):
        # The configuration may come from another copy of this folder's code than the model, so its own class counts.
        AutoModel.register(type(config.vision_config), MoleCLIPVisionModel, exist_ok=True)
        super().__init__(config)
