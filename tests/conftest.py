"""Eight fake devices for every test, programs that compile fast, one cache of them with the processes tests start."""

import os
from importlib.metadata import version
from pathlib import Path

OLD_EMITTER = version("jaxlib").startswith("0.10.")
"""Whether the older emitter of fused operations is known to be there; no jax starts with a flag that it lacks."""

AS_USERS = {"xla_backend_optimization_level": 3, **({"xla_cpu_use_fusion_emitters": True} if OLD_EMITTER else {})}
"""`jax.jit`'s compiler options for a test whose numbers are held to what a user's own program gives."""


def xla_flags(devices: int = 8) -> str:
    """Returns ``XLA_FLAGS`` for so many fake devices, for this process or one that a test starts.

    Compiling is most of what the tests do, and their programs run for milliseconds: so code is generated without
    optimisations and, which saves more still, by the older emitter.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_backend_optimization_level=0"]
    return " ".join([*flags, "--xla_cpu_use_fusion_emitters=false"] if OLD_EMITTER else flags)


os.environ.setdefault("XLA_FLAGS", xla_flags())
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("OMP_NUM_THREADS", "2")
