"""Task accuracy by the harness, against log-likelihoods and continuations that are computed directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
import torch
import tqdm
from transformers import PreTrainedModel

import factories
import qexport
from qexport.architectures.runner import BlockRunner
from qexport.errors import InputError, NumericalError, QexportError, RecipeError
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.verifying import TaskSettings
from qexport.verifying.tasks.measuring import OpenModel, PairedTask, measure_tasks, require_harness
from quantized_models import QuantizedModel
from task_files import CHOICE, GENERATION, from_the_page, write_task

TOKENIZER = factories.tokenizer()
WORDS = ["the wheel", "a grey light", "12 boxes", "midi", "return width", "the harbour at dawn"]
ROWS: list[dict[str, Any]] = [
    {"question": f"{factories.TEXT[i % 5]} {i}", "choices": [WORDS[(i + j) % 6] for j in range(3)], "answer": i % 3}
    for i in range(24)
]


def opened(model: PreTrainedModel) -> OpenModel:
    @contextmanager
    def open_model() -> Iterator[PreTrainedModel]:
        yield model

    return open_model


def measure(ours: PreTrainedModel, theirs: PreTrainedModel, *tasks: Path | str, **settings: Any) -> list[PairedTask]:
    wanted = TaskSettings(tasks=[str(task) for task in tasks], **settings)
    return measure_tasks(opened(ours), opened(theirs), TOKENIZER, wanted, lambda _: None)


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Of the tokens by which the continuation lengthens the context."""
    ids = TOKENIZER(context + continuation)["input_ids"]
    start = len(TOKENIZER(context)["input_ids"])
    logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


def right_by_hand(model: PreTrainedModel, row: dict[str, Any], *, per_character: bool = False) -> bool:
    scores = [log_likelihood(model, row["question"], f" {choice}") for choice in row["choices"]]
    if per_character:
        scores = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
    return scores.index(max(scores)) == int(row["answer"])


@torch.no_grad()
def continued(model: PreTrainedModel, text: str, *, count: int) -> str:
    """The likeliest tokens one by one, up to the stop or the end token."""
    ids = TOKENIZER(text)["input_ids"]
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == TOKENIZER.eos_token_id or "|" in TOKENIZER.decode(ids[start:]):
            break
    return str(TOKENIZER.decode(ids[start:], skip_special_tokens=True)).partition("|")[0]


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    config = factories.llama_config()
    return factories.build(config, dtype=torch.float32), factories.build(config, seed=1, dtype=torch.float32)


Models = tuple[PreTrainedModel, PreTrainedModel]


def test_multiple_choice_agrees_with_log_likelihoods_computed_directly(models: Models, tmp_path: Path) -> None:
    task = write_task(tmp_path, ROWS, CHOICE)
    results = {}
    for metric, per_character in (("acc", False), ("acc_norm", True)):
        (result,) = measure(*models, task, metric=metric)
        for model, measured in zip(models, (result.reference.right, result.artifact.right), strict=True):
            by_hand = tuple(right_by_hand(model, row, per_character=per_character) for row in ROWS)
            assert measured == by_hand
            assert 0 < sum(by_hand) < len(ROWS)
        record = result.record
        assert (record.task, record.metric, record.items, record.num_fewshot) == ("local", metric, 24, 0)
        results[metric] = result
    assert results["acc"].reference.right != results["acc"].artifact.right
    assert results["acc"].reference.right != results["acc_norm"].reference.right


def test_batches_and_limits_change_no_answer(models: Models, tmp_path: Path) -> None:
    task = write_task(tmp_path, ROWS, CHOICE)
    (whole,) = measure(*models, task)
    (batched,) = measure(*models, task, batch_size=5)
    (part,) = measure(*models, task, limit=7)
    assert batched == whole
    assert (part.reference.items, part.artifact.items) == (whole.reference.items[:7], whole.artifact.items[:7])
    assert part.record.sha256 != whole.record.sha256


