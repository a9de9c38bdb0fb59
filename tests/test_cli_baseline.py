"""Which baselines are refused, and how, before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import factories
import reports
from qexport.artifact.baseline import DocumentSums
from qexport.artifact.report import Report
from qexport.cli import main
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.text.documents import read_documents
from qexport.text.tokenizers import tokenizer_digest
from qexport.text.windows import make_held_out
from qexport.verifying.divergence import TokenFigures
from qexport.verifying.document_sums import document_sums

WINDOWS = 24
RECIPE: dict[str, Any] = {
    "load": {"base": "./model"},
    "quantize": {"method": "none"},
    "export": [{"layout": "safetensors"}],
    "verify": {"text": "heldout.jsonl", "windows": 8, "max_windows": WINDOWS, "sequence_length": 32, "profile": "off",
               "baseline": "release.json"},
    "output": "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a recipe, and in release.json a report on that text and model."""
    folder = tmp_path_factory.mktemp("made")
    factories.save(factories.build(factories.llama_config()), folder / "model")
    factories.write_text(folder / "heldout.jsonl", seed=2)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    (folder / "release.json").write_text(release(folder).to_json())
    return folder


def release(folder: Path, *, windows: int = WINDOWS) -> Report:
    checkpoint = load_checkpoint(LoadSettings(base=str(folder / "model")))
    documents = read_documents([str(folder / "heldout.jsonl")], field="text")
    identity = reports.identity(text_sha256=documents.sha256, tokenizer_sha256=tokenizer_digest(checkpoint.files))
    protocol = reports.protocol(sequence_length=32, stride=32, windows=windows, tokens=31 * windows)
    sums = measured_sums(checkpoint, documents, windows)
    return reports.report(identity=identity, protocol=protocol, document_sums=sums)


def measured_sums(checkpoint: Any, documents: Any, windows: int) -> DocumentSums:
    held_out = make_held_out(
        documents,
        open_tokenizer(checkpoint),
        windows=WINDOWS,
        sequence_length=32,
        vocab_size=factories.VOCABULARY,
    )
    zero, one = torch.zeros(windows, 31, dtype=torch.float64), torch.zeros(windows, 31, dtype=torch.int32)
    return document_sums(TokenFigures(zero, zero, zero + 0.161, zero, one, one), held_out)


def planned(made: Path, *overrides: str) -> int:
    return main(["plan", str(made / "recipe.yaml"), *overrides])


def refused(
    made: Path, capsys: pytest.CaptureFixture[str], content: Mapping[str, Any] | str, *overrides: str, code: int = 3
) -> str:
    """The message about a report of this content."""
    place = made / "other.json"
    place.write_text(content if isinstance(content, str) else json.dumps(content))
    assert planned(made, f"verify.baseline={place}", *overrides) == code
    said = capsys.readouterr().err
    assert said.count("error:") == said.count("where:") == 1
    return said


def content(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / "release.json").read_text())
    return found


def test_the_plan_names_the_release(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(made) == 0
    assert "baseline  model + adapter, GPTQ 4-bit, group 64, mean KL divergence 0.161 nats; at most " in (
        capsys.readouterr().out
    )
    assert main(["plan", str(made / "recipe.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"]["mean_kl"] == 0.161


def test_without_one_the_plan_says_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(made, "verify.baseline=null") == 0
    assert "baseline" not in capsys.readouterr().out


def test_a_missing_report_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(made, f"verify.baseline={made / 'nowhere'}") == 3
    said = capsys.readouterr().err
    assert "verify.baseline cannot be used: the report cannot be read" in said
    assert "nowhere" in said
    assert "name a report.json, or a folder that was verified" in said


def test_a_run_with_several_layouts_names_their_folders(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("tgi", "vllm"):
        (made / "several" / layout / "report").mkdir(parents=True)
        (made / "several" / layout / "report" / "report.json").write_text((made / "release.json").read_text())
    assert planned(made, f"verify.baseline={made / 'several'}") == 3
    assert "name the folder of one layout: tgi, vllm" in capsys.readouterr().err
    assert planned(made, f"verify.baseline={made / 'several' / 'tgi'}") == 0


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 1}', "\x00"])
def test_a_malformed_report_is_refused(made: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert "verify.baseline cannot be used" in refused(made, capsys, text)


def test_a_report_that_contradicts_itself_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled = content(made)
    spoiled["document_sums"]["kl"][0] = 99.0
    assert "the report contradicts itself: document_sums" in refused(made, capsys, spoiled)


def test_a_report_of_an_earlier_version_is_refused_with_what_to_do(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = content(made)
    del earlier["document_sums"]
    said = refused(made, capsys, earlier)
    assert "recorded no sums by document" in said
    assert "verify the artifact in production again with this recipe" in said


def test_windows_of_another_length_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(made, "verify.sequence_length=48") == 3
    assert "sequence_length: 32 there, 48 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "words"), [("text_sha256", "held-out text: 000000000000 there"), ("tokenizer_sha256", "tokenizer: 0000")]
)
def test_other_tokens_are_refused_and_named(
    made: Path, capsys: pytest.CaptureFixture[str], field: str, words: str
) -> None:
    other = content(made)
    other["identity"][field] = "0" * 64
    said = refused(made, capsys, other)
    assert "measured on other tokens" in said
    assert words in said


def test_too_few_documents_of_the_release_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(made, capsys, release(made, windows=2).to_json(), code=2)
    assert "4 gates can never be decided: the baseline was measured on too few documents" in said
    assert "it has 2 of the 24 windows" in said
    waived = "verify.gates={baseline_mean_kl: null, baseline_top1_agreement: null, baseline_decisive_flips: null, baseline_perplexity_ratio: null}"  # noqa: E501
    assert planned(made, f"verify.baseline={made / 'other.json'}", waived) == 0


def test_limits_on_differences_need_a_baseline(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(made, "verify.baseline=null", "verify.gates={baseline_mean_kl: {at_most: 0.1}}") == 2
    said = capsys.readouterr().err
    assert "there is no baseline to compare with" in said
    assert "verify.gates: baseline_mean_kl" in said


def test_a_url_is_no_report(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(made, "verify.baseline=hub:org/model") == 2
    assert "is not a local file" in capsys.readouterr().err
    assert main(["verify", str(made), "--reference", str(made / "recipe.yaml"), "--baseline", "hub:org/model"]) == 2
    assert "--baseline" in capsys.readouterr().err
