"""Runtimes in environments of their own: a real child process, and every way in which it can fail."""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import qexport.runtimes
from qexport.artifact.served import RuntimeFacts
from qexport.errors import CompatibilityError, InputError, QexportError, ResourceError
from qexport.runtimes import RuntimeSettings
from qexport.runtimes.child import PROGRAMS, ChildRuntime
from runtime_programs.vllm_program import scores

HERE = Path(__file__).with_name("runtime_programs")
PROGRAM = Path(qexport.runtimes.__file__).parent / "programs" / "llama_cpp_program.py"
IDS = [3, 1, 4, 1, 5] * 60


def started(folder: Path, **settings: Any) -> ChildRuntime:
    folder.mkdir(exist_ok=True)
    chosen = RuntimeSettings(runtime="vllm", dtype="float16", **{"timeout": 30, **settings})
    return ChildRuntime(chosen, folder, longest=9, programs=HERE)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildRuntime]:
    with started(tmp_path_factory.mktemp("child") / "sound") as running:
        yield running


def test_it_describes_itself(runtime: ChildRuntime) -> None:
    expected = RuntimeFacts(
        name="vllm", version="1.2", kernels={"Kernel": 3}, dtype="float16", arguments={"longest": "9"}
    )
    assert runtime.facts == expected


def test_scores_come_back_number_for_number(runtime: ChildRuntime) -> None:
    pieces = list(runtime.logits(IDS))
    assert [len(piece) for piece in pieces] == [128, 128, 43]
    assert torch.equal(torch.cat(pieces), torch.from_numpy(scores(IDS)))


def test_continuations_come_back(runtime: ChildRuntime) -> None:
    assert runtime.continued([[1, 2], [6]], 3) == [[2, 3, 4], [6, 0, 1]]


def test_its_tokens_of_texts_come_back(runtime: ChildRuntime, tmp_path: Path) -> None:
    assert runtime.tokenized(["ab", ""]) == [[97, 98], []]
    with started(tmp_path / "takes tokens alone") as running:
        assert running.tokenized(["a"]) is None


def test_what_it_prints_goes_to_the_log(runtime: ChildRuntime) -> None:
    assert b"noise on the standard output\n\xff noise below Python\n" in runtime.log.read_bytes()


def test_the_log_is_removed_and_the_process_ended(tmp_path: Path) -> None:
    with started(tmp_path / "sound") as running:
        log, process = running.log, running._process
        assert log.exists()
    assert process.returncode == 0
    assert not log.exists()


FAULTS: dict[str, tuple[type[QexportError], str, dict[str, Any]]] = {
    "refuses": (CompatibilityError, "vllm cannot load the artifact: ValueError: this folder is not for me", {}),
    "dies": (InputError, r"ended without an answer \(exit status 3\): (.|\n)*about to die", {}),
    "hangs": (ResourceError, "did not answer within 1 s", {"timeout": 1}),
    "grows": (ResourceError, "takes [34].. MB of memory, more than the allowed 300 MB", {"max_memory": "300MB"}),
    "nameless": (InputError, "answered no description of itself", {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_that_fails_is_named_with_its_log(fault: str, tmp_path: Path) -> None:
    kind, message, settings = FAULTS[fault]
    before = time.monotonic()
    with pytest.raises(kind, match=message) as caught, started(tmp_path / fault, **settings):
        pass
    assert time.monotonic() - before < 25
    log = Path(str(caught.value.where).rpartition("the log is ")[2])
    assert "noise on the standard output" in log.read_text(errors="replace")
    log.unlink()


@pytest.mark.parametrize("fault", ["crashes", "crashes in AMX"])
def test_a_crash_is_one_message_with_the_signal_and_what_was_asked(fault: str, tmp_path: Path) -> None:
    """Of llama.cpp one cause is known by its log."""
    (tmp_path / "llama_cpp_program.py").write_text((HERE / "vllm_program.py").read_text())
    (tmp_path / fault).mkdir()
    settings = RuntimeSettings(runtime="llama.cpp", timeout=30)
    with (
        pytest.raises(
            InputError, match=r"llama\.cpp crashed \(SIGSEGV\) when it was asked to score the text"
        ) as caught,
        ChildRuntime(settings, tmp_path / fault, longest=9, programs=tmp_path) as running,
    ):
        list(running.logits(IDS))
    assert ("GCC 12" in caught.value.what) == ("-mno-amx-tile" in str(caught.value.mend)) == fault.endswith("AMX")
    assert "\n" not in caught.value.what
    running.log.unlink()


def test_wrong_answers_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"answered scores of shape \[3, 7\] for 5 tokens"),
        started(tmp_path / "short") as running,
    ):
        list(running.logits(IDS[:5]))
    running.log.unlink()
    with pytest.raises(InputError, match="answered no list of tokens"), started(tmp_path / "short") as running:
        running.continued([[1]], 2)
    running.log.unlink()
    with pytest.raises(InputError, match="no list of tokens for each text"), started(tmp_path / "short") as running:
        running.tokenized(["a", "b"])
    running.log.unlink()


def test_a_stopped_program_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), started(tmp_path / "sound") as running:
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.killpg(running._process.pid, 0)
    running.log.unlink()


def test_an_interpreter_that_is_none_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="vllm cannot be started: No such file"),
        started(tmp_path / "sound", python="/nowhere/python"),
    ):
        pass


def test_every_program_is_there_and_imports_nothing_of_ours() -> None:
    from qexport.runtimes.child import FOLDER

    for name in (*PROGRAMS.values(), "answering"):
        assert "import qexport" not in (text := (FOLDER / f"{name}.py").read_text())
        assert "from qexport" not in text


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "as served"])
def test_llama_cpp_computes_one_forward_for_each_token(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    kind = runpy.run_path(str(PROGRAM))["Model"]
    forwards = list[list[int]]()

    class Llama:
        n_tokens, scores = 1, np.array([[0.0, 1.0]])

        def reset(self) -> None:
            pass

        def eval(self, tokens: list[int]) -> None:
            forwards.append(tokens)

    model = kind.__new__(kind)
    model._exact, model._model = exact, Llama()
    assert model.continued([[5]], 3) == [[1, 1, 1]]
    assert len(forwards) == 3
