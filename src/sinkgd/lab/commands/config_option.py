"""The option ``--config FILE``, read before the others because it gives their defaults."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from sinkgd.lab.train.config_file import load_config

Settings = TypeVar("Settings")


def load_defaults(arguments: Sequence[str], kind: type[Settings]) -> Settings:
    """Return the file's settings where ``--config`` is among ``arguments``, else the defaults.

    Raises:
        ConfigError: If the file is missing, or holds a key that ``kind`` does not have.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:  # no value: the parser of all options words it better
        path = None
    return kind() if path is None else load_config(path, kind)
