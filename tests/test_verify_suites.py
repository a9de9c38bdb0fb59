"""The suites against whole models in transformers, and the faults that they must name."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import answering_models
import factories
from qexport.architectures.runner import BlockRunner
from qexport.artifact.answers import Answers, Counts
from qexport.artifact.figures import Figure, find_figure
from qexport.artifact.report import Report
from qexport.errors import InputError
from qexport.loading import LoadSettings
from qexport.pipeline.verification import verify
from qexport.progress import Steps, silent
from qexport.recipe import load_recipe
from qexport.reporting.comparison import compare
from qexport.reporting.html import report_html
from qexport.reporting.markdown import report_markdown
from qexport.statistics.paired import mcnemar
from qexport.verifying import VerifySettings, along
from qexport.verifying.along import GivenText, drift_along
from quantized_models import QuantizedModel, Tensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering_models.write(tmp_path_factory.mktemp("answering"))


def measured(folder: Path, artifact: Path, **changes: Any) -> Report:
    values: dict[str, Any] = dict(
        text=str(folder / "held-out.jsonl"), windows=2, max_windows=2, sequence_length=32, profile="off",
        formats={"prompts": str(folder / "formats.jsonl"), "max_new_tokens": 48},
        refusals={"prompts": str(folder / "refusals.jsonl"), "max_new_tokens": 24},
    )  # fmt: skip
    return verify(
        artifact, LoadSettings(base=str(folder / "base")), VerifySettings.model_validate(values | changes), device="cpu"
    )


@pytest.fixture(scope="module")
def sound(folder: Path) -> Report:
    return measured(folder, folder / "base")


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Report:
    """The last block's MLP is damaged so far that its texts break."""
    copy = Path(shutil.copytree(folder / "base", folder / "damaged"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= -1.0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    gates = {
        "format_validity_change": {"at_least": -0.05},
        "refusal_change": {"domains": {"harmful": {"at_least": -0.05}}},
    }
    return measured(folder, copy, gates=gates)


def figure(report: Report, name: str, domain: str | None = None) -> Figure:
    found = find_figure(report.figures, name, domain)
    assert found is not None
    return found


def counts(answers: Answers | None) -> dict[str, Counts]:
    assert answers is not None
    return {each.kind: each for each in answers.counts}


def test_an_artifact_that_equals_its_reference_changes_nothing(sound: Report) -> None:
    assert {kind: (each.prompts, each.reference, each.artifact) for kind, each in counts(sound.formats).items()} == {
        "json": (12, 8, 8), "tools": (4, 4, 4), "code": (4, 4, 4),
    }  # fmt: skip
    assert {kind: (each.prompts, each.reference, each.artifact) for kind, each in counts(sound.refusals).items()} == {
        "harmful": (8, 8, 8), "harmless": (8, 0, 0),
    }  # fmt: skip
    assert figure(sound, "format_kl").value == 0.0
    assert figure(sound, "format_top1_agreement").value == 1.0
    for name, domain in (("format_validity_change", None), ("refusal_change", "harmful")):
        found = figure(sound, name, domain)
        assert found.value == 0.0
        assert found.low is not None
        assert found.low < 0.0
        assert (found.sequence_low, found.sequence_high) == (found.low, found.high)
    assert find_figure(sound.figures, "refusal_change") is None


def test_answers_are_those_that_were_learned_and_reasons_say_why(sound: Report) -> None:
    assert sound.formats is not None
    texts = {answer.prompt: answer for answer in sound.formats.answers}
    assert {prompt: texts[prompt].artifact for prompt in texts} == {
        row["prompt"]: answering_models.ANSWERS[row["prompt"]] for row in answering_models.FORMATS
    }
    assert texts["n of c"].reference_reason == "n: 'three' is not of type 'integer'"


def test_a_damaged_artifact_breaks_formats_and_refusals_and_the_gates_name_them(damaged: Report) -> None:
    assert damaged.formats is not None
    lost = counts(damaged.formats)
    broken = sum(each.only_reference for each in lost.values())
    assert broken == 4 * answering_models.REPEATS
    assert figure(damaged, "format_validity_change").value == pytest.approx(-4 / 5)
    assert figure(damaged, "format_validity_change", "json").value == pytest.approx(-2 / 3)
    assert figure(damaged, "refusal_change", "harmful").value == -1.0
    assert figure(damaged, "format_kl").value > 0.5
    verdicts = {gate.name: gate.verdict for gate in damaged.gates}
    assert verdicts["format_validity_change"] == "fail"
    assert verdicts["refusal_change[harmful]"] == "fail"
    assert lost["json"].p_value == mcnemar(8, 0)
    assert {answer.id[:2] for answer in damaged.formats.changed} == {"j1", "j2", "t1", "c1"}


def test_page_and_comment_show_the_changed_answers(damaged: Report) -> None:
    page = report_html(damaged)
    assert 'href="#suites"' in page
    assert "8 valid" in page
    assert "McNemar" in page
    for answer in damaged.formats.changed[:8] if damaged.formats else []:
        assert f"<bdi>{answer.id}</bdi>" in page
    assert "| refusals, harmful | 8 | 8 refused | 0 refused | 8 | 0 | 0.0078 |" in report_markdown(damaged)
    assert Report.model_validate_json(damaged.to_json()) == damaged


def test_counts_that_are_not_those_of_the_answers_are_a_contradiction(damaged: Report) -> None:
    assert damaged.contradictions() == []
    assert damaged.formats is not None
    wrong = damaged.formats.counts[0].model_copy(update={"artifact": 2})
    content = damaged.model_copy(update={"formats": damaged.formats.model_copy(update={"counts": [wrong]})})
    assert "formats: the counts of json are not those of its answers" in content.contradictions()


def test_reports_on_other_prompts_are_not_compared(sound: Report) -> None:
    assert sound.formats is not None
    other = sound.model_copy(update={"formats": sound.formats.model_copy(update={"sha256": "1" * 64})})
    compare([sound, sound])
    with pytest.raises(InputError, match=r"formats\.sha256: report 1 .* has \w{12}, report 2 .* has 111111111111"):
        compare([sound, other])


def test_a_limit_over_all_requests_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="refusal_change is measured by kind"):
        measured(folder, folder / "base", gates={"refusal_change": {"at_least": -0.1}})


def test_a_missing_file_is_told_before_any_work(folder: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        measured(folder, folder / "base", refusals={"prompts": str(folder / "none.jsonl")})


def test_paths_of_suites_start_from_the_recipe(folder: Path) -> None:
    recipe: dict[str, Any] = {
        "load": {"base": "./base"},
        "quantize": {"method": "none"},
        "export": [{"layout": "safetensors"}],
        "verify": {"text": "held-out.jsonl", "formats": {"prompts": "formats.jsonl"}},
        "output": "out",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    read = load_recipe(path)
    assert read.verify is not None
    assert read.verify.formats is not None
    assert read.verify.formats.prompts == str(folder / "formats.jsonl")
    assert read.portable()["verify"]["formats"]["prompts"] == "formats.jsonl"


TEXTS = [GivenText([5, 9, 7], [3, 4]), GivenText([8], [1, 2, 3, 4, 5, 6]), GivenText([2, 2, 2, 2], [7])]


@dataclass(frozen=True)
class Whole:
    """An artifact that can only be run whole, as a graph can."""

    runner: BlockRunner

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        return self.runner.whole()


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("portion", [1 << 16, 8], ids=["one pass", "several passes"])
def test_drift_along_texts_is_that_of_whole_models(portion: int, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(along, "PORTION_TOKENS", portion)
    intact = QuantizedModel(factories.build(factories.llama_config(), dtype=torch.float32))
    config = {**intact.checkpoint.config, "dtype": "float32"}
    name = "model.layers.1.mlp.down_proj.weight"
    other = factories.build(intact.model.config, dtype=torch.float32)
    other.load_state_dict(changed := {**intact.model.state_dict(), name: intact.model.state_dict()[name].flip(1)})
    architecture = type(intact.checkpoint.architecture)(config)
    ours_by_blocks, theirs_by_blocks = (
        BlockRunner(architecture, Tensors(weights), dtype=torch.float32, device=CPU)
        for weights in (dict(intact.model.state_dict()), changed)
    )
    artifact = theirs_by_blocks if blocks else Whole(theirs_by_blocks)
    found = drift_along(ours_by_blocks, artifact, TEXTS, Steps(silent), "texts")
    for text, tokens in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[*text.prompt, *text.tokens]])
        with torch.no_grad():
            ours, theirs = (
                model(ids).logits[0, len(text.prompt) - 1 : -1].double().log_softmax(-1)
                for model in (intact.model, other)
            )
        expected = (ours.exp() * (ours - theirs)).sum(-1)
        assert tokens.kl[0].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
        assert tokens.reference_top[0].tolist() == ours.argmax(-1).tolist()
        nll = -theirs.gather(1, torch.tensor(text.tokens)[:, None])[:, 0]
        assert tokens.artifact_nll[0].tolist() == pytest.approx(nll.tolist(), rel=1e-4)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """A model without a sliding window, and the same weights with one of 64 tokens: only later positions differ."""
    folder = tmp_path_factory.mktemp("long")
    model = factories.build(factories.mistral_config(sliding_window=None), dtype=torch.float32)
    factories.save(model, folder / "base")
    factories.write_text(folder / "held-out.jsonl", passages=14)
    shutil.copytree(folder / "base", folder / "windowed")
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "windowed/config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    gates = {"late_kl_over_early": {"domains": {"224": {"at_most": 0.5}}}}
    changes: dict[str, Any] = dict(
        windows=8, max_windows=8, sequence_length=64, formats=None, refusals=None, lengths=[224, 64, 4096],
        length_windows=6, needles=2, gates=gates,
    )  # fmt: skip
    return {name: measured(folder, folder / name, **changes) for name in ("base", "windowed")}


def test_a_fault_beyond_the_usual_windows_is_seen_in_long_ones_alone(long: dict[str, Report]) -> None:
    faulty = long["windowed"]
    assert figure(faulty, "mean_kl").value == 0.0
    assert figure(faulty, "length_kl", "64").value == 0.0
    assert figure(faulty, "length_kl", "224").value > 0.0
    assert figure(faulty, "position_kl", "1-64").value == 0.0
    assert figure(faulty, "position_kl", "65-224").value > 0.0
    assert figure(faulty, "late_kl_over_early", "224").value == 1.0
    verdicts = {name: {gate.name: gate.verdict for gate in report.gates} for name, report in long.items()}
    assert verdicts["windowed"]["late_kl_over_early[224]"] == "fail"
    assert verdicts["base"]["late_kl_over_early[224]"] == "pass"


def test_figures_of_positions_add_up_to_those_of_their_length(long: dict[str, Report]) -> None:
    early, late = (figure(long["windowed"], "position_kl", domain) for domain in ("1-64", "65-224"))
    assert early.tokens == 6 * 63
    assert late.tokens == 6 * 160
    both = (early.value * early.tokens + late.value * late.tokens) / (6 * 223)
    assert figure(long["windowed"], "length_kl", "224").value == pytest.approx(both)


def test_lengths_that_cannot_be_measured_are_named(long: dict[str, Report], folder: Path) -> None:
    assert "length 4096 left out: the model has 256 positions" in long["base"].notes
    with pytest.raises(InputError, match=r"no length of verify\.lengths can be measured: length 4096"):
        measured(folder, folder / "base", lengths=[4096])


def test_the_page_shows_lengths_and_recalled_facts(long: dict[str, Report]) -> None:
    report = long["windowed"]
    page = report_html(report)
    assert 'id="lengths"' in page
    assert "positions 65-224" in page
    assert report.needles is not None
    assert [each.kind for each in report.needles.counts] == ["224"]
    assert figure(report, "recall_change").n == 2
    assert "| length 64 |" in report_markdown(report)
    assert report.domains == []
    assert report.contradictions() == []
