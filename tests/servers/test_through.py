"""`--through vllm` on SmolLM2: a sound folder is confirmed, and what is wrong with a served copy is named.

Each copy is served in place of the folder that our reader reads, as a server does that was started with other files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vllm_artifacts as artifacts
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.figures import Figure, GateResult, find_figure
from qexport.gates.serving import decide_served, fidelity_limit
from qexport.loading.small_files import open_tokenizer
from qexport.progress import Steps, silent
from qexport.quantizing.rounding import NearestSource
from qexport.reading.stored_model import open_stored
from qexport.runtimes import RuntimeSettings
from qexport.runtimes.child import ChildRuntime
from qexport.text.documents import read_documents
from qexport.text.windows import make_held_out
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Preparation, Reference
from qexport.verifying.served import measure_served

PYTHON = os.environ.get("QEXPORT_VLLM_PYTHON", "")
LIMIT = fidelity_limit("float16", None, "bfloat16")
LAYER = "model.layers.3"
TEXT = Path(__file__).parents[2] / "calibration" / "heldout.jsonl"

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_VLLM_PYTHON names no interpreter")

Tensors = dict[str, Tensor]


def zero_layer(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.scales"].zero_()


def rolled_scales(tensors: Tensors, config: dict[str, Any]) -> None:
    name = f"{LAYER}.mlp.up_proj.scales"
    tensors[name] = tensors[name].roll(1, 0).contiguous()


def smaller_output(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.self_attn.o_proj.scales"].mul_(0.9)


def half_rotated_keys(tensors: Tensors, config: dict[str, Any]) -> None:
    """Interleaved pairs in place of halves, as older programs store keys."""
    size = config["hidden_size"] // config["num_attention_heads"]
    for name in ("qweight", "scales"):
        stored = tensors[f"{LAYER}.self_attn.k_proj.{name}"]
        heads = stored.view(len(stored), -1, 2, size // 2).transpose(2, 3)
        tensors[f"{LAYER}.self_attn.k_proj.{name}"] = heads.reshape(stored.shape).contiguous()


def other_rope(tensors: Tensors, config: dict[str, Any]) -> None:
    config["rope_theta"] = 10000.0
    config.get("rope_parameters", {})["rope_theta"] = 10000.0


FAULTS: dict[str, Callable[[Tensors, dict[str, Any]], None]] = {
    "a layer zero": zero_layer,
    "scales of a layer rolled": rolled_scales,
    "o_proj x 0.9": smaller_output,
    "half-rotated keys": half_rotated_keys,
    "rope theta": other_rope,
}


def copied(folder: Path, copy: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, copy)
    tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return artifacts.smollm2()


@pytest.fixture(scope="module")
def folders(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("through")
    artifacts.write(checkpoint, artifacts.NONE, {root / "none": artifacts.FORMS["gptq"]})
    artifacts.write(checkpoint, artifacts.GPTQ, {root / "gptq": artifacts.FORMS["gptq"]})
    return {"none": root / "none", "gptq": root / "gptq"}


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    tokenizer = open_tokenizer(checkpoint)
    structure = checkpoint.architecture.structure
    held_out = make_held_out(
        read_documents([str(TEXT)]), tokenizer, windows=6, sequence_length=128, vocab_size=structure.vocab_size
    )
    return Reference(
        merged=checkpoint,
        base=checkpoint,
        adapter=None,
        changed=frozenset(),
        is_rounded=lambda matrix, codes: False,
        nearest=lambda grids, transposed: NearestSource(checkpoint.weights, grids, transposed),
        prepared=Preparation({}),
        held_out=replace(held_out, domains=(None,) * len(held_out.domains)),
        prompts=None,
        open_tokenizer=lambda: tokenizer,
        settings=VerifySettings(text=str(TEXT), windows=6),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


@dataclass(frozen=True)
class Found:
    """What was measured, and the gate on fidelity."""

    figures: list[Figure]
    gate: GateResult

    def value(self, name: str) -> float:
        figure = find_figure(self.figures, name)
        assert figure is not None
        return figure.value


def measured(folder: Path, served: Path, reference: Reference) -> Found:
    settings = RuntimeSettings(runtime="vllm", python=PYTHON, dtype="float16")
    with (
        open_stored(folder, dtype=torch.float32) as artifact,
        ChildRuntime(settings, served, longest=129, programs=Path(__file__).parent) as runtime,
    ):
        found = measure_served(runtime, artifact, reference, lambda figures: [], Steps(silent))
    print(f"\n{served.name}: " + ", ".join(f"{f.name} {f.value:.3g}" for f in found if f.name in SHOWN))
    (gate,) = decide_served([], found, LIMIT, "vllm")
    return Found(found, gate)


SHOWN = ("mean_kl", "perplexity_ratio", "fidelity_kl", "fidelity_top1", "fidelity_flips", "fidelity_continuations")


@pytest.mark.parametrize("name", ["none", "gptq"])
def test_a_sound_folder_is_confirmed(name: str, folders: dict[str, Path], reference: Reference) -> None:
    found = measured(folders[name], folders[name], reference)
    assert found.gate.verdict == "pass"
    assert found.value("fidelity_continuations") > 0.99


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_served_copy_fails(
    fault: str, folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    served = copied(folders["gptq"], tmp_path / fault, FAULTS[fault])
    assert measured(folders["gptq"], served, reference).gate.verdict == "fail"


def test_another_folder_fails(folders: dict[str, Path], reference: Reference) -> None:
    """Here the reference itself is served, so quality alone would be perfect."""
    found = measured(folders["gptq"], folders["none"], reference)
    assert found.gate.verdict == "fail"
    assert found.value("mean_kl") < 0.01


def test_zero_points_that_vllm_ignores_show_in_no_figure(
    folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """Only the digests of the files tell: `qexport validate`."""

    def other_zeros(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{LAYER}.mlp.up_proj.qzeros"].fill_(0x66666666)

    served = copied(folders["gptq"], tmp_path / "zeros", other_zeros)
    assert measured(folders["gptq"], served, reference).gate.verdict == "pass"
