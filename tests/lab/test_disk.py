"""Files are written whole, and errors of the disk name the file."""

import errno
import os
import threading
from pathlib import Path

import pytest

from sinkgd.lab.disk import FULL, naming_path, write_whole
from sinkgd.lab.results import ResultsWriter, Resume


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "page.html"
    for content in ("first", "second"):
        write_whole(path, content)
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "page")
    reader.join()
    assert read == ["page"]
    assert pipe.is_fifo()


def test_a_link_to_a_device_is_not_replaced(tmp_path):
    link = tmp_path / "nothing"
    link.symlink_to(os.devnull)
    write_whole(link, "page")
    assert link.is_symlink()
    assert link.is_char_device()


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "page")


def test_a_full_disk_names_the_file_of_results(tmp_path):
    with ResultsWriter(tmp_path / "run.jsonl") as writer, Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), writer._file.fileno())
        with pytest.raises(OSError, match=r"No space left on device: .*run\.jsonl"):
            writer.write(Resume(1))
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer._file.fileno())


@pytest.mark.parametrize("code", sorted(FULL))
def test_an_error_that_names_no_file_is_given_one(tmp_path, code):
    with pytest.raises(OSError, match=str(tmp_path)) as caught, naming_path(tmp_path):
        raise OSError(code, os.strerror(code))
    assert caught.value.errno == code


def test_an_error_that_names_a_file_keeps_it(tmp_path):
    with pytest.raises(OSError, match="other") as caught, naming_path(tmp_path):
        raise OSError(errno.EACCES, "denied", "other")
    assert caught.value.filename == "other"
