"""Configuration of a LLaVA-1.5 whose vision tower has LoRA experts in its MLPs (MoLE)."""

from transformers import AutoConfig, LlavaConfig

from .configuration_mole_clip import MoleCLIPVisionConfig

AutoConfig.register(MoleCLIPVisionConfig.model_type, MoleCLIPVisionConfig, exist_ok=True)


class MoleLlavaConfig(LlavaConfig):
    """`transformers.LlavaConfig`, with a `MoleCLIPVisionConfig` as its ``vision_config``."""

    model_type = "mole_llava"
