"""``python -m sinkgd.lab`` runs the program `sinkgd`; torchrun starts the program in this way."""

import sys

from sinkgd.lab.cli import main
from sinkgd.lab.launch import leave

if __name__ == "__main__":
    sys.exit(leave(main()))
