"""LLaVA-1.5 whose vision tower has LoRA experts in its MLPs (MoLE), for transformers 5; `LlavaProcessor` serves it."""

from transformers import AutoModel, LlavaForConditionalGeneration

from .configuration_mole_clip import MoleCLIPVisionConfig
from .configuration_mole_llava import MoleLlavaConfig
from .modeling_mole_clip import MoleCLIPVisionModel

AutoModel.register(MoleCLIPVisionConfig, MoleCLIPVisionModel, exist_ok=True)


class MoleLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`transformers.LlavaForConditionalGeneration` with that tower; same inputs, same outputs, same generation."""

    config_class = MoleLlavaConfig
    config: MoleLlavaConfig
