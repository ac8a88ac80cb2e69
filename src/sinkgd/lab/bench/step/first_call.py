"""The first call in a fresh process: what compiling, or loading what was compiled, costs.

Compiled code is kept in an empty folder made for this, so the user's own cache changes nothing and
is not changed. Importing torch and sinkgd is not counted; the backend's own imports are.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sinkgd.lab.bench.step.records import FirstCall

CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR")
WARM_PROCESSES = 3
_PROGRAM = """\
import sys, time, torch, sinkgd
from sinkgd.lab.launch import end_with_parent
end_with_parent()
backend, device = sys.argv[1:]
grad = torch.randn(256, 256, dtype=torch.float32, device=device)
started = time.perf_counter()
sinkgd.sinkhorn_scales(grad, backend=backend).col.sum().item()
print(time.perf_counter() - started)
"""


def measure_first_call(backend: str, device: torch.device) -> FirstCall:
    """Time a backend's first call, once with an empty cache and then with the cache it left."""
    with TemporaryDirectory(prefix="sinkgd-bench-") as cache:
        cold = _call(backend, device, Path(cache))
        warm = tuple(_call(backend, device, Path(cache)) for _ in range(WARM_PROCESSES))
    return FirstCall(backend, cold, warm)


def _call(backend: str, device: torch.device, cache: Path) -> float:
    environment = {**os.environ, **dict.fromkeys(CACHES, str(cache))}
    command = [sys.executable, "-c", _PROGRAM, backend, device.type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"the first call of backend {backend!r} failed: {done.stderr.strip()}")
    return float(done.stdout)
