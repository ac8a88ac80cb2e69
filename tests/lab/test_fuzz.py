"""Whatever a user gives, the program ends in one line and an exit code: 2, or 1 for a failed run.

A long list of files, names, encodings, configurations and terminals, and random ones besides.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinkgd.lab.cli import main
from sinkgd.lab.commands.doctor import EXTRAS

HUGE = "9" * 30
DEEP = 200_000  # brackets
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
START = {
    "kind": "start",
    "name": "r",
    "recipe": "sgd",
    "seed": 0,
    "command": "sinkgd train",
    "config": {},
    "environment": {},
    "parameters": 1,
    "tokens_per_step": 1,
}

# Content that no reader of any file may stumble over, by what is wrong with it.
BAD_CONTENT: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\t\n",
    "every byte": bytes(range(256)),
    "latin-1": "café = 'é'\n".encode("latin-1"),
    "utf-16": '{"text": "a"}\n'.encode("utf-16"),
    "NUL": b"\0" * 64 + b"\n",
    "a BOM alone": b"\xef\xbb\xbf",
    "deep list": b"[" * DEEP + b"\n",
    "deep object": b'{"a":' * DEEP + b"\n",
    "deep and closed": b"[" * DEEP + b"]" * DEEP + b"\n",
    "deep TOML": b"a = " + b"[" * DEEP + b"\n",
    "a list": b"[1]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "endless number": b"9" * 10_000 + b"\n",
    "half a surrogate": rb'{"text": "\ud800"}' + b"\n",
    "other keys": b'{"kind": "start", "plan": 1, "a": "b"}\n',
    "kind only": b'{"kind": "start"}\n',
    "unhashable kind": b'{"kind": []}\n',
    "empty plan": b'{"kind": "plan", "plan": {}, "command": ""}\n',
    "paper": b'{"kind": "paper"}\n',
    "wrong types": json.dumps(START | {"seed": "zero"}).encode() + b"\n",
    "a step of text": (
        json.dumps(START) + '\n{"kind": "step", "step": "one", "tokens": 1, "seconds": 1.0, '
        '"loss": 1.0, "lr": 1.0, "gradient_norm": 1.0, "step_seconds": 1.0, '
        '"optimizer_seconds": 1.0}\n'
    ).encode(),
}

# Every file that a command reads: its name under a folder, and the command's options.
READERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "config": ("c.toml", lambda file: ["train", "--config", str(file)]),
    "compared config": ("c.toml", lambda file: ["compare", "--config", str(file)]),
    "model": ("config.json", lambda file: ["plan", "--model", str(file)]),
    "runs": ("run.jsonl", lambda file: ["report", str(file.parent)]),
    "recorded run": ("adamw.jsonl", lambda file: ["report", str(file)]),
    "study": ("study.jsonl", lambda file: ["report", str(file.parent)]),
    "begun run": ("run.jsonl", lambda file: ["train", "--out", str(file.parent)]),
    "begun study": (
        "study.jsonl",
        lambda file: ["experiment", "iterations", "--out", str(file.parent)],
    ),
    "texts": ("a.jsonl", lambda file: ["prepare", str(file)]),
    "parquet": ("a.parquet", lambda file: ["prepare", str(file)]),
    "zst": ("a.txt.zst", lambda file: ["prepare", str(file)]),
    "gzip": ("a.txt.gz", lambda file: ["prepare", str(file)]),
    "tokenizer": ("tokenizer.json", lambda file: ["prepare", "--tokenizer", str(file)]),
    "manifest": ("manifest.json", lambda file: ["prepare", "--verify", "--out", str(file.parent)]),
    "shards": ("manifest.json", lambda file: ["train", "--data.corpus", str(file.parent)]),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with small texts in it."""
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for i in range(12):
        words = (draw.choice(("law", "of", "the", "people", "war")) for _ in range(60))
        (folder / "texts" / f"{i:02d}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], codes=(2,)) -> str:
    """Run the program; return the error in its one line."""
    capsys.readouterr()
    assert main(arguments) in codes
    return one_line(capsys.readouterr().err)


def one_line(said: str) -> str:
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert said.endswith(f"{lines[0]}\n"), said
    return lines[0]


@pytest.mark.parametrize("content", BAD_CONTENT)
@pytest.mark.parametrize("reader", READERS)
def test_bad_content_is_refused_in_one_line(here, capsys, reader, content):
    name, options = READERS[reader]
    file = here / "bad" / name
    file.parent.mkdir()
    file.write_bytes(BAD_CONTENT[content])
    begins_anew = reader.startswith("begun") and b"\n" not in BAD_CONTENT[content]
    if begins_anew:
        pytest.skip("a first line that was cut short is no beginning")
    message = refused(options(file), capsys)
    assert str(file) in message or str(file.parent) in message


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_in_place_of_a_file_is_refused_in_one_line(here, capsys, reader):
    name, options = READERS[reader]
    file = here / "bad" / name
    file.mkdir(parents=True)
    if reader == "recorded run":
        file = file / "adamw.jsonl"
    refused(options(file), capsys)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_changes_nothing(here, capsys, bom):
    (here / "run.toml").write_bytes(bom + b"[training]\nsteps = 0\n")
    message = refused(["train", "--config", "run.toml"], capsys)
    assert message == "error: training.steps is 0; it must be at least 1"
    (here / "config.json").write_bytes(bom + json.dumps(LLAMA | {"mlp_bias": True}).encode())
    assert "mlp_bias is true" in refused(["plan", "--model", "config.json"], capsys)


@pytest.mark.parametrize("value", [0, -1, 1.5, "a", None, True, [], 10**30])
@pytest.mark.parametrize("size", [key for key in LLAMA if key != "model_type"])
def test_a_size_of_a_model_that_cannot_be_is_named(here, capsys, size, value):
    (here / "config.json").write_text(json.dumps(LLAMA | {size: value}), encoding="utf-8")
    assert size in refused(["plan", "--model", "config.json"], capsys)


NUMBERS = {"INT": ["-1", HUGE, f"-{HUGE}"], "FLOAT": ["nan", "inf", "-inf", "1e400", "-1", "1e31"]}
TRAIN = ["train", "--out", "run", "--data.corpus", "texts", "--data.vocab-size", "300"]


def options_of(command: str, kind: str) -> list[str]:
    """List the options of a command that take a number, from its help."""
    shown = subprocess.run(
        [sys.executable, "-m", "sinkgd.lab.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    return re.findall(rf"(--[\w.-]+) (?:\{{None\}}\|)?{kind}\b", shown)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("train", "INT"),
        ("plan", "FLOAT"),
        pytest.param("train", "FLOAT", marks=pytest.mark.slow),
        pytest.param("plan", "INT", marks=pytest.mark.slow),
    ],
)
def test_a_number_that_cannot_be_is_refused(here, capsys, command, kind):
    base = TRAIN if command == "train" else ["plan", "--model", "llama-nano"]
    options = options_of(command, kind)
    assert len(options) >= 3
    for option in options:
        for number in NUMBERS[kind]:
            capsys.readouterr()
            code = main([*base, f"{option}={number}"])
            said = capsys.readouterr().err
            assert code == 2, (option, number, said)
            assert option.removeprefix("--").replace("-", "_") in one_line(said)


NAMES = ["tiny", "", " ", "../x", "a" * 5000, "a\x1b[31mb", "é", "nope.json", "☃", "llama-nan"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model"],
        ["plan", "--model", "llama-nano", "--device"],
        ["plan", "--model", "llama-nano", "--optimizer"],
        ["train", "--out", "run", "--model.preset"],
        ["train", "--out", "run", "--optimizer.recipe"],
        ["train", "--out", "run", "--data.corpus"],
        ["compare", "--out", "c", "--optimizers"],
        ["compare", "--out", "c", "--baseline"],
        ["report"],
        ["report", "recorded", "--baseline"],
        ["bench", "step", "--workloads"],
        ["bench", "step", "--dtypes"],
        ["bench", "step", "--contenders"],
        ["bench", "memory", "--workloads"],
        ["bench", "loop", "--optimizers"],
        ["experiment", "iterations", "--optimizer"],
        ["experiment", "iterations", "--data"],
        ["experiment", "iterations", "--iterations"],
        ["experiment"],
        ["prepare", "--tokenizer"],
        ["prepare"],
    ],
    ids=" ".join,
)
def test_a_name_that_is_none_is_refused(here, capsys, monkeypatch, arguments, name):
    monkeypatch.setattr("sinkgd.lab.data.tokenizer.tokenizers.Tokenizer.from_pretrained", no_hub)
    (here / "recorded").mkdir()
    (here / "recorded" / "sgd.jsonl").write_text(json.dumps(START) + "\n", encoding="utf-8")
    empty = not name.strip()
    if empty and arguments[-1] in ("experiment", "report", "--optimizer", "--baseline", "--data"):
        pytest.skip("an empty value is none")
    assert main([*arguments, name]) == 2
    capsys.readouterr()


