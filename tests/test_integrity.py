"""An artifact that says when it was changed: every flipped bit, every truncation, and what does not belong into it.

`make test-integrity` flips every bit and cuts every file at every length. `make test` takes every byte of the listing,
whose own digest is outside the folder, and a spread sample of the others: of these every byte is under SHA-256.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qexport
from qexport.artifact.agreement import disagreements, read_report
from qexport.artifact.digests import sha256_file
from qexport.artifact.integrity import find_artifact, open_artifact, write_listing
from qexport.artifact.manifest import LISTING_NAME, MANIFEST_NAME, Manifest
from qexport.artifact.publish import check_output
from qexport.artifact.roots import check_roots_path, recorded_roots, recording_roots
from qexport.cli import main
from qexport.errors import InputError, RecipeError
from qexport.pipeline.inspection import inspect_artifact
from test_cli import tiny_run

EVERY = "QEXPORT_EVERY_BIT" in os.environ
SAMPLE, BIG_SAMPLE = 150, 2000
"""Places per file in `make test`; places per weight file in `make test-integrity`, where a digest covers the rest."""

BIG = 1 << 17


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, what it names, and its verified artifact in `out`."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["run", str(tiny_run(folder)), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy with its root digest beside it."""
    shutil.copy(made / "out.sha256", tmp_path)
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def alone(artifact: Path) -> Path:
    """Without the root digest beside it."""
    (artifact.parent / "out.sha256").unlink()
    return artifact


def relisted(artifact: Path) -> Path:
    """With digests that were made to fit after a change, by someone who cannot change the root digest elsewhere."""
    path = artifact / MANIFEST_NAME
    content = json.loads(path.read_text())
    for name, record in content["files"].items():
        record |= {"sha256": sha256_file(artifact / name), "size": (artifact / name).stat().st_size}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (artifact / LISTING_NAME).unlink()
    write_listing(artifact, Manifest.read(artifact))
    return artifact


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def names(artifact: Path) -> list[str]:
    return sorted(path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file())


