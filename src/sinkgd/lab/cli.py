"""The program `sinkgd`: find the command, parse its options, run it, and report errors.

A command is a frozen dataclass in `sinkgd.lab.commands` whose fields are its options and whose
``run()`` returns the exit code. A command may have a class method ``defaults(arguments)``. It gives
the defaults before the options are parsed, e.g. from a file that one of the options names.
"""

import io
import os
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from itertools import takewhile
from typing import Protocol

import sinkgd
from _sinkgd_cli import hand_over_ctrl_c
from sinkgd.lab.disk import FULL, PATH_ERRORS, remedy_of
from sinkgd.lab.launch import StopReport
from sinkgd.lab.options import NumberError, check_numbers, how_to_install, plain, suggest
from sinkgd.lab.terminal import keep_stderr, make_readable

# For each command, its class and a summary. A command's module is imported only when the command
# runs; `sinkgd --help` imports none. A command without a class is a package with commands of its
# own, which are listed in its COMMANDS and described in its USAGE.
Commands = Mapping[str, tuple[str | None, str]]
COMMANDS: Commands = {
    "compare": ("Compare", "train the same model with several optimizers; table and page"),
    "train": ("Train", "train one model, or resume a run that was stopped"),
    "experiment": ("Experiment", "run a study: tune its arms, train, write page and verdict"),
    "prepare": ("Prepare", "make token shards from text, jsonl or Parquet files, or C4"),
    "report": ("Report", "make the table and the page of existing runs or of a study"),
    "bench": (None, "measure speed and memory: optimizer steps, kernels, the training loop"),
    "plan": ("Plan", "estimate the memory, messages, time and cost of training, without training"),
    "doctor": ("Doctor", "show what is installed, and which kernels will run and why"),
}

_EXPERIMENTS = ("pytorch_optimizer",)  # packages of the extra "experiments"

USAGE = """\
usage: sinkgd COMMAND [OPTIONS]

Train models with optimizers that keep no state for hidden matrices, and compare them.

commands:
{commands}

options:
  -h, --help       show this help; `sinkgd COMMAND --help` shows a command's options
  --version        show the version

examples:
  sinkgd compare                                          SinkGD and AdamW on the same text
  sinkgd train --out runs/first --optimizer.recipe swan   one run
  sinkgd experiment iterations                            a study with its verdict
  sinkgd report runs/demo                                 table and page of existing runs
  sinkgd plan --model llama-3-70b --mesh.dp-shard 8       what training would need
"""