def no_hub(name: str) -> None:
    raise OSError(f"no connection for {name}")


@pytest.mark.parametrize("name", ["zzz", "qq"])
@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["bench", "step", "--workloads"], ["llama-60m", "many-small", "all"]),
        (["bench", "memory", "--workloads"], ["llama-60m", "all"]),
        (["plan", "--device"], ["h100", "mi300x"]),
        (["plan", "--model"], ["llama-7b", "llama-3-70b"]),
        (["plan", "--model", "llama-nano", "--optimizer"], ["adamw", "muon"]),
        (["train", "--optimizer.recipe"], ["sinkgd", "adamw"]),
        (["experiment"], ["table1", "scale"]),
        ([], ["train", "doctor"]),
        (["bench"], ["step", "loop"]),
    ],
)
def test_an_unknown_name_lists_those_that_there_are(here, capsys, arguments, known, name):
    message = refused([*arguments, name], capsys)
    assert "did you mean" not in message  # nothing looks like it
    assert all(one in message for one in known)


def test_a_model_file_that_is_not_there_is_no_misspelled_preset(here, capsys):
    message = refused(["plan", "--model", "nope.json"], capsys)
    assert message.startswith("error: there is no file nope.json; give the path of")
    assert "holds no config.json" in refused(["plan", "--model", "texts"], capsys)


