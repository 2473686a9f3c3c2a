import subprocess
import sys


def test_writing_metrics_does_not_take_torch_along():
    """Where it is installed, TensorBoard's writer would import it; afterwards it can be imported as ever."""
    code = "import sys, tove_jax.train.metrics as m; print('torch' in sys.modules, m.SummaryWriter.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "tensorboardX.writer"]
