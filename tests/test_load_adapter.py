"""Where an adapter's files are."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from qexport.errors import InputError, RecipeError
from qexport.loading import LoadSettings
from qexport.loading.adapter_folder import locate_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("not read")
    return folder


def settings(adapter: Path | str, **values: Any) -> LoadSettings:
    return LoadSettings(base="unused", adapter=str(adapter), **values)


def refusal(adapter: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        locate_adapter(settings(adapter))
    return str(caught.value)


def test_a_recipe_without_an_adapter_has_none() -> None:
    assert locate_adapter(LoadSettings(base="unused")) is None


def test_a_folder_is_found_with_the_digests_of_both_files(adapter: Path) -> None:
    found = locate_adapter(settings(adapter))
    assert found is not None
    assert found.path == adapter
    assert (found.origin.kind, found.origin.name) == ("folder", "my adapter")
    assert found.origin.sha256 == {
        name: hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_an_adapter_without_its_config_is_refused(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refusal(adapter)


def inside(adapter: Path, *names: str) -> Path:
    """A folder with the adapter in subfolders of these names."""
    folder = adapter.parent / "training"
    for name in names:
        shutil.copytree(adapter, folder / name)
    return folder


def test_an_adapter_in_the_only_subfolder_is_found_and_said(adapter: Path) -> None:
    told: list[Any] = []
    found = locate_adapter(settings(inside(adapter, "summaries")), progress=told.append)
    assert found is not None
    assert (found.path.name, found.origin.name) == ("summaries", "summaries")
    assert [event.text for event in told] == ["the adapter is in the subfolder summaries"]


@pytest.mark.parametrize("names", [("checkpoint-500",), ("checkpoint-500", "checkpoint-900"), ("one", "two")])
def test_adapters_in_subfolders_are_named_where_it_is_not_clear_which_is_meant(
    adapter: Path, names: tuple[str, ...]
) -> None:
    text = refusal(inside(adapter, *names))
    assert f"its subfolders do: {', '.join(names)}" in text
    assert f"load.adapter: training/{names[-1]}" in text


def test_an_adapter_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(adapter)


def test_a_pickled_adapter_is_refused_with_the_way_to_convert_it(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    message = refusal(adapter)
    assert "is a pickle" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_file_that_is_a_link_out_of_the_folder_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).rename(adapter.parent / "outside")
    (adapter / name).symlink_to("../outside")
    assert "leads out of the model's folder" in refusal(adapter)


def test_an_adapter_that_is_nowhere_is_refused() -> None:
    assert "load.adapter" in refusal("./absent")


def test_a_revision_of_a_local_adapter_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter.parent)
    with pytest.raises(RecipeError, match="local path 'my adapter'"):
        locate_adapter(settings(adapter.name, adapter_revision="main"))
