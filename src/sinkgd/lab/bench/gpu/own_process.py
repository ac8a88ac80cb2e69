"""Programs in processes of their own, as triton interprets kernels or compiles them, never both.

Which of the two it does is settled when it is imported, by the environment.
"""

import os
import subprocess
import sys


def environment(*, interprets: bool) -> dict[str, str]:
    """Return the environment of a process in which triton interprets kernels, or compiles them."""
    found = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if not interprets:
        del found["TRITON_INTERPRET"]
    return found


def output_of(module: str, function: str, *, interprets: bool) -> str:
    """Call a function without arguments in a new process, and return what it wrote.

    Raises:
        RuntimeError: If the process fails; the message has what it wrote to standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {function}; {function}()"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(interprets=interprets),
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout
