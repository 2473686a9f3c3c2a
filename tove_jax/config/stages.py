"""What the full-size config files of the methods share: LLaVA-1.5's two stages, and a tiny stand-in for tests."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from tove_jax.errors import InputError, nearest

PICTURES = {1: 558_128, 2: 665_298}
"""Rows of LLaVA-Pretrain (blip_laion_cc_sbu_558k) and of llava_v1_5_mix665k."""

LANGUAGES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "7b": {
        "initialize": "lmsys/vicuna-7b-v1.5",
        "width": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "mlp_width": 11008,
    },
    "13b": {
        "initialize": "lmsys/vicuna-13b-v1.5",
        "width": 5120,
        "layers": 40,
        "heads": 40,
        "kv_heads": 40,
        "mlp_width": 13824,
    },
}
"""Language models of LLaVA-1.5, by the name that config arguments take; Vicuna 1.5 is under the Llama 2 licence."""

# Experts that are at hand everywhere, in place of a method's teachers.
_STAND_INS = ("clip", "efficientnet_lite0", "hed:112", "pp_ocr_det:160")


def llava_stage(config: ConfigDict, stage: int, language: str = "none") -> ConfigDict:
    """Writes one of LLaVA-1.5's two stages into a run's settings.

    Stage 1 trains projector, adapters, routers and the method's own parameters on captions, lr 1e-3, batch 256,
    pictures cut at the centre; stage 2 trains everything, the language model too, on conversations, lr 2e-5, batch
    128, pictures padded to a square with the mean colour, for the experts as for the student. Each is one epoch; a
    stage 2 begins with the run that `train.start_from` names. The mesh follows from the devices: everything is sharded
    over at most 16 of a slice in stage 1, 64 in stage 2, with replicas over the rest. With a language model, its layers
    are computed again in the backward pass.

    Args:
      config: settings as `tove_jax.config.thaw` gives them; changed in place.
      stage: 1 or 2.
      language: a name in `LANGUAGES`.

    Returns:
      The settings.

    Raises:
      InputError: another stage or language model.
    """
    if stage not in PICTURES:
        raise InputError(f"config argument stage: expected 1 or 2, found {stage}")
    if language not in LANGUAGES:
        raise InputError(
            f"config argument language: expected one of {', '.join(LANGUAGES)}, found '{language}'"
            f"{nearest(language, LANGUAGES)}"
        )
    config.text.template = {1: "plain", 2: "v1"}[stage]
    if language != "none":
        config.language.update({"kind": "llava", "vocabulary": 32000, "remat": "full", "loss_chunk": 256})
        if config.method.name == "hawaii":
            config.method.instruction_width = LANGUAGES[language]["width"]
    config.language.update(LANGUAGES[language])
    batch = {1: 256, 2: 128}[stage]
    config.mesh.update(data=-1, fsdp=-1, tensor=-1, fsdp_limit={1: 16, 2: 64}[stage])
    config.data.update(source="llava", held_out=0.0)
    config.train.update(steps=PICTURES[stage] // batch, batch=batch)
    if stage == 2:
        config.optim.update(lr=2e-5, groups=((".*", 1.0),))
        config.student.view.fit = "pad"
        config.features.views = "student"
    return config


def smoke(config: ConfigDict, **adapter: float) -> ConfigDict:
    """Makes a full-size run tiny: seconds on a laptop, embedded pictures, embedded experts for the teachers.

    Args:
      config: settings; changed in place. They keep their number of experts, at most four.
      **adapter: fields of ``student.adapter``, beside a rank of 4.

    Returns:
      The settings.
    """
    config.features.experts = _STAND_INS[: len(config.features.experts)]
    config.data.update(source="openmoji", limit=48, held_out=0.25)
    config.student.update(initialize="", image_size=64, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
    config.student.feature = "layers/-1"
    config.student.adapter.update(rank=4, **adapter)
    config.train.update(steps=4, batch=8, dtype="float32", log_every=1, checkpoint_every=2)
    if config.language.kind != "none":
        config.language.update(initialize="", vocabulary=0, width=32, layers=2, heads=2, kv_heads=2, mlp_width=64)
        config.text.limit = 256
        if config.method.name == "hawaii" and config.method.instruction_width:
            config.method.update(instruction_width=32, instruction_tokens=16)
    return config
