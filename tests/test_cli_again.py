"""The command in a report: it measures the same again, and names no path of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from qexport.cli.verifying import verify_command


def test_local_paths_are_named_by_their_last_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "law.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    overrides = [f"load.base={tmp_path}/base", "load.adapter=../a b", "verify.text=[texts/law.jsonl, /x/code.jsonl]"]
    found = verify_command(".", "recipes/r.yaml", overrides, {"--prompts": ["texts/law.jsonl"], "--gates": [None]})
    assert str(tmp_path) not in found
    assert found == (
        "qexport verify . --reference recipes/r.yaml load.base=base 'load.adapter=a b' "
        "'verify.text=[law.jsonl, code.jsonl]' --prompts law.jsonl"
    )


def test_hub_ids_packages_and_plain_values_stay() -> None:
    overrides = ["load.base=org/model", "load.base=pkg:llm_x/m.gguf", "verify.windows=8", "output=/home/me/out"]
    found = verify_command("art", "org/model", overrides, {"--adapter": ["org/adapter"], "--text": ["./a", "~/b"]})
    assert found == (
        "qexport verify art --reference org/model load.base=org/model load.base=pkg:llm_x/m.gguf verify.windows=8 "
        "--adapter org/adapter --text a --text b"
    )
