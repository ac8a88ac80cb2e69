"""No process that the laboratory started for itself outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkgd.lab.launch import in_fresh_process

PARENTS = {
    "bench memory": """\
if __name__ == "__main__":
    from pathlib import Path
    from lab.test_launch import sleep
    from sinkgd.lab.launch import in_fresh_process
    in_fresh_process(sleep, Path(sys.argv[1]))
""",
    "bench step": """\
import sys, torch
from pathlib import Path
from sinkgd.lab.bench import bench_step
bench_step._PROGRAM = bench_step._PROGRAM.replace(
    "grad = ", f"from lab.test_launch import sleep; sleep({sys.argv[1]!r})\\ngrad = "
)
bench_step._call("eager", torch.device("cpu"), Path(sys.argv[1]).parent)
""",
}


def sleep(path: Path | str) -> None:
    """Write the id of this process and stay for as long as it is let."""
    written = Path(f"{path}.part")
    written.write_text(str(os.getpid()))
    written.rename(path)
    time.sleep(600)


def test_what_is_called_in_a_fresh_process_is_returned():
    assert in_fresh_process(abs, -3) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells every child of its end")
@pytest.mark.parametrize("parent", PARENTS)
def test_a_helper_ends_with_a_parent_that_is_killed(tmp_path, parent):
    script, written = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(f"import sys\n{PARENTS[parent]}")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(script), str(written)], env={**os.environ, "PYTHONPATH": path}
    ) as process:
        while not written.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    helper = int(written.read_text())
    deadline = time.monotonic() + 20
    while _lives(helper):
        if time.monotonic() > deadline:
            os.kill(helper, signal.SIGKILL)
            pytest.fail("the helper goes on")
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may have asked for its exit code yet
