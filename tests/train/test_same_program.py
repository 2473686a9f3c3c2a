"""Every process makes the same program of a step, or the next one compiles it again and those of one run do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import xla_flags

PROGRAMS = """
import hashlib, json
import jax
from tove_jax.bench.cases import config_of
from tove_jax.parallel import make_mesh
from tove_jax.plan.abstract import abstract_run, lower

found = {}
for method, decoder in (("move_kd", "tiny"), ("hawaii", ""), ("tove", "")):
    config = config_of(method, "tiny", batch=2, dtype="float32", decoder=decoder, text=32 if decoder else 0)
    text = lower(config, abstract_run(config), make_mesh(config.mesh, jax.devices()[:1])).as_text()
    found[method] = hashlib.sha256(text.encode()).hexdigest()
print(json.dumps(found))
"""


def test_a_step_is_the_same_program_in_every_process():
    environment = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}
    # The order of a set of words differs from process to process, by this seed.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAMS],
            cwd=Path(__file__).parents[2],
            env={**environment, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    first, second = (json.loads(process.communicate()[0]) for process in processes)
    assert first == second
