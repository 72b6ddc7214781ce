"""Claim: one set of functions serves local folders and S3 alike, and says what is wrong in one sentence."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import s3fs
from fsspec.registry import _registry

from mull.runtime import storage

pytest_plugins = ["s3_server"]


@pytest.fixture(params=["path", "file", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/läufe mit raum"
    prefix = {"path": "", "file": "file://", "memory": "memory:/"}[request.param]
    return f"{prefix}{tmp_path}/läufe mit raum"


def test_what_is_written_is_read_listed_and_removed(folder):
    storage.make_folder(folder)
    name = storage.join(folder, "größe-🙂.json")
    assert not storage.exists(name)
    storage.write_text_atomic(name, "erste 🙂")
    storage.write_text_atomic(name, "zweite 🙂")
    storage.make_folder(storage.join(folder, "inner"))
    storage.write_text_atomic(storage.join(folder, "inner", "a"), "")
    assert storage.exists(name)
    assert storage.exists(storage.join(folder, "inner"))
    assert storage.read_bytes(name).decode() == "zweite 🙂"
    assert storage.read_bytes(name) == "zweite 🙂".encode()
    with storage.open_stream(name, "rb") as stream:
        assert (stream.seek(-4, 2), stream.read().decode()) == (7, "🙂")
        assert (stream.seek(0), stream.read(6)) == (0, b"zweite")
    assert storage.list_names(folder) == ["größe-🙂.json", "inner"]
    storage.remove_tree(name)
    assert storage.list_names(folder) == ["inner"]
    storage.remove_tree(folder)
    assert storage.list_names(folder) == []
    assert not storage.exists(storage.join(folder, "inner", "a"))


def test_what_is_not_there_is_empty_or_said_to_be_missing(folder):
    assert storage.list_names(folder) == []
    assert not storage.exists(folder)
    storage.remove_tree(folder)
    with pytest.raises(FileNotFoundError, match="läufe mit raum/a"):
        storage.read_bytes(storage.join(folder, "a")).decode()


def test_what_another_process_writes_is_seen_at_once(bucket):
    assert storage.list_names(bucket) == []
    other = fsspec.filesystem("s3", skip_instance_cache=True)  # shares no cache, as another process would not
    other.pipe_file(f"{bucket}/new", b"1")
    assert storage.list_names(bucket) == ["new"]
    other.pipe_file(f"{bucket}/newer", b"1")
    assert storage.list_names(bucket) == ["new", "newer"]
    assert storage.exists(f"{bucket}/newer")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch, call):
    name = str(tmp_path / "a.json")
    storage.write_text_atomic(name, "old")

    def fail(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[call], fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"):
        storage.write_text_atomic(name, "new")
    assert storage.read_bytes(name).decode() == "old"
    assert storage.list_names(str(tmp_path)) == ["a.json"]


def test_text_is_on_the_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink()), real_fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, other: (events.append("rename"), real_replace(self, other)))
    storage.write_text_atomic(str(tmp_path / "a"), "text")
    assert events == [tmp_path / "a.partial", "rename", tmp_path]


HOLDER = """
import sys, time
from pathlib import Path
from mull.runtime.storage import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a folder for itself."""
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_has_one_process_and_a_dead_one_gives_it_back(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(storage, "LOCK_PATIENCE_SECONDS", 0.1)
    for name in ("run", "link/run"):
        with (
            pytest.raises(RuntimeError, match=rf"run is in use by process {holder.pid}\. Wait until it ends"),
            storage.exclusive(tmp_path / name),
        ):
            pass
    with storage.exclusive(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".run.lock").exists(), "the dead process left its file, which holds nothing"
    with storage.exclusive(tmp_path / "run"):
        assert (tmp_path / ".run.lock").read_text() == f"process {os.getpid()}"
    assert not (tmp_path / ".run.lock").exists()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_is_told_by_its_name(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for place in (file / "x", file / "x" / "y"):
        sentence = f"{place} cannot be made, because {file} is a file: choose another folder."
        with pytest.raises(OSError, match=f"^{re.escape(sentence)}$"), storage.exclusive(place):
            pass
    sentence = r"^/proc/x cannot be written \(No such file or directory\): choose another folder\.$"
    with pytest.raises(OSError, match=sentence), storage.exclusive(Path("/proc/x")):
        pass
    monkeypatch.setattr(os, "write", lambda *_: os.posix_fallocate(-1, 0, 1))
    with (
        pytest.raises(OSError, match=r"^.*free cannot be written \(.*\): choose"),
        storage.exclusive(tmp_path / "free"),
    ):
        pass
    assert storage.list_names(str(tmp_path)) == ["file"]


def test_an_error_of_what_is_done_with_a_folder_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="^of the user's$"), storage.exclusive(tmp_path / "run"):
        raise FileNotFoundError("of the user's")


def test_a_full_disk_is_told_with_its_file(tmp_path):
    full = r"^\[Errno 28\] No space left on device: '/dev/full'$"
    with Path("/dev/full").open("ab", buffering=0) as stream, pytest.raises(OSError, match=full):
        storage.append(stream, "text")
    with (tmp_path / "file").open("ab", buffering=0) as stream:
        for text in ("one, ", "\N{GREEK SMALL LETTER BETA}" * 100_000):
            storage.append(stream, text)
    assert (tmp_path / "file").read_text() == "one, " + "\N{GREEK SMALL LETTER BETA}" * 100_000


def test_a_lock_that_is_given_back_is_waited_for_and_never_shared(tmp_path):
    inside, most = 0, 0

    def use(_: int) -> None:
        nonlocal inside, most
        for _ in range(20):
            with storage.exclusive(tmp_path / "run"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    with ThreadPoolExecutor(4) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LOCK_PATIENCE_SECONDS", 60)
        list(pool.map(use, range(4)))
    assert most == 1


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", unsupported)
    with storage.exclusive(tmp_path / "run"):
        pass
    assert "cannot be locked ([Errno 37] No locks available): take care" in caplog.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ann:s3cret@db:5432/x is down", "postgresql://***@db:5432/x is down"),
        ("mysql+pymysql://ann:p/w@d@db/x", "mysql+pymysql://***@db/x"),
        ("'https://tok3n@host/a', https://u:p@h", "'https://***@host/a', https://***@h"),
        ("https://:s3cret@host", "https://***@host"),
        ("https://h/a?X-Amz-Signature=abc&b=1&api_key=2", "https://h/a?X-Amz-Signature=***&b=1&api_key=***"),
        ("postgresql://db/x?user=a&password=s3cret", "postgresql://db/x?user=a&password=***"),
        ('https://h/a?token="abc"&b=1', "https://h/a?token=***&b=1"),
        ("https://h/a#access_token=abc", "https://h/a#access_token=***"),
        ("https://h/a;token=abc;b=1", "https://h/a;token=***;b=1"),
        ("https://h/a?auth=abc&jwt=abc&pass=abc", "https://h/a?auth=***&jwt=***&pass=***"),
        *(
            (text, text)
            for text in ("http://127.0.0.1:5000/x", "s3://bucket/a@b", "sqlite:////a/b@c:d", "a@b.c", "x: y")
        ),
    ],
)
def test_secrets_in_urls_are_not_shown(text, shown):
    assert storage.redact(text) == shown
    assert storage.redact(shown) == shown


def test_an_error_of_remote_storage_shows_no_secret():
    message = r"^ftp://\*\*\*@h/x could not be reached: ftp://\*\*\*@h\.$"
    with pytest.raises(OSError, match=message), storage.os_errors("ftp://u:s3cret@h/x"):
        raise OSError("ftp://u:s3cret@h")


def test_join_and_is_local():
    assert storage.join("/a/", "b", "c") == "/a/b/c"
    assert storage.join("s3://bucket", "b") == "s3://bucket/b"
    assert storage.join("/", "b") == "/b"
    assert storage.is_local("a/b")
    assert storage.is_local("file:///a")
    assert not storage.is_local("s3://bucket")
    assert storage.local_path("file:///a b") == Path("/a b")
    assert storage.local_path("~/x") == Path.home() / "x"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "URL is empty"),
        ("s4://bucket/x", "protocol s4:// is not known"),
        ("s3://bucket/run*", "patterns"),
    ],
)
def test_a_url_that_cannot_work_is_refused(url, message):
    with pytest.raises(ValueError, match=message):
        storage.check_url(url)


def test_a_local_name_may_hold_what_is_a_pattern_elsewhere(tmp_path):
    for name in ("lr[1]", "lr1"):
        storage.make_folder(str(tmp_path / name))
    storage.remove_tree(str(tmp_path / "lr[1]"))
    assert storage.list_names(str(tmp_path)) == ["lr1"]


def test_a_missing_bucket_is_named_and_not_made(s3):
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="there is no bucket absent-bucket. Make it, or correct the URL"):
            storage.make_folder("s3://absent-bucket/run")


def test_missing_credentials_are_an_os_error(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    for call in (storage.list_names, storage.exists, storage.read_bytes, storage.make_folder, storage.remove_tree):
        with pytest.raises(OSError, match="^s3://bucket/run could not be reached: Unable to locate credentials"):
            call("s3://bucket/run")
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_s3fs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # fsspec keeps what it has imported
    with pytest.raises(RuntimeError) as error:
        storage.exists("s3://bucket/run")
    assert str(error.value) == "s3://bucket/run needs a package that is not installed: pip install 'mull[s3]'."
