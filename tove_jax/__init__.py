"""tove_jax: put several vision experts into one encoder (MoVE-KD, HAWAII, ToVE) in JAX.

Importing the package needs neither torch nor the network, and starts no JAX backend.
"""

__version__ = "0.1.0"
