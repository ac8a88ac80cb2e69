"""``python -m sinkgd.lab`` is the program `sinkgd`."""

import sys

from sinkgd.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
