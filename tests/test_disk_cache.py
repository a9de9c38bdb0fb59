"""The cache of the tests on disk: made once, and made again when anything that it may depend on has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import disk_cache
from disk_cache import DAY, digest, kept, sources

SOURCES = ("qexport/a.py", "qexport/room/b.py", "qexport/room/page.html", "tests/factories.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small repository."""
    for name in (*SOURCES, "tests/test_a.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.fixture
def folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the entries lie of a process that starts now."""
    monkeypatch.setattr(disk_cache, "FOLDER", root / "cache")
    monkeypatch.setattr(disk_cache, "digest", lambda: digest(root))
    disk_cache.start.cache_clear()
    yield root / "cache"
    disk_cache.start.cache_clear()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("change", ["edited", "removed", "renamed"])
def test_any_change_of_a_source_changes_the_digest(name: str, change: str, root: Path) -> None:
    before, path = digest(root), root / name
    match change:
        case "edited":
            path.write_text(name + " ")
        case "removed":
            path.unlink()
        case _:
            path.rename(path.with_name("other.py"))
    assert digest(root) != before


def test_a_new_file_changes_the_digest_and_a_test_does_not(root: Path) -> None:
    before = digest(root)
    (root / "tests" / "test_a.py").write_text("another test")
    assert digest(root) == before
    (root / "qexport" / "new.json").write_text("{}")
    assert digest(root) != before


def test_other_versions_and_other_kinds_of_cpu_change_the_digest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [digest(root)]
    monkeypatch.setattr(disk_cache, "version", lambda name: "9.9" if name == "torch" else "1")
    digests.append(digest(root))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    digests.append(digest(root))
    assert len(set(digests)) == 3


def test_every_file_of_the_package_is_a_source() -> None:
    package = disk_cache.ROOT / "qexport"
    assert set(package.rglob("*.py")) <= set(sources(disk_cache.ROOT))
    assert disk_cache.ROOT / "tests" / "onnx_exports.py" in sources(disk_cache.ROOT)


def test_an_entry_is_made_once_for_each_key_and_digest(folder: Path, root: Path) -> None:
    made: list[bytes] = []

    def entry(key: str) -> bytes:
        return kept(key, lambda: made.append(key.encode()) or key.encode())  # type: ignore[func-returns-value]

    assert [entry(key) for key in ("a", "b", "a")] == [b"a", b"b", b"a"]
    assert made == [b"a", b"b"]
    (root / "qexport" / "a.py").write_text("changed")
    disk_cache.start.cache_clear()
    assert entry("a") == b"a"
    assert made == [b"a", b"b", b"a"]


def test_what_was_made_while_a_source_was_edited_is_not_kept(folder: Path, root: Path) -> None:
    disk_cache.start()

    def edited() -> bytes:
        (root / "qexport" / "a.py").write_text("changed")
        return b"of which source?"

    assert kept("a", edited) == b"of which source?"
    (root / "qexport" / "a.py").write_text("qexport/a.py")
    assert kept("a", lambda: b"again") == b"again"


def test_entries_of_other_sources_go_after_a_day(folder: Path) -> None:
    for name, age in (("old", 2 * DAY), ("young", DAY / 2)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (0, (folder / name).stat().st_mtime - age))
    disk_cache.start()
    assert not (folder / "old").exists()
    assert (folder / "young").exists()