class Command(Protocol):
    """The interface of every command."""

    def run(self) -> int:
        """Run the command; return the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 for success, 1 for a run that failed, 2 for input that the user can
        correct, 129 after SIGHUP, 130 after Ctrl-C, 141 if nobody reads the output any more, 143
        after SIGTERM.
    """
    StopReport.made = False
    try:
        hand_over_ctrl_c()
        keep_stderr()
        make_readable()
        return _run_and_report(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130 if StopReport.made else _fail("stopped by Ctrl-C", code=130)


def _run_and_report(arguments: list[str]) -> int:
    """Run the program; report the errors that it raises."""
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except SystemExit as exit_request:
        if isinstance(exit_request.__context__, BrokenPipeError):  # rich turns it into SystemExit
            return _output_closed()
        return int(exit_request.code or 0)  # the parser exits after it wrote help or an error
    except BrokenPipeError:
        return _output_closed()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("sinkgd"):
            raise
        extra = "experiments" if error.name in _EXPERIMENTS else "lab"
        return _fail(f"{error.name} is not installed; {how_to_install(extra)}", code=2)
    except Exception as error:  # unexpected errors are raised again
        failed = _code_of(error)
        if failed is None:
            raise
        return _fail(_message_of(error), code=failed)
    return code


def _output_closed() -> int:
    """Discard further output and return the exit code: the reader, such as `head`, is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _main(arguments: list[str]) -> int:
    if (unreadable := _first_unreadable(arguments)) is not None:
        return _fail(
            f"the argument {unreadable!r} is not {_encoding()} text; rename the file, or set the "
            "locale that it was named in",
            code=2,
        )
    if (empty := _first_empty(arguments)) is not None:
        return _fail(
            f"{empty} is empty; give a value, or leave it out. Is a variable of the shell unset?",
            code=2,
        )
    match arguments:
        case [] | ["-h" | "--help"]:
            sys.stdout.write(_usage(USAGE, COMMANDS))
            return 0
        case ["--version"]:
            sys.stdout.write(f"sinkgd {sinkgd.__version__}\n")
            return 0
        case [name, *_] if name not in COMMANDS:
            return _fail(_unknown(name, COMMANDS, "sinkgd"), code=2)
    name, *options = arguments
    kind, _ = COMMANDS[name]
    return _run_one_of(name, options) if kind is None else _run(name, kind, options)


def _run_one_of(group: str, arguments: list[str]) -> int:
    """Run a command of a group, such as `sinkgd bench step`."""
    package = import_module(f"sinkgd.lab.commands.{group}")
    match arguments:
        case [] | ["-h" | "--help"]:
            sys.stdout.write(_usage(package.USAGE, package.COMMANDS))
            return 0
        case [name, *_] if name not in package.COMMANDS:
            return _fail(_unknown(name, package.COMMANDS, f"sinkgd {group}"), code=2)
    name, *options = arguments
    return _run(f"{group} {name}", package.COMMANDS[name][0], options)


def _run(name: str, kind: str, arguments: list[str]) -> int:
    command = _parse(name, kind, arguments)
    check_numbers(command)
    return command.run()


def _code_of(error: Exception) -> int | None:
    """Return 2 for input that the user can correct, 1 for a failed run, None for a bug."""
    if _lacks_memory(error):  # first, because it imports nothing new
        return 1
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in FULL:
        return 1
    if isinstance(error, OSError):
        return 2 if error.errno in PATH_ERRORS else 1
    if isinstance(error, _usage_errors()) or _is_too_large(error):
        return 2
    return 1 if isinstance(error, _failures()) else None


def _message_of(error: Exception) -> str:
    """Return the message of an error in one line."""
    if _lacks_memory(error):
        first = (str(error).splitlines() or ["an allocation failed"])[0]
        if (limit := _memory_limit()) is not None:
            return (
                f"out of memory: {first}; `ulimit -v` limits this process to {limit / 2**30:.1f} "
                "GiB, raise that or set it to unlimited"
            )
        return f"out of memory: {first}; train a smaller model or batch"
    if _is_too_large(error):
        return f"too large: {str(error).splitlines()[0]}; give smaller sizes"
    line = " ".join(str(error).splitlines()) or repr(error)
    if isinstance(error, OSError) and (remedy := remedy_of(error)) is not None:
        return f"{line}; {remedy}"
    return line


def _is_too_large(error: Exception) -> bool:
    """Whether the product of requested sizes is too large for a tensor."""
    return type(error) is RuntimeError and "overflow" in str(error)


def _lacks_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = str(error)
    if type(error) is RuntimeError and "can't allocate memory" in words:
        return True
    # If the address space is limited, libraries report a failed mmap with these words.
    cut = ("libllvmlite", "could not create a primitive", "failed to map segment", "std::bad_alloc")
    return _memory_limit() is not None and any(cause in words for cause in cut)


def _memory_limit() -> int | None:
    """Return the limit of this process's address space in bytes, or None."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _first_unreadable(arguments: Sequence[str]) -> str | None:
    """Return the first argument that the locale could not decode; no record could store it."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            return argument
    return None


def _first_empty(arguments: Sequence[str]) -> str | None:
    """Describe the first empty argument or value, or return None if there is none.

    An empty value is never accepted, because as a path it would mean the current folder.
    """
    before = ""
    for argument in arguments:
        option, sign, value = argument.partition("=")
        if option.startswith("--") and sign and not value:
            return option
        if not argument:
            return f"the value of {before}" if before.startswith("--") else "an argument"
        before = argument
    return None


def _encoding() -> str:
    return sys.getfilesystemencoding().upper()


def _parse(name: str, kind: str, arguments: list[str]) -> Command:
    import tyro

    if os.environ.get("NO_COLOR"):  # tyro ignores this variable
        tyro._experimental_options["ansi_codes"] = False
    command = getattr(import_module(f"sinkgd.lab.commands.{name.replace(' ', '.')}"), kind)
    default = command.defaults(arguments) if hasattr(command, "defaults") else None
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            parsed: Command = tyro.cli(
                command,
                prog=f"sinkgd {name}",
                args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit:
        if wrong := _parser_message(shown.getvalue()):
            end = "" if wrong.endswith((".", "?")) else "."
            sys.stderr.write(f"error: {wrong}{end} See `sinkgd {name} --help`\n")
        raise
    return parsed


def _parser_message(box: str) -> str:
    """Return the parser's boxed message in one line: the error and the nearest option."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines()]
    # The top of the frame holds the title. Without a frame, the title and a rule have a line each.
    lines = lines[1:] if text.startswith("╭") else lines[2:]
    wrong = plain(" ".join(takewhile(lambda line: line.strip("─-"), lines)))
    if "Perhaps you meant:" not in lines:
        return wrong
    after = lines[lines.index("Perhaps you meant:") :]
    nearest = next((line.split()[0] for line in after if line.startswith("--")), None)
    return wrong if nearest is None else f"{wrong}; did you mean {nearest}?"


def _usage(usage: str, commands: Commands) -> str:
    lines = (f"  {name:<12}{summary}" for name, (_, summary) in commands.items())
    return usage.format(commands="\n".join(lines))


def _unknown(name: str, commands: Commands, program: str) -> str:
    kind = "command" if program == "sinkgd" else "measurement"
    return f"there is no {kind} {name!r}; {suggest(name, commands)}. See `{program} --help`"


def _fail(message: str, *, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


# The two functions below import much of the lab. They are called only after an error, so that
# `sinkgd doctor` does without these modules.


def _usage_errors() -> tuple[type[Exception], ...]:
    """List the errors about user input: options, names, files, folders."""
    from sinkgd.lab.data import DataError
    from sinkgd.lab.models import ModelError
    from sinkgd.lab.report import ReportError
    from sinkgd.lab.results import ResultsError
    from sinkgd.lab.train import ConfigError, RunFolderError

    return (
        ConfigError,
        DataError,
        ModelError,
        NumberError,
        ReportError,
        ResultsError,
        RunFolderError,
    )


def _failures() -> tuple[type[Exception], ...]:
    """List the errors of runs that had begun."""
    from sinkgd import NonFiniteGradientError
    from sinkgd.lab.experiments.study import StudyError
    from sinkgd.lab.train import CheckpointError, LostRankError, NonFiniteLossError

    return (
        CheckpointError,
        LostRankError,
        NonFiniteGradientError,
        NonFiniteLossError,
        StudyError,
    )


if __name__ == "__main__":
    sys.exit(main())
