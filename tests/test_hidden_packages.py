"""No command lets a dependency import `kernels`, which fetches native code, or bitsandbytes, which asks it for code.

A package of that name is planted before the processes that these tests start; it writes down that it was imported.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import peft
import pytest
from peft import LoHaConfig, LoraConfig
from peft.import_utils import is_bnb_available
from transformers.utils.import_utils import is_bitsandbytes_available

import factories
from adapters import save_adapter
from qexport import hidden_packages
from qexport.hidden_packages import hidden

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 16, "calibration": {"source": "text.jsonl", "samples": 2}},
    "nf4": {"method": "nf4", "double_quant": True},
    "int8": {"method": "int8"},
    "w8a8": {"method": "w8a8"},
    "none": {"method": "none"},
}

CANARY = """\
from pathlib import Path

TRACE = Path(__file__).parents[1] / "trace"
TRACE.write_text("imported")

def get_kernel(*arguments, **options):
    TRACE.write_text("fetched")

def __getattr__(name):
    return lambda *arguments, **options: None
"""

COMMANDS = """\
import json, sys
from qexport.cli import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0, arguments
assert "transformers" in sys.modules
assert not {"kernels", "bitsandbytes"} & sys.modules.keys()
import qexport
model = qexport.load(sys.argv[2], device="cpu")
assert model(input_ids=model.dummy_inputs["input_ids"]).logits.isfinite().all()
assert not {"kernels", "bitsandbytes"} & sys.modules.keys()
"""
"""Every command and the Python door in one process, since the imports take longer than the work."""

ALONE = "import transformers.integrations.hub_kernels, bitsandbytes"
"""bitsandbytes asks for `kernels` on CPUs with AVX512-BF16, that part of transformers on every CPU."""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    folder = tmp_path / "planted"
    for name, content in {
        "kernels/__init__.py": CANARY,
        "kernels-0.18.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n",
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    return folder


def execute(planted: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(planted), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd=planted.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def recipes(folder: Path) -> list[list[str]]:
    """A model with two adapters, one of which PEFT itself merges; every command for each method."""
    model = factories.build(factories.llama_config())
    factories.save(model, folder / "base")
    factories.write_text(folder / "text.jsonl")
    factories.write_text(folder / "held-out.jsonl", seed=1)
    save_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), folder / "lora", spread=0.01)
    save_adapter(model, LoHaConfig(r=2, target_modules=["q_proj"]), folder / "loha", spread=0.01)
    commands = []
    for name, quantize in METHODS.items():
        output = f"{name}-artifact"
        recipe = {
            "load": {"base": "base", "adapter": "loha" if name == "none" else "lora"},
            "quantize": quantize,
            "export": [{"layout": "safetensors"}],
            "verify": {"text": "held-out.jsonl", "windows": 2, "sequence_length": 16, "profile": "off"},
            "output": output,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
        commands += [["plan", f"{name}.yaml"], ["run", f"{name}.yaml"], ["validate", output]]
        commands.append(["verify", output, "--reference", f"{name}.yaml"])
    return commands


def test_neither_commands_nor_the_library_import_kernels_or_bitsandbytes(planted: Path) -> None:
    done = execute(planted, COMMANDS, json.dumps(recipes(planted.parent)), "nf4-artifact")
    assert done.returncode == 0, done.stderr
    assert not (planted / "trace").exists()
    assert "kernels-community" not in done.stdout + done.stderr


def test_without_qexport_the_planted_package_is_imported(planted: Path) -> None:
    done = execute(planted, ALONE)
    assert (planted / "trace").exists(), done.stderr


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if neither package had been imported in this process."""
    for name in ("kernels", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("package")
def test_a_hidden_package_is_as_one_that_is_not_installed() -> None:
    with hidden("bitsandbytes"):
        assert importlib.util.find_spec("bitsandbytes") is None
        with pytest.raises(ImportError), hidden("bitsandbytes"):
            importlib.import_module("bitsandbytes")
        with pytest.raises(ImportError):
            importlib.import_module("bitsandbytes")
    assert importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.parametrize("ask", [is_bnb_available, is_bitsandbytes_available])
@pytest.mark.usefixtures("package")
def test_what_libraries_remember_of_it_is_forgotten(ask: Any) -> None:
    ask.cache_clear()
    with hidden("bitsandbytes"):
        assert not ask()
    assert ask()


def test_the_remembered_answers_are_there() -> None:
    for places in hidden_packages._CACHED_ANSWERS.values():
        for module, function in places:
            assert callable(getattr(importlib.import_module(module), function).cache_clear)


def test_a_package_that_the_program_uses_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", peft)
    with hidden("kernels"):
        assert importlib.import_module("kernels") is peft
    assert sys.modules["kernels"] is peft


@pytest.mark.usefixtures("package")
def test_it_stays_hidden_until_the_last_thread_is_done() -> None:
    first, second = Barrier(2), Barrier(2)
    seen = []

    def work(barrier: Barrier, then: Callable[[], object]) -> None:
        with hidden("kernels"):
            first.wait()
            barrier.wait()
            then()

    other = Thread(target=work, args=(second, lambda: None))
    other.start()
    with hidden("kernels"):
        first.wait()
    seen.append("kernels" in sys.modules)
    second.wait()
    other.join()
    seen.append("kernels" in sys.modules)
    assert seen == [True, False]
