from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from qexport.artifact import disk, partial, publish
from qexport.artifact.manifest import MANIFEST_NAME
from qexport.artifact.partial import MARKER_NAME
from qexport.artifact.publish import Publication, check_output
from qexport.errors import QexportError, RecipeError, ResourceError


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_text(text)
    (folder / MANIFEST_NAME).write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(output: Path, then: Callable[[Publication], object], *, force: bool = False, text: str = "new") -> None:
    with Publication(output, force=force) as publication:
        fill(publication.folder, text)
        then(publication)


def failing(error: BaseException) -> Callable[[object], None]:
    def fail(_: object) -> None:
        raise error

    return fail


NEW = {"sub/weights": "new", MANIFEST_NAME: "new"}


def old_output(tmp_path: Path) -> Path:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    return output


def test_a_finished_folder_appears_at_its_final_path_alone(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with Publication(output) as publication:
        fill(publication.folder)
        assert publication.folder == tmp_path / "deep" / "out.partial"
        assert not output.exists()
        assert publication.publish() == output
    assert tree(output) == NEW
    assert names(output.parent) == ["out"]


def test_without_publish_nothing_is_left(tmp_path: Path) -> None:
    with Publication(tmp_path / "out") as publication:
        fill(publication.folder)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run(tmp_path / "out", failing(error()))
    assert names(tmp_path) == []


def test_the_error_under_way_is_told_and_not_that_of_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "remove", failing(PermissionError()))
    with pytest.raises(ValueError, match="the first"):
        run(tmp_path / "out", failing(ValueError("the first")))
    monkeypatch.undo()
    run(tmp_path / "out", Publication.publish)  # the lock is free, and what was left is removed
    assert names(tmp_path) == ["out"]


def test_a_folder_without_manifest_is_never_published(tmp_path: Path) -> None:
    def publish_without_manifest(publication: Publication) -> None:
        (publication.folder / MANIFEST_NAME).unlink()
        publication.publish()

    with pytest.raises(QexportError, match="manifest"):
        run(tmp_path / "out", publish_without_manifest)
    assert names(tmp_path) == []


def test_an_empty_folder_is_never_published(tmp_path: Path) -> None:
    with Publication(tmp_path / "out") as publication, pytest.raises(QexportError, match="manifest"):
        publication.publish()
    assert names(tmp_path) == []


def fill_layouts(folder: Path, *finished: str, unfinished: tuple[str, ...] = ()) -> None:
    for name in (*finished, *unfinished):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text(name)
    for name in finished:
        (folder / name / MANIFEST_NAME).write_text(name)


def test_a_folder_of_layouts_is_published_where_each_has_its_manifest(tmp_path: Path) -> None:
    with Publication(tmp_path / "out") as publication:
        fill_layouts(publication.folder, "tgi", "vllm")
        publication.publish()
    assert names(tmp_path / "out") == ["tgi", "vllm"]


def test_a_folder_of_layouts_of_which_one_is_unfinished_is_never_published(tmp_path: Path) -> None:
    with Publication(tmp_path / "out") as publication:
        fill_layouts(publication.folder, "tgi", unfinished=("vllm",))
        with pytest.raises(QexportError, match="without its manifest"):
            publication.publish()
    assert names(tmp_path) == []


def test_a_rejected_folder_with_a_stray_folder_in_it_is_not_deleted(tmp_path: Path) -> None:
    fill_layouts(tmp_path / "out.rejected", "tgi", unfinished=("thesis",))
    with pytest.raises(RecipeError, match="not qexport's"):
        check_output(tmp_path / "out", force=True)
    shutil.rmtree(tmp_path / "out.rejected" / "thesis")
    check_output(tmp_path / "out", force=True)


def test_a_non_empty_output_is_refused_before_any_work(tmp_path: Path) -> None:
    output = old_output(tmp_path)
    with pytest.raises(RecipeError, match="not empty"):
        Publication(output)
    assert names(tmp_path) == ["out"]


def test_an_empty_output_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Publication(tmp_path / "out") as publication:
        fill(publication.folder)
        publication.publish()
    assert tree(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RecipeError, match="the output is a file"):
        Publication(tmp_path / "out", force=force)


def test_force_never_replaces_a_folder_that_the_user_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = old_output(tmp_path)
    (output / "below").mkdir()
    monkeypatch.chdir(output / "below")
    with pytest.raises(RecipeError, match="contain the current directory"):
        check_output(output, force=True)
    with pytest.raises(RecipeError, match="contain the current directory"):
        check_output(Path("/"), force=True)


