"""How a run is started, with as many processes as it has now, and how each of them leaves."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(environment.get("WORLD_SIZE", "1"))


def launch_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return how to run ``sinkgd`` with ``arguments``, under torchrun where that runs now.

    Args:
        arguments: After the program's name.
        environment: In which torchrun says how many processes there are.

    Examples:
        >>> launch_command(["train", "--out", "runs/my run"], {})
        "sinkgd train --out 'runs/my run'"
        >>> launch_command(["train"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
        'torchrun --nnodes 2 --nproc-per-node 4 -m sinkgd.lab train'
    """
    ranks = launched_ranks(environment)
    if ranks == 1:
        return shlex.join(["sinkgd", *arguments])
    own = int(environment["LOCAL_WORLD_SIZE"])
    nodes = ["--nnodes", str(ranks // own)] if ranks > own else []
    torchrun = ["torchrun", *nodes, "--nproc-per-node", str(own), "-m", "sinkgd.lab"]
    return shlex.join([*torchrun, *arguments])


def leave(code: int) -> int:
    """Return ``code``; under torchrun, end the process with it at once, after what was written.

    Threads of torch's process groups outlive the main one there. What they still hold of Python
    they may return to an interpreter that is gone, and abort a run that is finished.
    """
    if launched_ranks() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