def test_generated_answers_agree_with_continuations_token_by_token(models: Models, tmp_path: Path) -> None:
    texts = [row["question"] for row in ROWS]
    ours = [continued(models[0], text, count=4) for text in texts]
    rows = [
        {"question": text, "answer": answer if i % 2 else "?"}
        for i, (text, answer) in enumerate(zip(texts, ours, strict=True))
    ]
    (result,) = measure(*models, write_task(tmp_path, rows, GENERATION))
    assert result.record.metric == "exact_match"
    assert result.reference.right == tuple(i % 2 == 1 for i in range(24))
    theirs = [continued(models[1], text, count=4) for text in texts]
    assert result.artifact.right == tuple(row["answer"] == own for row, own in zip(rows, theirs, strict=True))


def test_the_first_chain_of_filters_counts(models: Models, tmp_path: Path) -> None:
    filters = """
filter_list:
  - name: none_is_right
    filter: [{function: regex, regex_pattern: "(never written)"}, {function: take_first}]
  - name: as_it_is
    filter: [{function: take_first}]
"""
    rows = [{"question": ROWS[0]["question"], "answer": continued(models[0], ROWS[0]["question"], count=4)}]
    (plain,) = measure(*models, write_task(tmp_path, rows, GENERATION))
    (filtered,) = measure(*models, write_task(tmp_path, rows, GENERATION + filters))
    assert plain.reference.right == (True,)
    assert (filtered.reference.right, filtered.reference.filter) == ((False,), "none_is_right")


def test_equal_models_differ_in_no_item_and_solved_examples_are_the_same_for_both(
    models: Models, tmp_path: Path
) -> None:
    task = write_task(tmp_path, ROWS, CHOICE)
    (result,) = measure(models[0], models[0], task, num_fewshot=2)
    assert (result.record.only_reference, result.record.only_artifact) == (0, 0)
    assert (result.record.p_value, result.record.num_fewshot) == (1.0, 2)
    (again,), (other,) = (measure(models[0], models[0], task, num_fewshot=2, seed=seed) for seed in (0, 1))
    assert again == result
    assert other.record.sha256 != result.record.sha256


def test_a_graph_in_onnx_runtime_answers_as_its_model_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx_folders
    from qexport.reading.onnx.weights import OnnxWeights
    from qexport.verifying.graphs import GraphRunner

    config = factories.llama_config()
    model = factories.build(config, dtype=torch.float32)
    folder = onnx_folders.llama(dict(model.state_dict()), config, tmp_path / "graph")
    graph = GraphRunner(OnnxWeights(folder, dtype=torch.float32), torch.device("cpu"))
    answers = [{**row, "answer": continued(model, row["question"], count=4)} for row in ROWS]
    tasks = (write_task(tmp_path, ROWS, CHOICE), write_task(tmp_path, answers, GENERATION, name="written"))
    settings = TaskSettings(tasks=[str(task) for task in tasks])
    chosen, written = measure_tasks(opened(model), graph.whole, TOKENIZER, settings, lambda _: None)
    assert 0 < sum(chosen.reference.right) < len(ROWS)
    assert chosen.artifact == chosen.reference
    assert all(written.artifact.right)


@pytest.mark.parametrize("tied", [False, True])
def test_a_block_runners_model_is_measured_and_left_as_it_was(tied: bool, tmp_path: Path) -> None:
    model = factories.build(factories.llama_config(tie_word_embeddings=tied))
    checkpoint = QuantizedModel(model).checkpoint
    runner = BlockRunner(checkpoint.architecture, checkpoint.weights, dtype=torch.bfloat16, device=torch.device("cpu"))
    task = write_task(tmp_path, ROWS, CHOICE)
    settings = TaskSettings(tasks=[str(task)])
    told: list[str] = []
    (result,) = measure_tasks(runner.whole, runner.whole, TOKENIZER, settings, told.append)
    with runner.whole() as whole:
        assert result.reference.right == tuple(right_by_hand(whole, row) for row in ROWS)
    assert result.artifact == result.reference
    assert told == ["local", "local"]


def test_log_probabilities_are_finer_than_the_models_dtype(tmp_path: Path) -> None:
    model = factories.build(factories.llama_config())
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight.mul_(0.1)  # near -6 bfloat16 has steps of 1/32, and many choices now lie closer together
    choices = list("abcdefghijklmnopqrstuvwxyz0123456789")
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        scores = [log_likelihood(model, row["question"], f" {choice}") for choice in choices]
        rows.append({"question": row["question"], "choices": choices, "answer": scores.index(max(scores))})
    (result,) = measure(model, model, write_task(tmp_path, rows, CHOICE))
    assert result.record.reference_accuracy == 1.0


