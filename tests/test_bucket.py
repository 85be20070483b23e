"""Paths in buckets, and locks there, on servers that stand in for Google's and Amazon's."""

import re
import time
from pathlib import Path

import pytest

from igpt import lock
from igpt.bucket import FINISHED, BucketPath, _store, split
from igpt.errors import StorageError, UserError
from igpt.fetch import local_copy
from igpt.files import as_path, check_workdir, read_json, whole, write_json, write_text
from igpt.lock import InUseError, Lock, lock_files


def test_a_bucket_is_read_and_written_like_a_folder(bucket):
    assert not bucket.exists() and str(bucket).count("://") == 1 and bucket.absolute() == bucket
    write_json(bucket / "deep" / "a.json", {"x": 1})
    write_text(bucket / "b.txt", "first\n")
    with (bucket / "b.txt").open("a") as file:
        file.write("second\n")
    assert read_json(bucket / "deep" / "a.json") == {"x": 1}
    assert (bucket / "b.txt").read_text() == "first\nsecond\n"
    assert [path.name for path in bucket.iterdir()] == ["b.txt", "deep"]
    assert bucket.is_dir() and (bucket / "deep").is_dir() and not (bucket / "dee").exists()
    assert list(bucket.glob("*.txt")) == [bucket / "b.txt"] and list(bucket.glob("d*/a.*")) == [bucket / "deep/a.json"]
    (bucket / "b.txt").unlink()
    (bucket / "b.txt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (bucket / "b.txt").read_bytes()
    with pytest.raises(UserError, match="there is no"):
        read_json(bucket / "b.txt")
    (bucket / "deep").rmtree()
    assert not bucket.exists()


@pytest.mark.parametrize("bucket_url", ["gs"], indirect=True)  # the other server takes such names for other requests
def test_an_object_whose_name_leads_out_of_its_folder_is_passed_over(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep" / "cache"))
    write_text(bucket / "good.txt", "good")
    scheme, name, key = split(bucket)
    for evil in ("../../../../evil.txt", "a/../../../../../evil.txt", "/evil.txt", "a//evil.txt", "./evil.txt"):
        _store(scheme, name).write(f"{key}/{evil}", b"evil").result()
    assert [path.name for path in bucket.files()] == ["good.txt"]
    copies = Path(local_copy(str(bucket)))
    assert (copies / "good.txt").read_text() == "good"
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_file_in_a_bucket_is_whole_or_stays_as_it_was(bucket):
    write_text(bucket / "file", "old")
    with pytest.raises(ZeroDivisionError), whole(bucket / "file") as file:
        file.write(b"half")
        _ = 1 / 0
    for mode, half in (("w", "half"), ("wb", b"half")):
        with pytest.raises(ZeroDivisionError), (bucket / "file").open(mode) as file:
            file.write(half)
            _ = 1 / 0
    assert (bucket / "file").read_text() == "old"


def test_a_folder_that_is_renamed_never_looks_finished_and_lacks_files(bucket, monkeypatch):
    names = {"a", "params/b", f"params/{FINISHED}", FINISHED}
    for name in names:
        write_text(bucket / "from" / name, "")

    def files(folder):
        return {str(path.relative_to(bucket / folder)) for path in (bucket / folder).files()}

    def looks_before(change):
        def changes(objects, *arguments, **options):
            seen.extend(files(folder) for folder in ("from", "to"))
            return change(objects, *arguments, **options)

        return changes

    objects, seen = type(BucketPath._objects), []
    for name in ("copy", "delete"):
        monkeypatch.setattr(objects, name, looks_before(getattr(objects, name)))
    (bucket / "from").rename(bucket / "to")
    assert files("to") == names and not files("from") and len(seen) == 16
    assert all(some == names for some in seen if FINISHED in some)


def test_a_bucket_that_is_absent_or_of_another_kind_is_refused(bucket_url):
    with pytest.raises(UserError, match="--workdir=.*absent-bucket/run cannot be reached: .*docs/pods.md"):
        check_workdir(f"{bucket_url.split('//')[0]}//absent-bucket/run")
    with pytest.raises(UserError, match="begin with gs:// or s3://"):
        as_path("az://bucket/run")


@pytest.fixture
def short_times(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 2.0)
    monkeypatch.setattr(lock, "POLL", 0.3)
    monkeypatch.setattr(lock, "CONTEND", 0.0)


def test_the_lock_holds_in_a_bucket(bucket, short_times):
    with Lock(bucket) as first:
        with pytest.raises(InUseError, match=re.escape(f"{bucket} is in use by process")), Lock(bucket):
            pass
        assert lock_files(bucket) == [first.path]
        begun = first.path.read_bytes()
        deadline = time.monotonic() + 20
        while first.path.read_bytes() == begun and time.monotonic() < deadline:
            time.sleep(0.1)
        assert first.path.read_bytes() != begun  # a sign of life
        first.check()
    assert lock_files(bucket) == []


def test_a_silent_owner_of_another_host_loses_the_lock_and_learns_of_it(bucket, short_times, capsys):
    silent = Lock(bucket)
    silent.content |= {"host": "other", "place": ["other"]}
    silent._acquire()  # without the thread that renews it
    with Lock(bucket) as mine:
        assert lock_files(bucket) == [mine.path]
        silent.path.rewrite(b"{}")  # a sign of life that comes too late
        assert lock_files(bucket) == [mine.path]
        with pytest.raises(StorageError, match="is gone"):
            silent.check()
