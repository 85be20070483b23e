"""Files and folders are written whole or not at all, and JSON is read within bounds."""

import os
import resource

import numpy as np
import pytest

from igpt.errors import UserError
from igpt.files import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    check_new,
    check_workdir,
    read_json,
    write_array,
    write_new,
    write_text,
)


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_the_old_file_and_makes_no_new_one(tmp_path, full_disk):
    write_text(tmp_path / "old.json", "old")
    for name in ("old.json", "new.json"):
        with pytest.raises(OSError, match="File too large"):
            write_text(tmp_path / name, "x" * 5000)
    assert (tmp_path / "old.json").read_text() == "old" and not (tmp_path / "new.json").exists()


def test_text_is_written_in_utf_8(tmp_path):
    write_text(tmp_path / "text", "größer")
    assert (tmp_path / "text").read_bytes() == "größer".encode()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a defect")])
def test_a_folder_whose_writing_fails_is_not_there(tmp_path, error):
    def write(folder):
        (folder / "first").write_text("first")
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="--out=.*out cannot be written" if expected is UserError else None):
        write_new(tmp_path / "a" / "out", write)
    assert not list((tmp_path / "a").iterdir())


def test_a_folder_appears_under_its_name_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free

    def write(folder):
        (folder / "file").write_text("content")
        assert not list(out.iterdir())

    assert write_new(out, write) == out
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "file").read_text() == "content"


def test_nothing_that_exists_is_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "absent")
    check_new(tmp_path / "empty")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match="exists already; name a new directory"):
            check_new(taken)
    with pytest.raises(UserError, match="is a bucket"):
        check_new("gs://bucket/out")


def test_a_workdir_is_a_writable_folder_or_can_become_one(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path, tmp_path / "a" / "b"):
        assert check_workdir(str(workdir)) == workdir
    assert not (tmp_path / "a").exists()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for workdir, message in (
        (tmp_path / "file" / "run", "no writable folder"),
        (tmp_path / "nowhere", "nowhere is no writable folder"),
        ("az://bucket/run", "begin with gs://"),
        ("", "--workdir is empty"),
    ):
        with pytest.raises(UserError, match=message):
            check_workdir(workdir)


def test_an_array_is_written_in_the_order_that_its_header_states(tmp_path):
    for array in (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.arange(9)[::-2], np.float32(3)):
        with (tmp_path / "a.npy").open("wb") as file:
            write_array(file, np.asarray(array))
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)


def test_json_is_read_within_its_depth(tmp_path):
    path, deepest = tmp_path / "a.json", MAX_JSON_DEPTH
    path.write_text('{"a":' * deepest + "1" + "}" * deepest)
    assert read_json(path)["a"]["a"]
    path.write_text('{"a":' * (deepest + 1) + "1" + "}" * (deepest + 1))
    with pytest.raises(UserError, match="nested more than 32 deep"):
        read_json(path)


def test_a_file_that_is_too_large_is_not_even_read(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    for size in (100 << 20, MAX_JSON_BYTES + 1):
        os.truncate(path, size)
        with pytest.raises(UserError, match=f"has {size:,} bytes"):
            read_json(path)


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    os.symlink("/dev/zero", tmp_path / "preprocessor_config.json")
    for name in ("config.json", "preprocessor_config.json"):
        with pytest.raises(UserError, match="is not a file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a JSON list; an object is needed"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{", "cannot be read as JSON"),
        (b"[" * 10**5, "cannot be read as JSON"),
        (None, "there is no .*a.json"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_files_and_folders_under_a_tilde_lie_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    write_text("~/text", "x")
    check_new("~/new")
    assert write_new("~/new", lambda folder: write_text(folder / "inside", "y")) == tmp_path / "home" / "new"
    assert check_workdir("~/run") == tmp_path / "home" / "run"
    with pytest.raises(UserError, match="exists already"):
        check_new("~/new")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"text", "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