def test_the_folder_of_rejected_artifacts_is_never_replaced_under_the_users_feet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_layouts(tmp_path / "out.rejected", "tgi")
    check_output(tmp_path / "out", force=False)
    monkeypatch.chdir(tmp_path / "out.rejected" / "tgi")
    with pytest.raises(RecipeError, match="the current directory is in the folder for a rejected artifact"):
        check_output(tmp_path / "out", force=False)


@pytest.mark.parametrize("name", ["out.partial", "out.rejected", "out.replaced"])
def test_an_output_is_not_called_as_a_folder_that_a_run_removes(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="must not be called"):
        check_output(tmp_path / name, force=True)


def test_a_linked_output_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far" / "out")
    with Publication(tmp_path / "out") as publication:
        fill(publication.folder)
        publication.publish()
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "far" / "out") == NEW


def without_exchange(*_: Path) -> None:
    raise OSError(errno.EINVAL, "not supported")


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(disk, "_exchange", without_exchange)
    output = old_output(tmp_path)
    with Publication(output, force=True) as publication:
        fill(publication.folder)
        assert tree(output) == {"old": "old"}
        publication.publish()
    assert tree(output) == NEW
    assert names(tmp_path) == ["out"]


def test_the_replaced_folder_is_locked_until_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where the next run builds, and must be known as qexport's if its removal is cut short."""
    remove, removed = partial.remove, []

    def watched(folder: Path) -> None:
        with pytest.raises(RecipeError, match="another run"):
            partial.lock(folder)
        removed.append(names(folder))
        remove(folder)

    output = old_output(tmp_path)
    monkeypatch.setattr(partial, "remove", watched)
    run(output, Publication.publish, force=True)
    assert removed == [[MARKER_NAME, "old"]]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_what_a_kill_between_two_renames_left_is_put_back_or_removed(tmp_path: Path, ours: bool, swapped: bool) -> None:
    """Without an exchange: the old folder lies aside, the new one still at its temporary path or already in place."""
    aside = tmp_path / "out.replaced"
    aside.mkdir()
    (aside / "old").write_text("old")
    (aside / (MANIFEST_NAME if ours else MARKER_NAME)).touch()
    new = tmp_path / ("out" if swapped else "out.partial")
    new.mkdir()
    fill(new)
    with Publication(tmp_path / "out", force=True) as publication:
        assert names(tmp_path) == ["out", "out.partial"]
        assert names(publication.folder) == [MARKER_NAME]
        assert tree(tmp_path / "out") == (NEW if swapped else {"old": "old"} | ({MANIFEST_NAME: ""} if ours else {}))
        fill(publication.folder, "newer")
        publication.publish()
    assert names(tmp_path) == ["out"]
    assert tree(tmp_path / "out")[MANIFEST_NAME] == "newer"


def test_without_force_an_output_that_lies_aside_is_not_passed_over(tmp_path: Path) -> None:
    fill_layouts(tmp_path / "out.replaced", "tgi")
    with pytest.raises(RecipeError, match="killed while it replaced the output") as caught:
        check_output(tmp_path / "out", force=False)
    assert caught.value.mend == "move it back to out, or run again with --force"


