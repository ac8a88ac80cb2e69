"""Opening shards: damage of any kind is noticed, and named with what to do."""

import json
import shutil

import pytest
import tokenizers

from sinkgd.lab.data import DataError, TokenDataset, Tokenizer, dataset

FILES = [
    "tokenizer.json",
    "train-00000.bin",
    "train-00001.bin",
    "train-offsets.bin",
    "validation-00000.bin",
    "validation-offsets.bin",
]
files = pytest.mark.parametrize("name", FILES)


@pytest.fixture
def folder(write_shards):
    written = write_shards([[5, 6, 7], [8, 9]], [[10]], shard_tokens=5)
    assert sorted(written.manifest.files) == FILES
    return written.folder


def flip_a_bit(path, position=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


@files
@pytest.mark.parametrize("damage", [flip_a_bit, remove, cut, lengthen, empty])
def test_a_damaged_file_is_named_with_the_remedy(folder, name, damage):
    damage(folder / name)
    with pytest.raises(DataError, match=f"{name} is damaged: .*make it again with `sinkgd prepare"):
        TokenDataset.open(folder)


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("name", ["train-00000.bin", "train-offsets.bin"])
def test_a_file_that_is_cut_after_it_was_checked_is_named(folder, name, damage):
    opened = TokenDataset.open(folder)
    damage(folder / name)
    with pytest.raises(DataError, match=f"{name} is damaged: it changed while it was read"):
        opened.split("train")


@files
def test_above_the_limit_opening_checks_sizes_and_verify_the_content(folder, monkeypatch, name):
    monkeypatch.setattr(dataset, "_ALWAYS_VERIFIED_BYTES", 0)
    opened = TokenDataset.open(folder)
    opened.verify()
    flip_a_bit(folder / name)
    with pytest.raises(DataError, match=f"{name} is damaged: its sha256"):
        TokenDataset.open(folder).verify()
    cut(folder / name)
    with pytest.raises(DataError, match=f"{name} is damaged: it has"):
        TokenDataset.open(folder)


def test_a_missing_manifest_is_named(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json in .* make one with `sinkgd prepare`"):
        TokenDataset.open(folder)


def test_a_missing_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(DataError, match=rf"no manifest\.json in .*{name}"):
            TokenDataset.open(tmp_path / name)


def test_a_manifest_cut_anywhere_is_damaged(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            TokenDataset.open(folder)


def edited(folder, edit):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def test_a_manifest_of_another_shape_is_damaged(folder):
    for edit in (
        lambda fields: fields.pop("vocab_size"),
        lambda fields: fields.pop("largest_id"),
        lambda fields: fields.update(surprise=1),
        lambda fields: fields["splits"]["train"].pop("tokens"),
        lambda fields: fields.update(files=[]),
    ):
        before = (folder / "manifest.json").read_bytes()
        edited(folder, edit)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            TokenDataset.open(folder)
        (folder / "manifest.json").write_bytes(before)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        TokenDataset.open(folder)


def test_a_manifest_that_counts_otherwise_than_the_files_is_noticed(folder):
    edited(folder, lambda fields: fields["splits"]["train"].update(tokens=6))
    with pytest.raises(DataError, match=r"train-00001\.bin is damaged: it has 4 bytes"):
        TokenDataset.open(folder)


def test_another_version_of_the_format_is_named(folder):
    edited(folder, lambda fields: fields.update(format_version=3))
    with pytest.raises(DataError, match="is of format 3, but this sinkgd reads only 1 and 2"):
        TokenDataset.open(folder)


def test_a_folder_of_the_format_before_is_read_and_needs_a_row_for_every_token(folder):
    def as_before(fields):
        fields.pop("largest_id")
        fields["format_version"] = 1

    tokens = TokenDataset.open(folder).split("train").read(0, 5)
    edited(folder, as_before)
    before = TokenDataset.open(folder)
    assert before.manifest.largest_id is None
    assert before.manifest.rows_needed == before.manifest.vocab_size
    assert before.split("train").read(0, 5).tolist() == tokens.tolist()


def test_the_largest_id_of_the_text_decides_how_many_rows_are_needed(write_shards, tmp_path):
    manifest = write_shards([[5, 6], [7]], [[200]]).manifest
    assert (manifest.largest_id, manifest.rows_needed, manifest.vocab_size) == (200, 201, 258)
    pads_last = tokenizers.models.WordLevel({"</s>": 1, "a": 0, "<pad>": 9}, unk_token="a")
    last = Tokenizer(tokenizers.Tokenizer(pads_last), "pads last")
    manifest = write_shards([[0]], [[0]], tokenizer=last, out=tmp_path / "last").manifest
    assert (manifest.largest_id, manifest.rows_needed) == (1, 10)  # a row for pads too


def test_a_manifest_cannot_point_outside_its_folder(folder):
    edited(folder, lambda f: f["files"].update({"../x": f["files"]["tokenizer.json"]}))
    with pytest.raises(DataError, match="lies outside the folder"):
        TokenDataset.open(folder)


def test_a_copy_of_the_folder_is_the_same_data(folder, tmp_path):
    copy = TokenDataset.open(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.manifest == TokenDataset.open(folder).manifest


def test_an_unknown_split_is_named(folder):
    with pytest.raises(DataError, match=r"no split 'test', only \['train', 'validation'\]"):
        TokenDataset.open(folder).split("test")


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 8), (7, 1), (3, 0)])
def test_reading_past_the_end_is_refused(folder, start, length):
    with pytest.raises(IndexError, match="not within the 7 tokens of train"):
        TokenDataset.open(folder).split("train").read(start, length)
