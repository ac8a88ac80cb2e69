"""``python -m sinkgd.lab`` is the program `sinkgd`, and what torchrun starts."""

import sys

from sinkgd.lab.cli import main
from sinkgd.lab.launch import leave

if __name__ == "__main__":
    sys.exit(leave(main()))