@pytest.mark.parametrize("name", ["out.replaced", "out.rejected.replaced"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_in_the_way_of_an_old_folder_is_kept_and_told_before_the_work(
    tmp_path: Path, name: str, kind: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    match kind:
        case "folder":
            mine.rename(tmp_path / name)
        case "file":
            (tmp_path / name).write_text("mine")
        case "link":
            (tmp_path / name).symlink_to(mine)
    before = tree(tmp_path)
    with pytest.raises(RecipeError, match="not qexport's lies where"):
        Publication(tmp_path / "out", force=True)
    assert tree(tmp_path) == before


def test_a_finished_folder_without_marker_was_left_by_a_killed_run(tmp_path: Path) -> None:
    """It was about to be published, or has been replaced."""
    fill_layouts(tmp_path / "out.partial", "tgi", "vllm")
    with Publication(tmp_path / "out") as publication:
        assert names(publication.folder) == [MARKER_NAME]


def leave_finished(tmp_path: Path) -> None:
    fill_layouts(tmp_path / "out.partial", "tgi", "vllm")


@pytest.mark.parametrize("end", ["publish", "reject"])
def test_a_finished_folder_that_this_run_would_make_is_published_as_it_is(tmp_path: Path, end: str) -> None:
    leave_finished(tmp_path)
    finished = tmp_path / "out.partial"
    before = tree(finished)
    with Publication(tmp_path / "out", made_here=lambda folder: folder == finished) as publication:
        assert publication.finished
        path = getattr(publication, end)()
    assert names(tmp_path) == [path.name]
    assert tree(path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "planted"), RecipeError("taken")])
def test_a_finished_folder_stays_where_publishing_it_fails(tmp_path: Path, error: BaseException) -> None:
    leave_finished(tmp_path)
    before = tree(tmp_path)
    with (
        pytest.raises((type(error), ResourceError)),
        Publication(tmp_path / "out", made_here=lambda folder: True) as publication,
    ):
        failing(error)(publication)
    assert tree(tmp_path) == before


def test_two_runs_cannot_publish_the_same_finished_folder(tmp_path: Path) -> None:
    leave_finished(tmp_path)
    with (
        Publication(tmp_path / "out", made_here=lambda folder: True),
        pytest.raises(RecipeError, match="another run"),
        Publication(tmp_path / "out", made_here=lambda folder: True),
    ):
        pass


def test_only_a_finished_folder_without_marker_is_taken_over(tmp_path: Path) -> None:
    for left in (("tgi",), ("vllm",)):
        fill_layouts(tmp_path / "out.partial", *left)
        (tmp_path / "out.partial" / MARKER_NAME).touch()
        with Publication(tmp_path / "out", made_here=lambda folder: True) as publication:
            assert not publication.finished
    fill_layouts(tmp_path / "out.partial", "tgi", unfinished=("vllm",))
    with pytest.raises(RecipeError, match="not qexport's"):
        Publication(tmp_path / "out", made_here=lambda folder: True).__enter__()


def test_an_old_output_aside_is_put_back_before_a_finished_folder_is_taken_over(tmp_path: Path) -> None:
    """The state after a kill between two renames."""
    leave_finished(tmp_path)
    (old_output(tmp_path) / MARKER_NAME).touch()
    (tmp_path / "out").rename(tmp_path / "out.replaced")
    with Publication(tmp_path / "out", force=True, made_here=lambda folder: True) as publication:
        assert tree(publication.output) == {"old": "old"}
        publication.publish()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["tgi", "vllm"]


def test_while_the_folder_is_published_its_manifest_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker is gone then, so that a kill leaves none in the artifact."""
    seen: list[list[str]] = []

    def watched(source: Path, target: Path) -> Path | None:
        seen.append(names(source))
        with pytest.raises(RecipeError, match="another run"), Publication(target):
            pass
        seen.append(names(source))
        return disk.move_into_place(source, target)

    monkeypatch.setattr(publish, "move_into_place", watched)
    run(tmp_path / "out", Publication.publish)
    assert seen == [[MANIFEST_NAME, "sub"]] * 2
    assert tree(tmp_path / "out") == NEW


def test_an_old_artifact_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    run(tmp_path / "out", Publication.publish)
    (tmp_path / "out" / MANIFEST_NAME).chmod(0o444)
    run(tmp_path / "out", Publication.publish, force=True, text="newer")
    assert tree(tmp_path / "out") == {"sub/weights": "newer", MANIFEST_NAME: "newer"}


@pytest.mark.parametrize(("module", "function"), [(publish, "sync"), (partial, "remove")], ids=["sync", "remove"])
def test_an_error_after_the_rename_says_that_the_artifact_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str
) -> None:
    honest = getattr(module, function)

    def fail_after_rename(path: Path) -> None:
        if path in (tmp_path, tmp_path / "out.partial") and (tmp_path / "out" / "sub").exists():
            raise OSError(errno.EIO, "planted")
        honest(path)

    old_output(tmp_path)
    monkeypatch.setattr(module, function, fail_after_rename)
    with pytest.raises(ResourceError, match="the artifact is complete, but"):
        run(tmp_path / "out", Publication.publish, force=True)
    assert tree(tmp_path / "out") == NEW
    monkeypatch.undo()
    run(tmp_path / "out", Publication.publish, force=True, text="newer")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_folder_stays_where_replacing_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    def fail(*_: Path) -> None:
        raise PermissionError(errno.EACCES, "planted")

    def fail_to_final(source: Path, target: Path) -> Path:
        if source.name == "out.partial":
            fail()
        shutil.move(source, target)
        return target

    if exchange:
        monkeypatch.setattr(disk, "_exchange", fail)
    else:
        monkeypatch.setattr(disk, "_exchange", without_exchange)
        monkeypatch.setattr(Path, "rename", fail_to_final)
    output = old_output(tmp_path)
    with pytest.raises(PermissionError):
        run(output, Publication.publish, force=True)
    assert tree(output) == {"old": "old"}
    assert names(tmp_path) == ["out", "out.partial"]
    assert tree(tmp_path / "out.partial") == NEW


def test_an_old_folder_that_cannot_be_put_back_is_named_and_put_back_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def only_aside(source: Path, target: Path) -> Path:
        if target.name != "out.replaced":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)

    old_output(tmp_path)
    monkeypatch.setattr(disk, "_exchange", without_exchange)
    monkeypatch.setattr(Path, "rename", only_aside)
    with pytest.raises(ResourceError, match="could not be put back") as caught:
        run(tmp_path / "out", Publication.publish, force=True)
    assert caught.value.where == str(tmp_path / "out.replaced")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ValueError, match="later"):
        run(tmp_path / "out", failing(ValueError("later")), force=True)
    assert tree(tmp_path) == {"out/old": "old"}


def test_what_appeared_meanwhile_at_the_final_path_is_not_replaced(tmp_path: Path) -> None:
    def publish_too_late(publication: Publication) -> None:
        old_output(tmp_path)
        publication.publish()

    with pytest.raises(RecipeError, match="not empty"):
        run(tmp_path / "out", publish_too_late)
    assert tree(tmp_path / "out") == {"old": "old"}
    assert names(tmp_path) == ["out"]


def test_two_runs_cannot_write_the_same_output(tmp_path: Path) -> None:
    with Publication(tmp_path / "out") as first:
        fill(first.folder)
        with pytest.raises(RecipeError, match="another run"), Publication(tmp_path / "out"):
            pass
        assert tree(first.folder) == NEW | {MARKER_NAME: ""}
        first.publish()


def test_a_run_that_lost_the_race_does_not_touch_the_published_folder(tmp_path: Path) -> None:
    """It opened the marker before the other run moved it to the final path, and gets the lock afterwards."""
    with Publication(tmp_path / "out") as first:
        fill(first.folder)
        marker = first.folder / MARKER_NAME
        descriptor = os.open(marker, os.O_RDWR)
        first.publish()
    assert not partial._take(descriptor, marker)
    os.close(descriptor)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from qexport.artifact.publish import Publication

    with Publication(Path(sys.argv[1])) as publication:
        (publication.folder / "half").write_text("half")
        (publication.folder / "sub").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(output)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "half").exists()
    with Publication(output) as publication:
        assert names(publication.folder) == [MARKER_NAME]
        fill(publication.folder)
        publication.publish()
    assert tree(output) == NEW


def test_a_partial_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not qexport's"), Publication(tmp_path / "out"):
        pass
    assert tree(tmp_path / "out.partial") == {"thesis.txt": "mine"}


def test_a_link_in_place_of_the_partial_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="taken"), Publication(tmp_path / "out"):
        pass


def test_a_link_in_place_of_the_marker_is_not_followed(tmp_path: Path) -> None:
    """The lock would be taken on a file that is not qexport's."""
    other, folder = tmp_path / "other", tmp_path / "out.partial"
    other.write_text("mine")
    folder.mkdir()
    (folder / MARKER_NAME).symlink_to(other)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)), Publication(tmp_path / "out"):
        pass
    assert other.read_text() == "mine"


