"""Releases on a model hub: huggingface_hub's own client against a small hub in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars

from hub_server import Hub, Repository, serving
from packages import contents, make_release
from qexport.errors import InputError, RecipeError
from qexport.registries import Package, fetch, parse_destination, publish, refuse_taken

PLACE = parse_destination("hub:org/notes")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub()) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", found.token)
        disable_progress_bars()
        yield found


@pytest.fixture
def release(tmp_path: Path) -> Package:
    return make_release(tmp_path / "release", weights=50_000)


def test_a_release_comes_back_byte_for_byte(hub: Hub, release: Package, tmp_path: Path) -> None:
    published = publish(release, PLACE)
    repository = hub.repositories["org/notes"]
    assert published.reference == "hub:org/notes@1.4.0"
    assert published.digest == repository.tags["1.4.0"]
    assert repository.private
    assert len(hub.objects) == 2, "weights go through LFS"
    for number, reference in enumerate((published.reference, "hub:org/notes", f"hub:org/notes@{published.digest}")):
        fetch(parse_destination(reference), tmp_path / f"pulled-{number}")
        assert contents(tmp_path / f"pulled-{number}") == contents(release.folder)


def test_a_release_is_one_commit_and_replaces_the_last_one(hub: Hub, release: Package, tmp_path: Path) -> None:
    publish(release, PLACE)
    second = make_release(tmp_path / "second", weights=50_000, seed=1)
    (second.folder / "launch/docker-run.sh").unlink()
    sums = (second.folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (second.folder / "SHA256SUMS").write_text("".join(line for line in sums if "launch" not in line))
    publish(Package(**{**vars(second), "version": "1.5.0"}), PLACE)
    repository = hub.repositories["org/notes"]
    assert repository.messages == ["initial commit", "notes 1.4.0", "notes 1.5.0"]
    fetch(parse_destination("hub:org/notes@1.5.0"), tmp_path / "new")
    fetch(parse_destination("hub:org/notes@1.4.0"), tmp_path / "old")
    assert contents(tmp_path / "new") == contents(second.folder)
    assert contents(tmp_path / "old") == contents(release.folder)


def test_an_existing_tag_is_refused(hub: Hub, release: Package) -> None:
    publish(release, PLACE)
    before = len(hub.repositories["org/notes"].messages)
    with pytest.raises(RecipeError, match=r"the tag 1\.4\.0 exists already"):
        publish(release, PLACE)
    assert len(hub.repositories["org/notes"].messages) == before


def test_a_taken_version_is_found_before_anything_is_made(hub: Hub, release: Package) -> None:
    refuse_taken(PLACE, "1.4.0")
    assert hub.repositories == {}
    publish(release, PLACE)
    with pytest.raises(RecipeError, match=r"the tag 1\.4\.0 exists already"):
        refuse_taken(PLACE, "1.4.0")
    refuse_taken(PLACE, "1.5.0")


def test_the_tag_is_the_version(hub: Hub, release: Package) -> None:
    with pytest.raises(RecipeError, match=r"the tag is the version, 1\.4\.0"):
        publish(release, parse_destination("hub:org/notes@main"))
    assert hub.asked == []


def test_a_commit_without_its_tag_is_tagged_the_next_time(hub: Hub, release: Package, tmp_path: Path) -> None:
    hub.fails = {"POST .*/tag/": 400}
    with pytest.raises(InputError, match="the hub refuses: HTTP status 400"):
        publish(release, PLACE)
    assert hub.repositories["org/notes"].tags == {}
    hub.fails.clear()
    publish(release, PLACE)
    fetch(parse_destination("hub:org/notes@1.4.0"), tmp_path / "pulled")


def test_files_that_the_hub_loses_are_noticed_before_the_tag(hub: Hub, release: Package) -> None:
    hub.drops = {"config.json"}
    with pytest.raises(InputError, match=r"has not taken all files.*config\.json"):
        publish(release, PLACE)
    assert hub.repositories["org/notes"].tags == {}


def test_a_changed_file_is_noticed(hub: Hub, release: Package, tmp_path: Path) -> None:
    publish(release, PLACE)
    tree = hub.repositories["org/notes"].trees[hub.repositories["org/notes"].tags["1.4.0"]]
    tree["config.json"] = b"[]"
    with pytest.raises(InputError, match="has changed") as caught:
        fetch(parse_destination("hub:org/notes@1.4.0"), tmp_path / "pulled")
    assert caught.value.where == "hub:org/notes@1.4.0/config.json"
    assert not (tmp_path / "pulled").exists()


def test_an_endless_listing_is_refused(
    hub: Hub, release: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(release, PLACE)
    monkeypatch.setattr("qexport.registries.hub.LISTING_BYTES", 10)
    with pytest.raises(InputError, match="has more than 10 bytes"):
        fetch(PLACE, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"SHA256SUMS": b"", "../evil": b""}, "leads out of the folder"),
        ({"SHA256SUMS": b"", "a/../../evil": b""}, "leads out of the folder"),
        ({"config.json": b"{}"}, "has no SHA256SUMS"),
    ],
)
def test_a_strangers_repository_is_refused(hub: Hub, tmp_path: Path, tree: dict[str, bytes], message: str) -> None:
    hub.repositories["org/notes"] = Repository(private=False)
    hub.repositories["org/notes"].commit(tree, "a commit")
    with pytest.raises(InputError, match=message):
        fetch(PLACE, tmp_path / "pulled")
    assert {path.name for path in tmp_path.iterdir()} <= {"release"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [("hub:org/other", "no such repository"), ("hub:org/notes@9.9", "no such revision")],
)
def test_what_is_not_there_is_said(hub: Hub, release: Package, tmp_path: Path, reference: str, message: str) -> None:
    publish(release, PLACE)
    with pytest.raises(InputError, match=message):
        fetch(parse_destination(reference), tmp_path / "pulled")


def test_a_wrong_token_is_refused_and_not_told(hub: Hub, release: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another_secret")
    with pytest.raises(InputError) as caught:
        publish(release, PLACE)
    assert caught.value.mend is not None
    assert "HF_TOKEN" in caught.value.mend
    assert "another_secret" not in str(caught.value)
