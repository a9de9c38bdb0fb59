"""Mistakes in publishing, planted to see that the harness finds them. Each holds for the process that calls it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from qexport.artifact import disk, partial, publish
from qexport.artifact.manifest import MANIFEST_NAME, Manifest


def files_are_not_synced() -> None:
    patch.object(publish, "sync_tree", disk.sync).start()


def the_new_names_are_not_synced() -> None:
    def only_the_temporary_folder(path: Path) -> None:
        if path.name.endswith(".partial"):
            disk.sync(path)

    patch.object(publish, "sync", only_the_temporary_folder).start()


def new_parents_are_not_synced() -> None:
    patch.object(partial, "make_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True)).start()


def the_manifest_is_written_after_publishing() -> None:
    pending: list[Manifest] = []
    write, publish_now = Manifest.write, publish.Publication.publish

    def later(manifest: Manifest, folder: Path) -> Path:
        pending.append(manifest)
        (folder / MANIFEST_NAME).touch()
        return folder

    def publish_first(publication: publish.Publication) -> Path:
        path = publish_now(publication)
        for manifest in pending:
            write(manifest, path)
        return path

    patch.object(Manifest, "write", later).start()
    patch.object(publish.Publication, "publish", publish_first).start()


def the_marker_is_removed_after_the_rename() -> None:
    """As it was before the harness."""

    def with_marker(source: Path, target: Path) -> Path | None:
        (source / partial.MARKER_NAME).touch()
        replaced = disk.move_into_place(source, target)
        (target / partial.MARKER_NAME).unlink()
        return replaced

    patch.object(publish, "move_into_place", with_marker).start()


def what_is_replaced_is_not_marked() -> None:
    """As it was before the harness."""

    @contextmanager
    def nothing(_: Path) -> Iterator[None]:
        yield

    patch.object(publish, "marked_if_foreign", nothing).start()


def what_is_finished_is_made_anew() -> None:
    """As it was at first."""
    patch.object(publish, "lock_finished", lambda folder: None).start()


def what_lies_aside_is_forgotten() -> None:
    """As it was before the harness."""
    patch.object(publish, "_end_replacing", lambda target, folder: None).start()
    patch.object(publish, "_put_back", disk.path_aside).start()


def the_folder_is_copied() -> None:
    def copy(source: Path, target: Path) -> Path | None:
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.rmtree(source)
        return None

    patch.object(publish, "move_into_place", copy).start()


def an_error_of_the_disk_is_a_defect() -> None:
    """As it was before the harness."""
    disk._BROKEN.clear()


def an_exchange_is_two_renames() -> None:
    def exchange(first: Path, second: Path) -> None:
        beside = first.with_name("beside")
        second.rename(beside)
        first.rename(second)
        beside.rename(first)

    patch.object(disk, "_exchange", exchange).start()