def test_a_link_to_a_folder_that_a_killed_run_left_is_removed_and_not_followed(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "out.partial"
    for path in (mine, folder):
        path.mkdir()
    (mine / "thesis.txt").write_text("mine")
    (folder / MARKER_NAME).touch()
    (folder / "link").symlink_to(mine)
    with Publication(tmp_path / "out") as publication:
        assert names(publication.folder) == [MARKER_NAME]
    assert tree(mine) == {"thesis.txt": "mine"}


def test_a_rejected_folder_is_kept_beside_the_output(tmp_path: Path) -> None:
    def reject(publication: Publication) -> None:
        assert publication.reject() == tmp_path / "out.rejected"
        raise ValueError("gate")

    for text in ("first", "second"):
        with pytest.raises(ValueError, match="gate"):
            run(tmp_path / "out", reject, text=text)
        assert tree(tmp_path / "out.rejected") == {"sub/weights": text, MANIFEST_NAME: text}
        assert names(tmp_path) == ["out.rejected"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_in_the_way_of_a_rejected_artifact_is_kept_and_told_before_the_work(tmp_path: Path, kind: str) -> None:
    rejected, mine = tmp_path / "out.rejected", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    match kind:
        case "folder":
            mine.rename(rejected)
        case "file":
            rejected.write_text("mine")
        case "link":
            rejected.symlink_to(mine)
    before = tree(tmp_path)
    with pytest.raises(RecipeError, match="rejected artifact"):
        check_output(tmp_path / "out", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_link_in_place_of_the_rejected_folder_is_not_followed_whatever_lies_there(
    tmp_path: Path, finished: bool
) -> None:
    (tmp_path / "mine").mkdir()
    if finished:
        fill(tmp_path / "mine")
    (tmp_path / "out.rejected").symlink_to(tmp_path / "mine")
    with pytest.raises(RecipeError, match="at the path of the folder for a rejected artifact"):
        check_output(tmp_path / "out", force=True)


def test_a_folder_that_appears_in_place_of_the_rejected_one_is_kept(tmp_path: Path) -> None:
    def reject(publication: Publication) -> None:
        (tmp_path / "out.rejected").mkdir()
        (tmp_path / "out.rejected" / "thesis.txt").write_text("mine")
        publication.reject()

    with pytest.raises(RecipeError, match="not qexport's"):
        run(tmp_path / "out", reject)
    assert tree(tmp_path) == {"out.rejected/thesis.txt": "mine"}


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EIO, "disk failed")]
)
def test_an_error_of_the_disk_is_told_and_leaves_nothing(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(ResourceError, match=f"{words}.*has been removed"):
        run(tmp_path / "out", failing(OSError(code, os.strerror(code))))
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, move = os.fsync, disk.move_into_place

    def record_sync(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removeprefix(str(tmp_path)))
        fsync(descriptor)

    def record_move(source: Path, target: Path) -> Path | None:
        done.append("move")
        return move(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(publish, "move_into_place", record_move)
    with Publication(tmp_path / "deep" / "out") as publication:
        assert done == ["", "/deep"]  # the names of the new folders
        fill(publication.folder)
        publication.publish()
    new = [f"/deep/out.partial{name}" for name in ("", "/sub", "/sub/weights", f"/{MANIFEST_NAME}", f"/{MARKER_NAME}")]
    before = done[2 : done.index("move")]
    assert set(before) == set(new)
    assert before[-1] == new[0]  # without the marker
    assert done[done.index("move") + 1 :] == ["/deep"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with Publication(tmp_path / "out") as publication:
            fill(publication.folder)
            publication.publish()
    finally:
        os.umask(previous)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / MANIFEST_NAME).stat().st_mode & 0o777 == 0o640


def test_too_little_room_is_told_before_any_work(tmp_path: Path) -> None:
    disk.ensure_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(ResourceError, match="not enough room"):
        disk.ensure_space(tmp_path / "not" / "yet" / "there", 10**18)


def test_just_enough_room_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    disk.ensure_space(tmp_path, 1000)
    with pytest.raises(ResourceError, match="not enough room"):
        disk.ensure_space(tmp_path, 1001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["move_into_place", "remove"])
def test_once_it_is_at_its_path_the_artifact_is_finished_whatever_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    """Ctrl-C would leave the marker or the old folder behind, and a run that says that nothing was published."""
    honest = getattr(publish, moment)

    def interrupted(*args: Path) -> object:
        result = honest(*args)
        os.kill(os.getpid(), number)
        return result

    before = signal.signal(number, signal.default_int_handler)
    try:
        monkeypatch.setattr(publish, moment, interrupted)
        run(old_output(tmp_path), Publication.publish, force=True)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert names(tmp_path) == ["out"]
    assert tree(tmp_path / "out") == NEW


def test_the_inputs_of_killed_calls_are_removed_and_nothing_else(tmp_path: Path) -> None:
    killed, foreign = tmp_path / ".out.a.inputs", tmp_path / ".out.b.inputs"
    for folder in (killed, foreign):
        folder.mkdir()
        fill(folder)
    (killed / MARKER_NAME).touch()
    with partial.scratch_folder(tmp_path / "out") as living:
        fill(living)
        assert not killed.exists()
        with partial.scratch_folder(tmp_path / "out"):
            assert (living / "sub" / "weights").exists()
    assert names(tmp_path) == [foreign.name]