def places(size: int, name: str) -> Iterator[int]:
    """Positions in a file: all, or a sample with both ends."""
    wanted = BIG_SAMPLE if size > BIG and EVERY else SAMPLE
    if size <= wanted or name == LISTING_NAME or (EVERY and size <= BIG):
        return iter(range(size))
    return iter(sorted({0, size - 1, *range(0, size, size // wanted)}))


def test_sha256sum_reads_both_lists(artifact: Path) -> None:
    for folder, file in ((artifact.parent, "out.sha256"), (artifact, LISTING_NAME)):
        done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", file], cwd=folder, check=False)
        assert done.returncode == 0
    listed = [line.split("  ")[1] for line in (artifact / LISTING_NAME).read_text().splitlines()]
    assert listed == [name for name in names(artifact) if name != LISTING_NAME]


def test_every_flipped_bit_is_found(artifact: Path) -> None:
    """Without the root digest: the listing is checked against manifest and files, and these against the listing."""
    alone(artifact)
    undetected: list[str] = []
    for name in names(artifact):
        content = (artifact / name).read_bytes()
        with (artifact / name).open("r+b", buffering=0) as file:  # a file that is written anew waits for the disk
            for at in places(len(content), name):
                for bit in range(8) if EVERY else (at % 8,):
                    os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
                    if not refused(artifact):
                        undetected.append(f"{name}, byte {at}, bit {bit}")
                os.pwrite(file.fileno(), content[at : at + 1], at)
    assert undetected == []
    assert open_artifact(artifact).root is not None


def test_every_truncation_is_found(artifact: Path) -> None:
    alone(artifact)
    undetected: list[str] = []
    for name in names(artifact):
        path = artifact / name
        content = path.read_bytes()
        for length in sorted(places(len(content), name), reverse=True):
            os.truncate(path, length)
            if not refused(artifact):
                undetected.append(f"{name}, {length} of {len(content)} bytes")
        path.unlink()
        if not refused(artifact):
            undetected.append(f"{name}, removed")
        path.write_bytes(content)
    assert undetected == []


def refused(artifact: Path) -> bool:
    try:
        open_artifact(artifact)
    except InputError:
        return True
    return False


def fresh(folder: Path, make: Callable[[Path], None] = Path.touch) -> Path:
    """A new entry, to be moved into folders that do not exist yet."""
    make(folder / "fresh")
    return folder / "fresh"


PLANTED: dict[str, Callable[[Path], object]] = {
    "modeling_evil.py": lambda path: path.write_text("import os"),
    "report/more.html": lambda path: path.write_text("<script>"),
    "launch/deep/er/file": lambda path: os.renames(fresh(path.parents[4]), path),
    "empty": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to("config.json"),
    "linked folder": lambda path: path.symlink_to("/etc", target_is_directory=True),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
    "a\nb": lambda path: path.write_text(""),
    ".cache/huggingface/pipe": lambda path: os.renames(fresh(path.parents[3], os.mkfifo), path),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_nothing_lists_and_what_is_no_file_is_refused(
    artifact: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact)  # the path of a socket must be short
    PLANTED[name](artifact / name)
    for reader in (inspect_artifact, qexport.load, read_report):
        with pytest.raises(InputError, match=r"is not listed|symbolic link|neither a file") as caught:
            reader(artifact)
        assert str(caught.value.where).startswith(str(artifact / name.split("/", maxsplit=1)[0]))


def test_a_listed_file_that_became_a_link_is_refused(artifact: Path) -> None:
    shutil.move(artifact / "config.json", artifact.parent / "config.json")
    (artifact / "config.json").symlink_to(artifact.parent / "config.json")
    with pytest.raises(InputError, match="symbolic link"):
        open_artifact(artifact)


def test_hard_links_and_what_the_hub_adds_stay_fine(artifact: Path) -> None:
    os.link(artifact / "model.safetensors", artifact.parent / "shared")
    (artifact / ".gitattributes").write_text("*.safetensors filter=lfs")
    open_artifact(artifact)
    (artifact / ".cache" / "huggingface").mkdir(parents=True)
    (artifact / ".cache" / "huggingface" / "download.metadata").write_text("x")
    lines = inspect_artifact(artifact).lines()
    (artifact / ".gitattributes.py").write_text("")
    with pytest.raises(InputError, match="is not listed"):
        open_artifact(artifact)
    assert "not checked: .cache/huggingface/download.metadata" in lines
    assert "not checked: .gitattributes" in lines


def test_the_words_say_what_was_compared(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sha256_file(artifact / LISTING_NAME)
    kept = "every file is listed and has its digest"
    assert main(["validate", str(artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"digests   unchanged: {kept}, and the root digest is the one in out.sha256" in lines
    assert f"root      {root}" in lines
    alone(artifact)
    assert main(["validate", str(artifact)]) == 0
    words = "nothing outside the folder confirms the list (no root digest to compare with)"
    assert f"digests   {kept}; {words}" in capsys.readouterr().out.splitlines()
    assert main(["validate", str(artifact), "--root", root, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["root"], document["confirmed_by"]) == (root, "the given one")
    assert main(["validate", str(artifact), "--root", "0" * 64]) == 3
    assert f"its root digest is {root}, not {'0' * 64}" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["report/report.html", "config.json", "README.md", MANIFEST_NAME])
def test_a_change_whose_digests_were_made_to_fit_shows_in_the_root_digest(artifact: Path, file: str) -> None:
    if file == MANIFEST_NAME:
        edit_json(artifact / file, lambda content: content["notes"].append("trust me"))
    else:
        edit(artifact / file, "\n", "\n ")
    relisted(artifact)
    with pytest.raises(InputError, match="its root digest is") as caught:
        open_artifact(artifact)
    assert str(artifact.parent / "out.sha256") in str(caught.value.where)
    assert open_artifact(alone(artifact)).confirmed_by is None  # nobody can tell


EDITED: dict[str, Callable[[dict[str, Any]], object]] = {
    "verification.gates": lambda content: content["verification"]["gates"][0].update(reason="as it should be"),
    "verification.figures": lambda content: content["verification"]["figures"][0].update(value=1.0),
    "verification.report_sha256": lambda content: content["verification"].update(report_sha256="0" * 64),
    "base, base.sha256": lambda content: content["base"].update(sha256={"model.safetensors": "0" * 64}),
    "base": lambda content: content["base"].update(name="another"),
    "adapter": lambda content: content["adapter"].update(name="another"),
    "layout": lambda content: content.update(layout="tgi"),
    "layers": lambda content: content["layers"][0].update(loss=0.0),
    "sizes": lambda content: content["sizes"].update(total_bytes=1),
    "environment": lambda content: content["environment"].update(torch="3.0"),
    "qexport_version": lambda content: content.update(qexport_version="9"),
}


@pytest.mark.parametrize("fields", EDITED)
def test_manifest_and_report_must_agree(artifact: Path, fields: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(artifact / MANIFEST_NAME, EDITED[fields])
    alone(relisted(artifact))
    for command in ("validate", "report"):
        assert main([command, str(artifact)]) == 3
        assert f"manifest and report contradict each other: {fields}".split(",")[0] in capsys.readouterr().err
    found = disagreements(Manifest.read(artifact), qexport.Report.read(artifact))
    assert found == fields.split(", ")


@pytest.mark.parametrize("change", [{"bits": 2}, {"group_size": 64}, {"method": "int8"}], ids=str)
def test_layers_of_the_manifest_are_held_against_the_weights(
    made: Path, artifact: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bits loosened the gates of `verify`. All digests are made to fit, and the report, which tells, is removed."""
    edit_json(artifact / MANIFEST_NAME, lambda content: [layer.update(change) for layer in content["layers"]])
    alone(relisted(artifact))
    shutil.rmtree(artifact / "report")
    for command in (["validate"], ["verify", "--reference", str(made / "recipe.yaml")]):
        assert main([*command, str(artifact)]) == 3
        assert "the manifest's layers are not those of the artifact" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["quantization", "sizes"])
def test_the_manifests_sizes_and_config_are_held_against_the_weights(artifact: Path, key: str) -> None:
    field = {"quantization": "bits", "sizes": "total_bytes"}[key]
    edit_json(artifact / MANIFEST_NAME, lambda content: content[key].update({field: 2}))
    alone(relisted(artifact))
    shutil.rmtree(artifact / "report")
    with pytest.raises(InputError, match="quantization or total_bytes"):
        inspect_artifact(artifact)


def test_a_report_may_be_removed_as_a_whole(artifact: Path) -> None:
    shutil.rmtree(artifact / "report")
    found = inspect_artifact(artifact)
    assert (found.report, found.artifact and found.artifact.confirmed_by) == ("missing", "the one in out.sha256")
    (artifact / "report").mkdir()
    assert inspect_artifact(artifact).report == "missing"
    (artifact / "report" / "report.md").write_text("")
    with pytest.raises(InputError, match="is missing"):
        inspect_artifact(artifact)


@pytest.mark.parametrize("name", [LISTING_NAME, MANIFEST_NAME])
def test_neither_list_can_be_left_out(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(InputError, match=f"{name}, is missing" if name == LISTING_NAME else "is missing"):
        find_artifact(artifact)
    (artifact / LISTING_NAME).unlink(missing_ok=True)
    (artifact / MANIFEST_NAME).unlink(missing_ok=True)
    with pytest.raises(InputError, match="should have the root digest"):
        find_artifact(artifact)
    assert find_artifact(alone(artifact)) is None


def test_an_artifact_of_an_older_version_has_no_listing(artifact: Path) -> None:
    edit_json(artifact / MANIFEST_NAME, lambda content: content.pop("listing"))
    (artifact / LISTING_NAME).unlink()
    lines = inspect_artifact(alone(artifact)).lines()
    assert any("manifest and report have none: qexport 0.2 or older" in line for line in lines)
    (artifact / "stray").write_text("")
    with pytest.raises(InputError, match="is not listed"):
        inspect_artifact(artifact)
    (artifact / "stray").unlink()
    edit(artifact / "README.md", "\n", "\n\n")
    with pytest.raises(InputError, match="has changed"):
        inspect_artifact(artifact)


def test_load_compares_what_it_reads_and_says_where_it_does_not(artifact: Path) -> None:
    edit(artifact / "README.md", "\n", "\n\nmine\n\n")
    qexport.load(artifact)
    edit(artifact / "generation_config.json", "{", "{ ")
    with pytest.raises(InputError, match="has changed since it was written"):
        qexport.load(artifact)
    with pytest.warns(UserWarning, match="without comparing its files with their digests"):
        qexport.load(artifact, check=False)


@pytest.mark.parametrize("command", ["report", "gate"])
def test_report_and_gate_compare_what_they_read(
    artifact: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (artifact.parent / "gates.yaml").write_text("profile: off")
    options = ["--gates", str(artifact.parent / "gates.yaml")] if command == "gate" else []
    edit_json(artifact / "report" / "report.json", lambda content: content["timings"].update(seconds=1.0))
    for path in (artifact, artifact / "report", artifact / "report" / "report.json"):
        assert main([command, str(path), *options]) == 3
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "has changed since it was written" in captured.err
        assert main([command, str(path), *options, "--unchecked"]) == 0
        assert "was not compared with its digests" in capsys.readouterr().err.replace("\n", " ")


def test_a_report_is_not_written_into_an_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (artifact / "report", artifact / "new" / "deep"):
        assert main(["verify", str(artifact), "--reference", "none.yaml", "--report", str(place)]) == 2
        assert "is inside an artifact" in capsys.readouterr().err
    open_artifact(artifact)


def test_folder_and_root_digest_can_be_renamed_together(artifact: Path) -> None:
    there = artifact.parent / "v1"
    artifact.rename(there)
    assert open_artifact(there).confirmed_by is None
    (artifact.parent / "out.sha256").rename(artifact.parent / "v1.sha256")
    assert open_artifact(there).confirmed_by == "the one in v1.sha256"
    (artifact.parent / "latest").symlink_to("v1")
    assert open_artifact(artifact.parent / "latest").confirmed_by == "the one in v1.sha256"


def test_several_layouts_have_one_file_beside_them(artifact: Path) -> None:
    above = artifact.parent / "all"
    for layout in ("one", "two"):
        shutil.copytree(artifact, above / layout)
    roots = {layout: sha256_file(above / layout / LISTING_NAME) for layout in ("one", "two")}
    with recording_roots(above, roots):
        pass
    assert open_artifact(above / "one").confirmed_by == "the one in all.sha256"
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "all.sha256"], cwd=above.parent, check=False)
    assert done.returncode == 0
    with recording_roots(above, roots | {"two": "0" * 64}):
        open_artifact(above / "two")  # until the other one is in its place
    with pytest.raises(InputError, match="its root digest is"):
        open_artifact(above / "two")


def test_an_output_that_is_not_published_leaves_no_root_digest(tmp_path: Path) -> None:
    def fail() -> None:
        with recording_roots(tmp_path / "out", {".": "0" * 64}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_run_records_its_root_digest_and_replaces_only_its_own(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [str(made / "recipe.yaml"), "--device", "cpu", "verify=null", "--json"]
    recipe += ["quantize={method: nf4}", "--output", str(tmp_path / "out")]
    for taken in ("out.sha256", "out.rejected.sha256"):
        (tmp_path / taken).write_text("of the user\n")
        assert main(["run", *recipe]) == 2
        assert "a file that is not qexport's is where the root digest is written" in capsys.readouterr().err
        (tmp_path / taken).unlink()
    assert main(["run", *recipe]) == 0
    roots = json.loads(capsys.readouterr().out)["roots"]
    assert roots == {"safetensors": sha256_file(tmp_path / "out" / LISTING_NAME)}
    first = (tmp_path / "out.sha256").read_text()
    assert first == f"{roots['safetensors']}  out/{LISTING_NAME}\n"
    assert main(["run", *recipe, "--force"]) == 0
    assert (tmp_path / "out.sha256").read_text() == first, "nothing was measured, so the bytes are the same"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.sha256"]


@pytest.mark.parametrize("name", ["a\nb", "a\udcff"])
def test_an_output_whose_name_is_no_text_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="no text"):
        check_output(tmp_path / name, force=False)


def test_root_digests_that_the_disk_cannot_read_are_not_called_another_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_roots(tmp_path / "out", {".": "0" * 64}):
        (tmp_path / "out").mkdir()

    def unreadable(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(OSError, match="Input/output"):
        check_roots_path(tmp_path / "out")


def test_a_folder_at_the_root_of_the_file_system_has_no_file_above_it() -> None:
    assert recorded_roots(Path("/")) == recorded_roots(Path("/no-such-artifact")) == {}
