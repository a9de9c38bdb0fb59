"""Deterministic tar files, read by others, and a stranger's tar files, read by us."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from packages import contents, make_release
from qexport.errors import InputError, QexportError, RecipeError
from qexport.progress import silent
from qexport.registries import Package, fetch, parse_destination, publish
from qexport.registries.arrival import arriving
from qexport.registries.names import is_portable
from qexport.registries.tar_extraction import extract
from qexport.registries.tar_stream import TarStream

GOLDEN = "ccae6844ffad9388"
"""Of the digest of the release's tar file: its bytes are a promise, since digests of layers depend on them."""

PART = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1, max_size=60)
NAME = st.lists(PART.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)


@pytest.fixture
def release(tmp_path: Path) -> Package:
    return make_release(tmp_path / "release", weights=30_000)


def test_a_tar_file_comes_back_byte_for_byte(release: Package, tmp_path: Path) -> None:
    place = parse_destination(str(tmp_path / "release.tar"))
    assert str(publish(release, place).reference) == str(tmp_path / "release.tar")
    fetch(place, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(release.folder)


def test_the_bytes_depend_on_names_and_contents_alone(release: Package, tmp_path: Path) -> None:
    first = parse_destination(str(tmp_path / "first.tar"))
    publish(release, first)
    again = make_release(tmp_path / "elsewhere", weights=30_000)
    for path in again.folder.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    publish(again, parse_destination(str(tmp_path / "second.tar")))
    reverse = TarStream(again.folder, dict(reversed(again.files().items())), "notes-1.4.0")
    content = (tmp_path / "first.tar").read_bytes()
    assert content == b"".join(reverse.pieces())
    assert content == (tmp_path / "second.tar").read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith(GOLDEN)


def test_gnu_tar_and_tarfile_read_it(release: Package, tmp_path: Path) -> None:
    publish(release, parse_destination(str(tmp_path / "release.tar")))
    subprocess.run(["tar", "-xf", "release.tar"], cwd=tmp_path, check=True)
    assert contents(tmp_path / "notes-1.4.0") == contents(release.folder)
    with tarfile.open(tmp_path / "release.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.isfile()] == sorted(f"notes-1.4.0/{n}" for n in release.files())
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {oct(member.mode) for member in members} == {"0o644", "0o755"}


@given(st.dictionaries(NAME, st.binary(max_size=1500), min_size=1, max_size=4), st.data())
@settings(max_examples=40)
def test_any_part_of_any_archive(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    assert all(is_portable(name) for name in files)
    assume(not any(other.startswith(f"{name}/") for name in files for other in files))
    folder = tmp_path_factory.mktemp("files")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    stream = TarStream(folder, {name: len(content) for name, content in files.items()}, "models")
    whole = b"".join(stream.pieces())
    assert len(whole) == stream.size
    start = data.draw(st.integers(0, stream.size))
    end = data.draw(st.integers(start, stream.size))
    assert b"".join(stream.pieces(start, end)) == whole[start:end]
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        found = {m.name.removeprefix("models/"): archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    assert found == files
    shutil.rmtree(folder)
    folder.mkdir()
    extract(io.BytesIO(whole), folder, "models", len(whole), "a test")
    assert contents(folder) == files
    shutil.rmtree(folder)


def test_a_file_of_many_gigabytes(tmp_path: Path) -> None:
    """Sizes beyond 8 GiB have no room in a plain header. The file is a hole, and only its header is read."""
    size = 9 << 30
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(size)
    stream = TarStream(tmp_path, {"large.safetensors": size}, "models")
    head = b"".join(stream.pieces(0, 4096))
    with tarfile.open(fileobj=io.BytesIO(head)) as archive:
        assert archive.next() is not None
        member = archive.next()
    assert member is not None
    assert (member.name, member.size) == ("models/large.safetensors", size)
    assert b"".join(stream.pieces(stream.size - 2048)) == bytes(2048)


def test_a_file_that_changes_its_size_is_refused(release: Package) -> None:
    stream = TarStream(release.folder, release.files(), "models")
    (release.folder / "config.json").write_text("{ }")
    with pytest.raises(InputError, match="has changed while it was read"):
        list(stream.pieces())


def archive_of(*members: tuple[tarfile.TarInfo, bytes], pax: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive_of(member("r/../../evil")), "outside of its folder"),
        (archive_of(member("r/a/../b")), "outside of its folder"),
        (archive_of(member("/etc/passwd")), "outside of its folder"),
        (archive_of(member("r/a"), member("other/b")), "outside of its folder"),
        (archive_of(member("r/a\\b")), "outside of its folder"),
        (archive_of(member("r//a")), "outside of its folder"),
        (archive_of(member("r/a\nb")), "outside of its folder"),
        (archive_of(member("r/" + "x" * 300)), "outside of its folder"),
        (archive_of(member("/".join(["r"] * 40))), "outside of its folder"),
        (archive_of(member("r/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "a link or a special"),
        (archive_of(member("r/a"), member("r/link", b"", type=tarfile.LNKTYPE, linkname="r/a")), "a link or a special"),
        (archive_of(member("r/fifo", b"", type=tarfile.FIFOTYPE)), "a link or a special"),
        (archive_of(member("r/device", b"", type=tarfile.CHRTYPE)), "a link or a special"),
        (archive_of(member("r/a"), member("r/a")), "a name comes twice"),
        (archive_of(member("r/a"), member("r/a/b")), "a file and a folder"),
        (archive_of(member("r/a/b"), member("r/a")), "a name comes twice|a file and a folder"),
        (archive_of(member("r", b"x")), "more than it should"),
        (archive_of(member("r/a", pax_headers={"comment": "x"})), "a pax record that no release has"),
        (archive_of(member("r/a"), pax={"comment": "x"}), "a link or a special"),
        (archive_of(member("r/a", b"x" * 5000))[:5600], "ends too early"),
        (archive_of(member("r/a"))[:512], "ends too early"),
        (b"not a tar file" * 100, "malformed"),
        (b"", "ends too early"),
    ],
)
def test_a_strangers_archive_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "evil.tar").write_bytes(content)
    with pytest.raises(InputError, match=message):
        fetch(parse_destination(str(tmp_path / "evil.tar")), tmp_path / "inside/pulled")
    assert [path.name for path in tmp_path.rglob("*")] in (["evil.tar", "inside"], ["inside", "evil.tar"])


def test_a_large_pax_header_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("r/x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(InputError, match="too large"):
        extract(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT)), tmp_path, None, 1 << 50, "a test")


def test_more_bytes_than_announced_are_refused(tmp_path: Path) -> None:
    content = archive_of(member("r/a", b"x" * 100), member("r/b", b"x" * 100))
    with pytest.raises(InputError, match="more than it should"):
        extract(io.BytesIO(content), tmp_path, "r", 150, "a test")


@given(st.data())
@settings(max_examples=80)
def test_any_damage_is_an_error_or_stays_inside(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = archive_of(member("r/" + "long/" * 8 + "é" * 60, b"y" * 600), member("r/z", b"z"))
    content = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 4096))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damage")
    (folder / "in").mkdir()
    with suppress(QexportError):
        extract(io.BytesIO(bytes(content)), folder / "in", "r", len(content), "a test")
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    shutil.rmtree(folder)


def test_folders_arrive_whole_and_only_once(release: Package, tmp_path: Path) -> None:
    place = parse_destination(str(tmp_path / "there/release"))
    publish(release, place)
    assert contents(tmp_path / "there/release") == contents(release.folder)
    for action in (lambda: publish(release, place), lambda: fetch(place, tmp_path / "there/release")):
        with pytest.raises(RecipeError, match="something is there already"):
            action()
    fetch(place, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(release.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pulled", "release", "there"]


def test_only_what_is_about_the_place_is_told_as_an_error_of_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a library's own") as caught, arriving(tmp_path / "there"):
        raise OSError("a library's own")
    assert type(caught.value) is OSError
    with pytest.raises(FileNotFoundError), arriving(tmp_path / "there"):
        (tmp_path / "elsewhere").read_bytes()
    for action in ("mkdir", "read_bytes"):
        with pytest.raises(RecipeError, match="nothing can be written there"), arriving(tmp_path / "there") as path:
            getattr(path / "deep" / "file", action)()
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="nothing can be written there"), arriving(tmp_path / "file" / "x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("change", ["flip", "remove", "add", "listing", "link"])
def test_a_changed_release_is_not_fetched(release: Package, tmp_path: Path, change: str) -> None:
    weights = release.folder / "model-00001-of-00002.safetensors"
    match change:
        case "flip":
            weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
        case "remove":
            weights.unlink()
        case "add":
            (release.folder / "extra.json").write_text("{}")
        case "listing":
            (release.folder / "SHA256SUMS").unlink()
        case "link":
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError):
        fetch(parse_destination(str(release.folder)), tmp_path / "pulled", progress=silent)
    assert not (tmp_path / "pulled").exists()


def test_an_interrupted_arrival_leaves_nothing(release: Package, tmp_path: Path) -> None:
    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    for name in ("release.tar", "folder"):
        with pytest.raises(KeyboardInterrupt):
            publish(release, parse_destination(str(tmp_path / "out" / name)), progress=interrupt)
        assert list((tmp_path / "out").iterdir()) == []


def test_a_release_needs_its_listing_and_portable_names(release: Package, tmp_path: Path) -> None:
    place = parse_destination(str(tmp_path / "out"))
    (release.folder / "a\\b").write_text("")
    with pytest.raises(InputError, match="cannot be carried"):
        publish(release, place)
    (release.folder / "a\\b").unlink()
    (release.folder / "model.sig").unlink()
    with pytest.raises(InputError, match="a file to attach is missing"):
        publish(release, place)
    (release.folder / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="has no SHA256SUMS"):
        publish(release, place)


@pytest.mark.parametrize("zeros", [0, tarfile.RECORDSIZE, 3 << 20])
def test_nothing_may_follow_the_archive(release: Package, tmp_path: Path, zeros: int) -> None:
    place = parse_destination(str(tmp_path / "release.tar"))
    publish(release, place)
    with (tmp_path / "release.tar").open("ab") as file:
        file.write(bytes(zeros))
    fetch(place, tmp_path / "zeros")
    with (tmp_path / "release.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="something follows the archive"):
        fetch(place, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
