"""onnxruntime-genai, in an environment of its own, runs the folders of the layout onnx and says what ONNX Runtime says.

`make test-genai` runs this; `QEXPORT_GENAI_PYTHON` names that environment's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import factories
import onnx_served
import qexport
from qexport.export.onnx.genai import FILE_NAME, TYPES, genai_notes
from qexport.runtimes import RuntimeName, RuntimeSettings
from qexport.runtimes.child import ChildRuntime

PYTHON = os.environ.get("QEXPORT_GENAI_PYTHON", "")
TEXTS = [factories.TEXT[1][:40], onnx_served.PROMPT + ". " + factories.TEXT[0], "Total: 12"]
NEW = 16
NAME: RuntimeName = "onnxruntime-genai"
FAMILIES = {name: config for name, config in factories.FAMILIES.items() if config.model_type in TYPES}

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_GENAI_PYTHON names no interpreter")


def run_genai(folder: Path) -> dict[str, Any]:
    request, response = folder.parent / "request.json", folder.parent / "response.json"
    request.write_text(json.dumps({"texts": TEXTS, "max_tokens": NEW}))
    script = Path(__file__).with_name("generate_with_genai.py")
    run = subprocess.run(
        [PYTHON, script, folder, request, response],
        env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    answer: dict[str, Any] = json.loads(response.read_text())
    return answer


def up_to_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))]


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_runtime_says_what_onnxruntime_says(family: str, attention: onnx_served.Attention, tmp_path: Path) -> None:
    folder = onnx_served.write(tmp_path / "folder", FAMILIES[family], attention)
    answer = run_genai(folder.path)
    tokenizer = factories.tokenizer()
    assert answer["version"].startswith("0.18.")
    assert answer["prompts"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    ends = folder.generation.ends
    expected = [up_to_end(onnx_served.greedy(folder, prompt, NEW), ends) for prompt in answer["prompts"]]
    assert len({token for tokens in expected for token in tokens}) > 5
    assert [up_to_end(tokens, ends) for tokens in answer["alone"]] == expected
    if not genai_notes(folder.config, folder.cache):
        assert [up_to_end(tokens, ends) for tokens in answer["together"]] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_its_log_probabilities_are_those_of_onnxruntime(family: str, tmp_path: Path) -> None:
    """By the path of `--through`."""
    folder = onnx_served.write(tmp_path / "folder", FAMILIES[family])
    ids, settings = factories.tokenizer()(TEXTS[1])["input_ids"], RuntimeSettings(runtime=NAME, python=PYTHON)
    model = qexport.load(folder.path, check=False)
    own = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    with ChildRuntime(settings, folder.path, longest=len(ids) + NEW) as runtime:
        assert (runtime.facts.version[:5], runtime.facts.dtype) == ("0.18.", "float32")
        torch.testing.assert_close(torch.cat(list(runtime.logits(ids))), own, rtol=0.0, atol=1e-4)


def test_a_sliding_window_counts_the_padding_of_a_batch(tmp_path: Path) -> None:
    folder = onnx_served.write(tmp_path / "folder", factories.mistral_config())
    answer = run_genai(folder.path)
    assert genai_notes(folder.config, folder.cache)
    assert answer["together"] != answer["alone"]


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_the_shared_buffer_is_for_fused_attention(attention: onnx_served.Attention, tmp_path: Path) -> None:
    folder = onnx_served.write(tmp_path / "folder", factories.llama_config(), attention)
    alone = run_genai(folder.path)
    content = json.loads((folder.path / FILE_NAME).read_text())
    content["search"]["past_present_share_buffer"] = True
    (folder.path / FILE_NAME).write_text(json.dumps(content))
    if attention == "plain":
        with pytest.raises(AssertionError, match="Non-zero status code"):
            run_genai(folder.path)
    else:
        assert run_genai(folder.path) == alone