@pytest.mark.parametrize("place", ["texts/00.txt", "texts/00.txt/deeper", "/proc/nope", "a" * 300])
@pytest.mark.parametrize(
    "arguments",
    [
        TRAIN,
        ["compare", "--data.corpus", "texts"],
        ["prepare", "texts", "--vocab-size", "300"],
        ["experiment", "iterations", "--data", "texts"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_place_that_cannot_be_written_is_refused(here, capfd, arguments, place):
    refused([*arguments, "--out", place], capfd)  # compare's run is a process of its own


@pytest.mark.parametrize(
    "encoding",
    [
        *("ascii", "cp437"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("cp1252", "latin-1", "utf-8")),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["doctor"],
        ["plan", "--model", "llama-nano"],
        ["plan", "--help"],
        ["experiment"],
        ["report", "recorded", "--out", "page.html"],
        ["train", "--data.corpus", "☃ naïve ×"],
        ["prepare", "texts", "--vocab-size", "300", "--out", "☃"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("short_ladder")
def test_every_terminal_shows_what_it_can(here, monkeypatch, arguments, encoding):
    (here / "recorded").mkdir()
    recorded = Path(__file__).parents[2] / "benchmarks" / "demo" / "2026-11-26"
    for file in recorded.glob("*.jsonl"):
        (here / "recorded" / file.name).write_bytes(file.read_bytes())
    shown, said = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(said, encoding=encoding))
    expected = 2 if arguments[0] == "train" else 0
    assert main(arguments) == expected
    sys.stdout.flush()
    sys.stderr.flush()
    shown.getvalue().decode(encoding)
    if expected:
        one_line(said.getvalue().decode(encoding))


def test_an_argument_that_is_no_text_is_refused(here, capsys):
    message = refused(["train", "--out", os.fsdecode(b"runs/\xff")], capsys)
    assert r"'runs/\udcff' is not UTF-8 text" in message


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are always text")
def test_files_whose_names_are_no_text_can_be_read(here, capsys):
    (here / "texts" / os.fsdecode(b"\xff.txt")).write_text("the law of war " * 9)
    (here / "texts" / os.fsdecode(b"\xfe.md")).touch()
    assert main(["prepare", "texts", "--vocab-size", "300", "--out", "s"]) == 0
    assert "left out" in capsys.readouterr().err


def test_a_tokenizer_without_its_unknown_token_is_an_error_of_one_line(here, capsys):
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "law": 1}, "unk_token": "<unk>"}
    (here / "theirs.json").write_text(json.dumps({"version": "1.0", "model": model}))
    message = refused(["prepare", "texts", "--tokenizer", "theirs.json"], capsys)
    assert "the tokenizer theirs.json cannot encode this text" in message


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200), reader=st.sampled_from(sorted(READERS)))
def test_random_content_never_ends_in_a_traceback(here, content, reader):
    name, options = READERS[reader]
    file = here / "bad" / reader / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content + b"\n")
    assert main(options(file)) in (0, 2)


def test_memory_that_runs_out_is_one_line(here, capsys, monkeypatch):
    message = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory\nmore"
    for error in (MemoryError(), RuntimeError(message)):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("sinkgd.lab.train.run.set_up", fail)
        assert refused(TRAIN, capsys, codes=(1,)).startswith("error: out of memory: ")


def test_the_doctor_knows_every_extra_and_every_package_of_it():
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(declared) - {"dev"}
    modules_of = {"mkdocs-material": {"material", "mkdocs"}}
    for extra, (modules, _) in EXTRAS.items():
        names = [re.match(r"[\w-]+", package)[0] for package in declared[extra]]
        needed = set(EXTRAS["cpu"][0]) if "sinkgd[cpu]" in declared[extra] else set()
        for name in set(names) - {"sinkgd"}:
            needed |= modules_of.get(name, {name.replace("-", "_")})
        assert set(modules) == needed, extra
