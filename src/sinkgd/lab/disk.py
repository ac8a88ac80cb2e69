"""What a rename needs to survive a power cut."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Force a folder's own entries to the disk: the names in it, not the files' content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
