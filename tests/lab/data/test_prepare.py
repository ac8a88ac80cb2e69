"""Preparing: the folder says exactly what the texts said, in bounded memory, once."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from sinkgd.lab.data import (
    DataError,
    Document,
    FolderTakenError,
    Manifest,
    TokenDataset,
    Tokenizer,
    load_tokenizer,
    open_corpus,
    prepare,
    prepared_corpus,
    train_tokenizer,
)
from sinkgd.lab.data.prepare import _batched, _first_characters, cache_folder
from sinkgd.lab.data.shards import refuse_taken


def texts_of(folder: Path, split: str) -> list[str]:
    tokens = TokenDataset.open(folder).split(split)
    tokenizer = load_tokenizer(str(folder))
    starts, ends = tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist()
    return [tokenizer.decode(tokens.read(a, b - a)) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("below", ["taken", "taken/below"])
def test_a_cache_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch, below):
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / below))
    with pytest.raises(DataError, match=rf"kept in .*{below}, .*; set the variable SINKGD_CACHE"):
        prepared_corpus(tmp_path / "text.txt", vocab_size=258)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def poems(tmp_path):
    """A folder of 20 short texts, one of them validation text."""
    folder = tmp_path / "poems"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"poem {i}: roses are red, naïve ☃ <eos>\n" * (i + 1))
    return folder


def test_the_texts_can_be_read_back_and_their_bytes_are_exact(poems, tmp_path):
    corpus = open_corpus([str(poems)])
    tokenizer = train_tokenizer(corpus, 300)
    manifest = prepare(corpus, tmp_path / "out", tokenizer, shard_tokens=64)
    for split in ("train", "validation"):
        texts = [document.text for document in corpus if document.split == split]
        assert texts_of(tmp_path / "out", split) == texts
        assert manifest.splits[split].text_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.splits[split].documents == len(texts)
    files = [path.stat().st_size for path in poems.iterdir()]
    assert sum(entry.text_bytes for entry in manifest.splits.values()) == sum(files)
    assert manifest.sources == (str(poems),)


def test_the_tokenizer_never_sees_validation_text(c4_folder):
    tokenizer = train_tokenizer(open_corpus([str(c4_folder)]))
    before = tokenizer.sha256
    file = c4_folder / "c4-validation.00000-of-00001.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"text": "other words " * 50}).encode()))
    assert train_tokenizer(open_corpus([str(c4_folder)])).sha256 == before


def test_the_embedded_corpus_is_249_documents_and_12_megabytes(sotu):
    manifest = Manifest.read(sotu)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert (train.documents, validation.documents) == (237, 12)
    files = open_corpus(["sotu"]).files
    assert train.text_bytes + validation.text_bytes == sum(f.stat().st_size for f in files)
    assert 4.5 < train.bytes_per_token < 5.5
    assert manifest.vocab_size == 8192
    assert sotu.name.startswith("sotu-")


def test_the_embedded_corpus_reads_back_word_for_word(sotu):
    expected = [d.text for d in open_corpus(["sotu"]) if d.split == "validation"]
    assert texts_of(sotu, "validation") == expected


def test_a_corpus_is_prepared_once(poems, cache):
    folder = prepared_corpus(poems, vocab_size=280)
    assert folder.parent == cache
    before = folder.stat().st_mtime_ns
    assert prepared_corpus(str(poems), vocab_size=280) == folder
    assert folder.stat().st_mtime_ns == before
    assert prepared_corpus(poems, vocab_size=281) != folder
    (poems / "00.txt").write_text("changed")
    assert prepared_corpus(poems, vocab_size=280) != folder
    assert len(list(cache.iterdir())) == 3


def test_a_prepared_folder_is_returned_as_it_is(write_shards, cache):
    folder = write_shards([[5]]).folder
    assert prepared_corpus(folder) == folder
    assert not cache.exists()


def test_shards_without_their_manifest_are_not_taken_for_text(write_shards, cache):
    folder = write_shards([[5]]).folder
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json in .* not a complete folder of shards"):
        prepared_corpus(folder)


def test_a_cached_folder_without_manifest_is_named_before_any_work(poems, cache):
    folder = prepared_corpus(poems, vocab_size=280)
    (folder / "manifest.json").unlink()
    with pytest.raises(FolderTakenError, match=f"{folder} exists already; remove it"):
        prepared_corpus(poems, vocab_size=280)


def test_names_of_cached_folders_are_plain(poems, cache):
    assert prepared_corpus(f"{poems}/*.txt", vocab_size=280).name.startswith("corpus-")


def test_processes_that_prepare_at_once_end_with_one_folder(poems, cache):
    program = (
        "import sys; from sinkgd.lab.data import TokenDataset, prepared_corpus;"
        "folder = prepared_corpus(sys.argv[1], vocab_size=280); TokenDataset.open(folder);"
        "print(folder)"
    )
    command = [sys.executable, "-c", program, str(poems)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert [Path(output.strip()) for output in outputs] == [*cache.iterdir()] * 3


def test_losing_the_race_gives_the_winners_folder(poems, cache, monkeypatch):
    def beaten(corpus, out, tokenizer, **options):
        prepare(corpus, out, tokenizer)
        return prepare(corpus, out, tokenizer)

    monkeypatch.setattr(sys.modules[prepare.__module__], "prepare", beaten)
    folder = prepared_corpus(poems, vocab_size=280)
    assert [*cache.iterdir()] == [folder]
    assert TokenDataset.open(folder).split("train").documents == 19


def test_a_folder_that_another_process_ends_before_the_first_check_is_taken(
    poems, cache, monkeypatch
):
    def beaten(folder):
        corpus = open_corpus([str(poems)])
        prepare(corpus, folder, train_tokenizer(corpus, 280))
        refuse_taken(folder)

    monkeypatch.setattr(sys.modules[prepare.__module__], "refuse_taken", beaten)
    folder = prepared_corpus(poems, vocab_size=280)
    assert [*cache.iterdir()] == [folder]
    assert TokenDataset.open(folder).split("train").documents == 19


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SINKGD_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"SINKGD_CACHE": "", "XDG_CACHE_HOME": "/shared"}, "/shared/sinkgd"),
        ({"HOME": "/home/ada"}, "/home/ada/.cache/sinkgd"),
    ],
)
def test_the_cache_lies_where_the_environment_says(monkeypatch, environment, expected):
    for name in ("SINKGD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


def test_a_broken_document_leaves_nothing(poems, tmp_path, byte_tokenizer):
    (poems / "20.jsonl").write_text('{"text": "good"}\n{"text": ')
    with pytest.raises(DataError, match=r"20\.jsonl:2 is not a JSON object"):
        prepare(open_corpus([str(poems)]), tmp_path / "out", byte_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["poems"]


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_the_end_of_each_of_very_few_documents_is_held_out(tmp_path, cache, documents):
    text = "\n\n".join(f"Chapter {i}.\nIt was a dark and stormy night." for i in range(100))
    files = [tmp_path / f"book{i}.txt" for i in range(documents)]
    for file in files:
        file.write_text(text)
    told = []
    folder = prepared_corpus(f"{tmp_path}/*.txt", vocab_size=280, say=told.append)
    train, held_out = (texts_of(folder, split) for split in ("train", "validation"))
    assert [a + b for a, b in zip(train, held_out, strict=True)] == documents * [text]
    assert all(end.startswith("Chapter 95.") for end in held_out)
    (said,) = told
    assert ("is one document; its last 5 %" if documents == 1 else "the last 5 % of each") in said
    assert Manifest.read(folder).cut_fraction == 0.05
    assert prepared_corpus(f"{tmp_path}/*.txt", vocab_size=280, say=told.append) == folder
    assert told == [said]


@pytest.mark.parametrize(
    "text", ["line\n" * 30 + "end " * 9, "word " * 40, "字" * 200, "head\n\n" + "word " * 40]
)
def test_a_document_is_cut_near_its_share_whatever_borders_it_has(tmp_path, text):
    (tmp_path / "book.txt").write_text(text)
    train, held_out = open_corpus([str(tmp_path / "book.txt")], validation_fraction=0.2)
    assert (train.split, held_out.split) == ("train", "validation")
    assert train.text + held_out.text == text
    assert 0.1 <= len(held_out.text) / len(text) <= 0.3


def test_enough_documents_are_never_cut(poems):
    corpus = open_corpus([f"{poems}/0*.txt"], validation_fraction=0.05)
    assert corpus.cut_fraction == 0.05
    assert open_corpus([f"{poems}/0*.txt"], validation_fraction=0.055).cut_fraction is None
    manifest = Manifest(258, 0, 1, None, None, "", 9, (), {}, {})
    assert "cut_fraction" not in manifest.to_json()  # as older versions read it


def test_a_text_too_short_to_cut_is_refused_before_a_tokenizer_is_trained(tmp_path, cache):
    (tmp_path / "book.txt").write_text("all in one")
    told = []
    with pytest.raises(DataError, match=r"too short .* 5 % .*: 1 document of at most 10 char") as e:
        prepared_corpus(tmp_path / "book.txt", vocab_size=258, progress=told.append)
    assert told == []
    for remedy in ("--validation-fraction", "a file with 'validation' in its name"):
        assert remedy in str(e.value)
    assert len(list(open_corpus([str(tmp_path / "book.txt")], validation_fraction=0.5))) == 2
    (tmp_path / "validation.txt").write_text("another")
    assert len(list(open_corpus([f"{tmp_path}/*.txt"]))) == 2


def test_documents_without_a_token_are_passed_over(poems, tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red": 0, "</s>": 1}, "red"))
    backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("poem 3:.*\n"), "")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    corpus = open_corpus([str(poems)])
    manifest = prepare(corpus, tmp_path / "out", Tokenizer(backend, "forgetful"))
    assert manifest.splits["train"].documents == 18
    expected = sum(
        len(d.text.encode()) for d in corpus if d.split == "train" and "poem 3:" not in d.text
    )
    assert manifest.splits["train"].text_bytes == expected


def test_progress_is_told_of_every_document(poems, tmp_path, cache):
    told = []
    prepared_corpus(poems, vocab_size=280, progress=told.append)
    for stage in ("tokenizer", "tokens"):
        states = [state for state in told if state.stage == stage]
        assert [state.documents for state in states] == list(range(1, 21))
        assert {state.total_documents for state in states} == {20}
        characters = sum(len(document.text) for document in open_corpus([str(poems)]))
        assert states[-1].characters == characters


def test_no_more_is_read_ahead_than_a_batch_holds():
    drawn = 0

    def endless(text):
        nonlocal drawn
        while True:
            drawn += 1
            yield Document("train", text)

    batch = next(_batched(endless("x" * 2**20)))
    assert len(batch) == drawn == 4
    drawn = 0
    assert len(next(_batched(endless("x")))) == drawn == 4096


def test_the_tokenizers_sample_ends_with_the_text_that_fills_it():
    endless = iter(lambda: "ab", None)
    assert len(list(_first_characters(endless, 5))) == 3


def test_a_tokenizer_trained_elsewhere_can_be_used(c4_folder, tmp_path, sotu):
    tokenizer = load_tokenizer(str(sotu / "tokenizer.json"))
    prepare(open_corpus([str(c4_folder)]), tmp_path / "out", tokenizer)
    assert Manifest.read(tmp_path / "out").tokenizer_sha256 == tokenizer.sha256
    assert texts_of(tmp_path / "out", "train") == ["abcdef", "é", "xyz"]
