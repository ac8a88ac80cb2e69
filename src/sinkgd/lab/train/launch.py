"""The shell command that starts a run again, with as many processes as it has now."""

import os
import shlex
from collections.abc import Mapping, Sequence


def launch_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return how to run ``sinkgd`` with ``arguments``, under torchrun where that runs now.

    Args:
        arguments: After the program's name.
        environment: In which torchrun says how many processes there are.

    Example:
        >>> launch_command(["train", "--out", "runs/my run"], {})
        "sinkgd train --out 'runs/my run'"
        >>> launch_command(["train"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
        'torchrun --nnodes 2 --nproc-per-node 4 -m sinkgd.lab train'
    """
    ranks = int(environment.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return shlex.join(["sinkgd", *arguments])
    own = int(environment["LOCAL_WORLD_SIZE"])
    nodes = ["--nnodes", str(ranks // own)] if ranks > own else []
    torchrun = ["torchrun", *nodes, "--nproc-per-node", str(own), "-m", "sinkgd.lab"]
    return shlex.join([*torchrun, *arguments])
