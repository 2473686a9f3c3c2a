"""Every setting at its default: MoVE-KD stage 1's student and optimiser. Other files are diffs."""

from ml_collections import ConfigDict

from tove_jax.config import Config, thaw


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    del arg
    return thaw(Config())
