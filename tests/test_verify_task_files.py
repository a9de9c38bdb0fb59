"""Task files: what is read of them, and that nothing in them reaches Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import InputError
from qexport.verifying import names_file
from qexport.verifying.tasks.local_files import read_local_tasks
from task_files import CHOICE, GENERATION, from_the_page, write_task

ROWS: list[dict[str, Any]] = [{"question": "Who?", "choices": ["the miller", "the tide"], "answer": 0}]


def test_the_pages_example_is_read_as_the_page_says(tmp_path: Path) -> None:
    (task,) = read_local_tasks(from_the_page(tmp_path))
    assert task.name == "harbour"
    assert task.splits is not None
    assert [row["answer"] for row in task.splits["test"]] == [0, 1, 1, 2]
    assert task.config["doc_to_text"] == "Question: {{ question }}\nAnswer:"
    assert task.config["metric_list"] == [{"metric": "acc"}, {"metric": "acc_norm"}]
    assert "dataset_kwargs" not in task.config


def test_a_folders_task_files_are_read_in_their_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_task(tmp_path, ROWS, CHOICE, name=name)
    (tmp_path / "a.py").write_text("raise SystemExit")
    assert [task.name for task in read_local_tasks(tmp_path)] == ["a", "b"]


def test_yaml_words_stay_words(tmp_path: Path) -> None:
    text = CHOICE.replace('"{{ choices }}"', "[no, yes, on]")
    (task,) = read_local_tasks(write_task(tmp_path, ROWS, text))
    assert task.config["doc_to_choice"] == ["no", "yes", "on"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("process_docs: !function local.process\n", r"line \d+: the tag !function"),
        ("metadata: !!python/object/apply:os.system ['true']\n", r"line \d+: the tag .*python/object/apply"),
        ("metadata: {deep: [{er: !function os.system}]}\n", r"line \d+: the tag !function"),
        ("? !function os.system\n: 1\n", r"line \d+: the tag !function"),
        ("tag: &a [x]\nmetadata: {a: *a}\n", r"the alias \*a"),
        ("metadata: " + "[" * 5000 + "\n", "more than 20 levels"),
        ("class: local.Task\n", "class: names a Python class"),
        ("process_docs: local.process\n", "process_docs: names a Python function"),
        ("process_results: local.process\n", "process_results: names"),
        ("custom_dataset: local.load\n", "custom_dataset: names"),
        ("include: other.yaml\n", "include: reads another file"),
        ("use_prompt: promptsource:x\n", "use_prompt: loads prompts"),
        ("unsafe_code: true\n", "unsafe_code: runs"),
        ("doc_to_image: [image]\n", "doc_to_image: Extra inputs"),
        ("repeats: 4\n", "repeats: Extra inputs"),
        ("generation_kwargs: {until: ['|'], do_sample: true}\n", "generation_kwargs.do_sample"),
        ("filter_list: [{name: x, filter: [{function: custom, filter_fn: f}]}]\n", "filter_list.0.filter.0.function"),
        ("fewshot_config: {sampler: local.Sampler}\n", "fewshot_config.sampler"),
        ("fewshot_split: train\n", "data_files has no split train"),
    ],
)
def test_what_loads_code_or_means_nothing_is_refused(extra: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "local.py").write_text("raise SystemExit('executed')")
    with pytest.raises(InputError, match=message):
        read_local_tasks(write_task(tmp_path, ROWS, CHOICE + extra))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("metric: acc_norm", "metric: accuracy_of_the_hub", "metric_list.1.metric"),
        ("metric: acc_norm", "metric: acc_norm\n    hf_evaluate: true", "metric_list.1.hf_evaluate"),
        ("dataset_path: json", "dataset_path: ./script.py", "neither json nor the id"),
        ("dataset_path: json", "dataset_path: data/script.py", "neither json nor the id"),
        ("dataset_path: json", "dataset_path: pandas", "neither json nor the id"),
        ("dataset_path: json", "dataset_path: org/name", "neither json nor the id"),
        ("{data_files: {test: local.jsonl}}", "{trust_remote_code: true}", "dataset_kwargs.trust_remote_code"),
        ("{data_files: {test: local.jsonl}}", "{data_files: 'https://host/a.jsonl'}", "must name local files"),
        ("{data_files: {test: local.jsonl}}", "{data_files: {test: missing.jsonl}}", "cannot be read"),
        ("{data_files: {test: local.jsonl}}", "{data_files: {test: []}}", "no items"),
        ("{data_files: {test: local.jsonl}}", "{data_files: {test: local.pkl}}", "must be .jsonl or .json files"),
        ("{data_files: {test: local.jsonl}}", "{data_files: local.jsonl}", "has no split test"),
        ("{data_files: {test: local.jsonl}}", "{}", "needs dataset_kwargs.data_files"),
        ("task: local", "task: local\ntask: again", "not valid YAML"),
        ("task: local", "task: ../local", "task: String should match"),
        ("task: local", "- local", "not valid YAML"),
    ],
)
def test_other_metrics_and_data_are_refused(before: str, after: str, message: str, tmp_path: Path) -> None:
    path = write_task(tmp_path, ROWS, CHOICE)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(InputError, match=message):
        read_local_tasks(path)


def test_a_folder_or_script_that_is_named_like_a_hub_dataset_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hub.yaml"
    path.write_text("task: hub\ndataset_path: org/name\ntest_split: test\n" + GENERATION)
    (task,) = read_local_tasks(path)
    assert task.splits is None
    assert task.config["dataset_path"] == "org/name"
    script = tmp_path / "script.yaml"
    script.write_text(path.read_text().replace("org/name", "org/name.py"))
    with pytest.raises(InputError, match="neither json nor the id"):
        read_local_tasks(script)
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="neither json nor the id"):
        read_local_tasks(path)


def test_rows_with_other_fields_are_refused_in_every_form(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "What?"}]
    path = write_task(tmp_path, rows, CHOICE)
    with pytest.raises(InputError, match="does not have the fields of the first") as caught:
        read_local_tasks(path)
    assert caught.value.where == f"{tmp_path / 'local.jsonl'}:2"
    (tmp_path / "local.json").write_text(json.dumps(rows))
    path.write_text(path.read_text().replace("local.jsonl", "local.json"))
    with pytest.raises(InputError, match="does not have the fields of the first"):
        read_local_tasks(path)
    (tmp_path / "local.json").write_text(json.dumps(ROWS))
    (task,) = read_local_tasks(path)
    assert task.splits == {"test": ROWS}


@pytest.mark.parametrize("content", [b"", b"just text", b"\xff", b"task: \x00", b"1: 2", b"task: [1\n"])
def test_what_is_no_mapping_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_local_tasks(path)


@given(st.text(max_size=60))
def test_any_text_is_a_task_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="ignore")
    with pytest.raises(InputError):
        read_local_tasks(path)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("arc_easy", False),
        ("mmlu_high.school-x", False),
        ("a.yaml", True),
        ("./tasks", True),
        ("/a/b", True),
        ("~/a", True),
    ],
)
def test_names_are_told_from_paths(text: str, file: bool) -> None:
    assert names_file(text) is file
