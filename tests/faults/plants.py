"""Mistakes in publishing, planted to see that the harness finds them. Each takes effect in the process that calls it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qexport.artifact import disk, publish
from qexport.artifact.manifest import Manifest
from qexport.pipeline import running


def files_are_not_synced() -> None:
    publish.sync_tree = lambda folder: disk.sync(folder)


def the_new_names_are_not_synced() -> None:
    sync = publish.sync
    publish.sync = lambda path: sync(path) if path.name.endswith(".partial") else None


def new_parents_are_not_synced() -> None:
    publish.make_folder = lambda folder: folder.mkdir(parents=True, exist_ok=True)


def the_manifest_is_written_after_publishing() -> None:
    pending: list[tuple[Manifest, Path]] = []
    write, publication = Manifest.write, publish.Publication.publish

    def later(manifest: Manifest, folder: Path) -> Path:
        pending.append((manifest, folder))
        (folder / "qexport-manifest.json").touch()
        return folder

    def publish_first(self: publish.Publication) -> Path:
        path = publication(self)
        for manifest, _ in pending:
            write(manifest, path)
        return path

    Manifest.write = later  # type: ignore[method-assign]
    running.Publication.publish = publish_first  # type: ignore[method-assign]


def the_marker_is_removed_after_the_rename() -> None:
    """As it was before the harness."""
    move = disk.move_into_place

    def with_marker(source: Path, target: Path) -> Path | None:
        (source / publish.MARKER_NAME).touch()
        replaced = move(source, target)
        (target / publish.MARKER_NAME).unlink()
        return replaced

    publish.move_into_place = with_marker


def what_is_replaced_is_not_marked() -> None:
    @contextmanager
    def nothing(_: Path) -> Iterator[None]:
        yield

    publish._marked_if_foreign = nothing


def what_lies_aside_is_forgotten() -> None:
    publish._end_replacing = lambda target, folder: None


def the_folder_is_copied() -> None:
    def copy(source: Path, target: Path) -> Path | None:
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.rmtree(source)
        return None

    publish.move_into_place = copy


def an_error_of_the_disk_is_a_defect() -> None:
    disk._BROKEN.clear()


def an_exchange_is_two_renames() -> None:
    def exchange(first: Path, second: Path) -> None:
        beside = first.with_name("beside")
        os.rename(second, beside)
        os.rename(first, second)
        os.rename(beside, first)

    disk._exchange = exchange
