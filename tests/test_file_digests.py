from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from qexport.artifact.digests import FileDigests, hashed_in_background


def files(folder: Path) -> dict[str, str]:
    contents = {"a": b"", "b": b"x" * 3_000_000, "c": b"y"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("meanwhile", [True, False])
def test_digests_are_those_of_the_files(tmp_path: Path, meanwhile: bool) -> None:
    expected = files(tmp_path) | {"known": "0"}
    digests = FileDigests(tmp_path, ["c", "b", "a"], {"known": "0"})
    assert list(digests) == sorted(expected)
    if meanwhile:
        with hashed_in_background(digests):
            pass
    assert dict(digests) == expected
    assert "other" not in digests


def test_a_file_that_cannot_be_read_is_told_where_its_digest_is_asked_for(tmp_path: Path) -> None:
    files(tmp_path)
    (tmp_path / "b").unlink()
    digests = FileDigests(tmp_path, ["a", "b", "c"], {})
    with hashed_in_background(digests):
        pass
    with pytest.raises(FileNotFoundError):
        dict(digests)


def test_an_error_meanwhile_ends_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without an end: only the error can stop its hashing."""
    (tmp_path / "endless").symlink_to("/dev/zero")
    digests = FileDigests(tmp_path, ["endless"], {})

    def interrupted() -> None:
        with hashed_in_background(digests):
            assert "digests" in thread_names()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for thread in threading.enumerate():
        if thread.name == "digests":
            thread.join(10)
    assert "digests" not in thread_names()


def test_digests_that_are_there_need_no_thread() -> None:
    with hashed_in_background({"a": "0"}):
        assert "digests" not in thread_names()
