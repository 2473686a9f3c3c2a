"""tove_jax: put several vision experts into one encoder (MoVE-KD, HAWAII, ToVE) in JAX.

Importing the package needs neither torch nor the network, and starts no JAX backend.
"""

import time

__version__ = "0.1.0"
IMPORTED = time.monotonic()
"""When this was imported, by `time.monotonic`."""
