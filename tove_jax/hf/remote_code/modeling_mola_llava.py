"""LLaVA-1.5 whose vision tower has LoRA experts in its MLPs (MoLA), for transformers 5; `LlavaProcessor` serves it."""

from transformers import AutoModel, LlavaForConditionalGeneration

from .configuration_mola_clip import MolaCLIPVisionConfig
from .configuration_mola_llava import MolaLlavaConfig
from .modeling_mola_clip import MolaCLIPVisionModel

AutoModel.register(MolaCLIPVisionConfig, MolaCLIPVisionModel, exist_ok=True)


class MolaLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`transformers.LlavaForConditionalGeneration` with that tower; same inputs, same outputs, same generation."""

    config_class = MolaLlavaConfig
    config: MolaLlavaConfig
