"""Configuration of a LLaVA-1.5 whose vision tower has LoRA experts in its MLPs (MoLA)."""

from transformers import AutoConfig, LlavaConfig

from .configuration_mola_clip import MolaCLIPVisionConfig

AutoConfig.register(MolaCLIPVisionConfig.model_type, MolaCLIPVisionConfig, exist_ok=True)


class MolaLlavaConfig(LlavaConfig):
    """`transformers.LlavaConfig`, with a `MolaCLIPVisionConfig` as its ``vision_config``."""

    model_type = "mola_llava"