def test_an_artifact_is_measured_as_it_lies_on_disk(tmp_path: Path) -> None:
    model = QuantizedModel(factories.build(factories.llama_config()))
    model.write(tmp_path / "artifact")
    task = write_task(tmp_path, ROWS, CHOICE)
    loaded = qexport.load(tmp_path / "artifact", device="cpu")
    with SafetensorsWeights(tmp_path / "artifact", dtype=torch.bfloat16) as source:
        runner = BlockRunner(source.architecture, source, dtype=torch.bfloat16, device=torch.device("cpu"))
        settings = TaskSettings(tasks=[str(task)])
        (result,) = measure_tasks(opened(loaded), runner.whole, TOKENIZER, settings, lambda _: None)
        with runner.whole() as whole:
            assert result.artifact.right == tuple(right_by_hand(whole, row) for row in ROWS)
    assert result.reference.right == tuple(right_by_hand(loaded, row) for row in ROWS)


def test_the_pages_example_runs(models: Models, tmp_path: Path) -> None:
    from_the_page(tmp_path)
    (result,) = measure(*models, f"{tmp_path}/")
    assert (result.record.task, result.record.items) == ("harbour", 4)


def test_nan_in_the_logits_is_an_error(models: Models, tmp_path: Path) -> None:
    broken = factories.build(factories.llama_config(), dtype=torch.float32)
    with torch.no_grad():
        broken.get_output_embeddings().weight[3, 5] = torch.nan
    rows = [{"question": row["question"], "answer": "?"} for row in ROWS]
    for task in (write_task(tmp_path, ROWS, CHOICE), write_task(tmp_path, rows, GENERATION, name="written")):
        with pytest.raises(NumericalError, match="NaN"):
            measure(models[0], broken, task)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "{{ self.__init__.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target", "description"])
def test_templates_cannot_reach_python(
    template: str, field: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"doc_to_text": '"{{ question }}"', "doc_to_target": "answer", "description": "''"}
    fields[field] = f'"{template}"'
    text = "output_type: multiple_choice\ndoc_to_choice: [a, b]\n" + "".join(f"{k}: {v}\n" for k, v in fields.items())
    with pytest.raises(InputError, match="SecurityError"):
        measure(*models, write_task(tmp_path, ROWS, text))
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("task", "settings", "error", "message"),
    [
        ("no_such_task_anywhere", {}, RecipeError, "has no task"),
        ("humaneval", {}, InputError, "downloaded from the hub as code"),
        ("local.yaml", {"metric": "exact_match"}, RecipeError, "it measures acc, acc_norm"),
    ],
)
def test_refusals(
    task: str, settings: dict[str, Any], error: type[QexportError], message: str,
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, ROWS, CHOICE)
    with pytest.raises(error, match=message):
        measure(*models, task, **settings)


def test_data_that_is_out_of_reach_is_an_input_error(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline, and not in the cache")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match="ConnectionError: offline, and not in the cache"):
        measure(*models, "arc_easy")


def test_a_task_that_comes_twice_is_refused(models: Models, tmp_path: Path) -> None:
    task = write_task(tmp_path, ROWS, CHOICE)
    with pytest.raises(RecipeError, match="is named twice"):
        measure(*models, task, task)


def test_what_the_harness_had_is_put_back_and_nothing_is_printed(
    models: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": row["question"], "answer": "?"} for row in ROWS]
    tasks = (write_task(tmp_path, ROWS, CHOICE), write_task(tmp_path, rows, GENERATION, name="written"))
    before: list[Callable[..., Any] | Any] = [lm_eval.utils.env, tqdm.tqdm.__init__]
    tokenizer = factories.tokenizer()
    tokenizer.pad_token = None
    settings = TaskSettings(tasks=[str(task) for task in tasks])
    measure_tasks(opened(models[0]), opened(models[1]), tokenizer, settings, lambda _: None)
    assert [lm_eval.utils.env, tqdm.tqdm.__init__] == before
    assert "tie_weights" not in vars(models[0])
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")


def test_the_harness_that_is_here_will_do() -> None:
    require_harness()
