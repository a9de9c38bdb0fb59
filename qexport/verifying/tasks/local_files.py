"""The user's own task files: the part of lm-evaluation-harness's format that is data; nothing that runs code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.reader import ReaderError

from qexport.errors import InputError, listed
from qexport.references import is_hub_id
from qexport.settings import Settings
from qexport.tensors.strict_files import parse_json
from qexport.text.documents import read_json_lines
from qexport.verifying import ENDINGS

Row = dict[str, Any]

_LARGEST: Final = 1 << 20
_DEEPEST: Final = 20
_NO_CODE: Final = "nothing that a task file names is executed: write the task with data and templates only"

_CODE: Final = {
    "class": "names a Python class",
    "custom_dataset": "names a Python function",
    "include": "reads another file: copy its fields into this one",
    "process_docs": "names a Python function",
    "process_results": "names a Python function",
    "unsafe_code": "runs what the model writes",
    "use_prompt": "loads prompts from elsewhere: write them as doc_to_text",
}
"""Fields of the harness that load code or further files, with what they do."""


class _Dataset(Settings):
    """`dataset_kwargs`."""

    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None


class _Metric(Settings):
    """An entry of `metric_list`: one that is 0 or 1 for each item."""

    metric: Literal["acc", "acc_norm", "exact_match"]
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: list[str] | None = None


class _Generation(Settings):
    """`generation_kwargs`: greedy."""

    until: str | list[str]
    max_gen_toks: Annotated[int, Field(ge=1)] = 256
    do_sample: Literal[False] = False
    temperature: Annotated[float, Field(ge=0, le=0)] = 0.0


class _FilterStep(Settings):
    function: Literal["regex", "remove_whitespace", "take_first", "lowercase", "uppercase"]
    regex_pattern: str = ""
    group_select: int = 0
    fallback: str = "[invalid]"


class _Filter(Settings):
    name: str
    filter: Annotated[list[_FilterStep], Field(min_length=1)]


class _Fewshot(Settings):
    sampler: Literal["default", "first_n"] = "default"


class _Content(Settings):
    """The fields of a task file, with the harness's names and defaults."""

    task: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    task_alias: str | None = None
    tag: str | list[str] | None = None
    dataset_path: str
    dataset_name: str | None = None
    dataset_kwargs: _Dataset = _Dataset()
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: Literal["multiple_choice", "generate_until", "loglikelihood"]
    doc_to_text: str | int
    doc_to_target: str | int
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    description: str = ""
    gen_prefix: str | None = None
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    fewshot_config: _Fewshot = _Fewshot()
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    metric_list: Annotated[list[_Metric], Field(min_length=1)] | None = None
    generation_kwargs: _Generation | None = None
    filter_list: Annotated[list[_Filter], Field(min_length=1)] | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class LocalTask:
    """A task file, and the data that it names.

    Attributes:
        name: the task's.
        config: its fields, as the harness takes them.
        splits: the rows of each split; None if they come from a hub dataset.
    """

    name: str
    config: Mapping[str, Any]
    splits: Mapping[str, list[Row]] | None


def read_local_tasks(path: Path) -> list[LocalTask]:
    """The task of a file, or of each `.yaml` and `.yml` file in a folder, in the order of their names.

    Relative `data_files` are relative to the folder of the task file.

    Raises:
        InputError: a file cannot be read or is not a task, would run code, or names data that does not exist.
    """
    if not path.is_dir():
        return [_read_task(path)]
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
    if not files:
        raise InputError("there are no task files in the folder", where=str(path), mend="name them .yaml")
    return [_read_task(file) for file in files]


def _read_task(path: Path) -> LocalTask:
    values = _load(path)
    if code := [f"{name}: {_CODE[name]}" for name in values if name in _CODE]:
        raise InputError("the task file would load code or other files", where=_at(path, code), mend=_NO_CODE)
    try:
        content = _Content.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise InputError(
            "not a task that can be run here", where=_at(path, problems), mend="docs/tasks.md lists the fields"
        ) from error
    config = content.model_dump(exclude_unset=True, exclude={"tag", "dataset_kwargs"})
    return LocalTask(content.task, config | _revision(content), _splits(content, path))


def _revision(content: _Content) -> dict[str, Any]:
    revision = content.dataset_kwargs.revision
    return {"dataset_kwargs": {"revision": revision}} if revision is not None else {}


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"the task file is larger than {_LARGEST} bytes", where=str(path))
        text = path.read_text(encoding="utf-8-sig")
        if code := list(_problems(text)):
            raise InputError("the task file is not plain data", where=_at(path, code), mend=_NO_CODE)
        values = YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (UnicodeDecodeError, ReaderError, MarkedYAMLError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError("a task file must be a mapping of fields", where=str(path))
    return values


def _problems(text: str) -> Iterator[str]:
    """Tags, since `!function` imports Python code; aliases, since few bytes expand to many; too deep nesting."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            yield f"line {line}: more than {_DEEPEST} levels"
            return
        if isinstance(event, AliasEvent):
            yield f"line {line}: the alias *{event.anchor}"
        elif isinstance(event, NodeEvent) and (tag := getattr(event, "tag", None)) is not None:
            yield f"line {line}: the tag {tag}"


def _splits(content: _Content, path: Path) -> dict[str, list[Row]] | None:
    files = content.dataset_kwargs.data_files
    if content.dataset_path != "json":
        _check_hub_id(content.dataset_path, files is not None, path)
        return None
    if files is None or content.dataset_kwargs.revision is not None:
        problem = "dataset_path: json needs dataset_kwargs.data_files, and takes no revision"
        raise InputError(problem, where=str(path))
    named = files if isinstance(files, dict) else {"train": files}
    splits = {
        split: _read_rows([names] if isinstance(names, str) else names, path.parent) for split, names in named.items()
    }
    _check_splits(content, splits, path)
    return splits


def _check_hub_id(name: str, has_files: bool, path: Path) -> None:
    if not is_hub_id(name) or name.endswith(".py") or Path(name).exists() or has_files:
        raise InputError(
            f"dataset_path {name!r} is neither json nor the id of a hub dataset",
            where=str(path),
            mend="write dataset_path: json with dataset_kwargs.data_files, or org/name without data_files",
        )


def _check_splits(content: _Content, splits: Mapping[str, list[Row]], path: Path) -> None:
    named = {content.training_split, content.validation_split, content.test_split, content.fewshot_split} - {None}
    if missing := named - set(splits):
        raise InputError(
            f"data_files has no split {', '.join(sorted(map(str, missing)))}",
            where=str(path),
            mend=f"its splits are {', '.join(splits)}",
        )


def _read_rows(names: list[str], folder: Path) -> list[Row]:
    """The rows of several files. All must have the same fields, since they become one table."""
    rows: list[Row] = []
    for name in names:
        if "://" in name:
            raise InputError("data_files must name local files", where=name, mend="download it, and name the copy")
        for where, row in _read_file(folder / Path(name).expanduser()):
            if rows and row.keys() != rows[0].keys():
                raise InputError("the row does not have the fields of the first one", where=where)
            rows.append(row)
    if not rows:
        raise InputError("it contains no items", where=", ".join(names) or str(folder))
    return rows


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix == ".jsonl":
        yield from read_json_lines(path)
        return
    if path.suffix != ".json":
        raise InputError("data_files must be .jsonl or .json files", where=str(path))
    try:
        rows = parse_json(path.read_bytes(), where=str(path))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("a .json file of items must hold a list of objects", where=str(path))
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def _at(path: Path, problems: list[str]) -> str:
    return listed([f"{path}: {problem}" for problem in problems])
