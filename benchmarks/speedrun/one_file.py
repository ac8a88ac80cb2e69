"""One Python file that repeats a run: the scripts of this folder, the library, and the arguments.

The track requires such a file: the text of a log up to the first line of equals signs must be a
program that needs no optimizer library. The program writes the files that it holds to a temporary
folder, and runs them from there.
"""

from collections.abc import Sequence
from pathlib import Path

import sinkgd

# Folders of the library that a run does not import.
LEFT_OUT = ("lab", "integrations")

HEAD = '''"""A run of the optimization track of modded-nanogpt by SinkGD's benchmarks/speedrun.

This file holds all of its code: the scripts first, and then the library `sinkgd` (Apache-2.0).
Start it in the folder of modded-nanogpt, or pass --data FOLDER:

    torchrun --standalone --nproc-per-node 8 THIS_FILE.py
"""

import runpy
import sys
import tempfile
from pathlib import Path

FILES = {}
'''

TAIL = """
with tempfile.TemporaryDirectory() as folder:
    for name, text in FILES.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, folder)
    sys.argv[1:1] = {arguments}
    runpy.run_path(str(Path(folder) / "speedrun.py"), run_name="__main__")
"""


def one_file(arguments: Sequence[str]) -> str:
    """Return the program.

    Args:
        arguments: Arguments of `speedrun` that determine the result. Those of the program's own
            command line follow them.
    """
    scripts, library = Path(__file__).parent, Path(str(sinkgd.__file__)).parent
    used = [
        path
        for path in sorted(library.rglob("*.py"))
        if path.relative_to(library).parts[0] not in LEFT_OUT
    ]
    files = {path.name: path for path in sorted(scripts.glob("*.py"))}
    files |= {f"sinkgd/{path.relative_to(library).as_posix()}": path for path in used}
    held = [
        f"FILES[{name!r}] = '''\\\n{_escaped(path.read_text(encoding='utf-8'))}'''\n"
        for name, path in files.items()
    ]
    return "\n".join([HEAD, *held, TAIL.format(arguments=list(arguments))])


def _escaped(text: str) -> str:
    """Return ``text`` escaped for a string literal between three single quotes."""
    return text.replace("\\", "\\\\").replace("'''", r"\'\'\'")
