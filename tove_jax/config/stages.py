"""What the full-size config files of the methods share: LLaVA-1.5's two stages, and a tiny stand-in for tests."""

from __future__ import annotations

from ml_collections import ConfigDict

from tove_jax.errors import InputError

PICTURES = {1: 558_128, 2: 665_298}
"""Rows of LLaVA-Pretrain (blip_laion_cc_sbu_558k) and of llava_v1_5_mix665k."""

# Experts that are at hand everywhere, in place of a method's teachers.
_STAND_INS = ("clip", "efficientnet_lite0", "hed:112", "pp_ocr_det:160")


def llava_stage(config: ConfigDict, stage: int) -> ConfigDict:
    """Writes one of LLaVA-1.5's two stages into a run's settings.

    Stage 1 trains adapters, routers and the method's own parameters, lr 1e-3, batch 256, pictures cut at the centre;
    stage 2 trains everything, lr 2e-5, batch 128, pictures padded to a square with the mean colour, for the experts
    as for the student. Each is one epoch; a stage 2 begins with the run that `train.start_from` names.

    Args:
      config: settings as `tove_jax.config.thaw` gives them; changed in place.
      stage: 1 or 2.

    Returns:
      The settings.

    Raises:
      InputError: another stage.
    """
    if stage not in PICTURES:
        raise InputError(f"config argument stage: expected 1 or 2, found {stage}")
    batch = {1: 256, 2: 128}[stage]
    config.data.source = "llava"
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
    config.data.update(source="openmoji", limit=48)
    config.student.update(initialize="", image_size=64, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
    config.student.feature = "layers/-1"
    config.student.adapter.update(rank=4, **adapter)
    config.train.update(steps=4, batch=8, dtype="float32", log_every=1, checkpoint_every=2)
    return config
