"""The tokenizer that travels with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import factories
from qexport.errors import InputError
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.save(factories.build(factories.llama_config()), tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """The tiny model by links to its files inside the folder's own tree, with tokenizer files to damage."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_tokenizer_encodes_as_the_one_that_was_saved(model: Path) -> None:
    tokenizer, original = open_tokenizer(load_checkpoint(LoadSettings(base=str(model)))), factories.tokenizer()
    for text in factories.TEXT:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.name_or_path == "tiny"


def test_a_tokenizer_that_asks_for_code_is_read_without_it(model: Path) -> None:
    path = model / "tokenizer_config.json"
    evil = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    path.write_text(json.dumps(evil))
    (model / "evil.py").write_text("raise SystemExit('executed')")
    checkpoint = load_checkpoint(LoadSettings(base=str(model)))
    assert b"auto_map" in checkpoint.files["tokenizer_config.json"]
    assert open_tokenizer(checkpoint)("wheel")["input_ids"] == factories.tokenizer()("wheel")["input_ids"]


def test_a_model_without_a_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="the model has no tokenizer"):
        open_tokenizer(load_checkpoint(LoadSettings(base=str(model))))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_an_input_error(model: Path, name: str) -> None:
    (model / name).write_text("{")
    with pytest.raises(InputError):
        open_tokenizer(load_checkpoint(LoadSettings(base=str(model))))
