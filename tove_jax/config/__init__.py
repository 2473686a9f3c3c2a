"""Settings: the schema, the presets, and the one door through which a run's settings come in."""

from tove_jax.config.door import freeze, from_file, from_json, parse_arguments, thaw, to_json, with_overrides
from tove_jax.config.schema import Config

__all__ = ["Config", "freeze", "from_file", "from_json", "parse_arguments", "thaw", "to_json", "with_overrides"]
