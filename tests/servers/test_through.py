"""`--through vllm` on SmolLM2 with an adapter: sound folders are confirmed, and faults in a served copy are named.

Each folder is served in place of the one that our reader reads, as a server does that was started with other files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import served_faults as faults
import vllm_artifacts as artifacts
from endpoint_of_vllm import serving
from qexport.architectures.architecture import Checkpoint
from qexport.artifact.figures import Figure, GateResult, find_figure
from qexport.artifact.served import RuntimeFacts
from qexport.errors import InputError
from qexport.gates.limits import Limit
from qexport.gates.serving import decide_served, fidelity_limit, limits_of_runtime
from qexport.loading import LoadSettings
from qexport.pipeline.verification import verify
from qexport.progress import Steps, silent
from qexport.reading.stored_model import open_stored
from qexport.runtimes import RuntimeSettings, ServedDtype
from qexport.runtimes.child import ChildRuntime
from qexport.runtimes.endpoints import open_endpoint
from qexport.verifying import VerifySettings
from qexport.verifying.reference import Reference
from qexport.verifying.sampled import FromEndpoint, measure_endpoint
from qexport.verifying.served import measure_served
from references import make_reference

PYTHON = os.environ.get("QEXPORT_VLLM_PYTHON", "")
LIMITS = {
    dtype: limits_of_runtime(fidelity_limit(dtype, None, "bfloat16"), rounds=False) for dtype in ("float16", "bfloat16")
}
DRIFT = limits_of_runtime(None, rounds=True)
SETTINGS = VerifySettings(
    text=str(artifacts.ROOT / "calibration" / "heldout.jsonl"),
    windows=24,
    max_windows=24,
    sequence_length=64,
    profile="off",
)
SHORT = SETTINGS.model_copy(update={"windows": 2, "max_windows": 2})
SHOWN = ("mean_kl", "perplexity_ratio", "fidelity_kl", "fidelity_top1", "fidelity_continuations", "kl_over_reading")

pytestmark = pytest.mark.skipif(not PYTHON, reason="QEXPORT_VLLM_PYTHON names no interpreter")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return artifacts.smollm2(artifacts.ADAPTER)


@pytest.fixture(scope="module")
def folders(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, form = tmp_path_factory.mktemp("through"), artifacts.FORMS["gptq"]
    found = {name: root / name for name in ("none", "gptq", "without adapter", "w8a8")}
    artifacts.write(checkpoint, artifacts.NONE, {found["none"]: form})
    artifacts.write(checkpoint, artifacts.GPTQ, {found["gptq"]: form})
    artifacts.write(checkpoint, artifacts.W8A8, {found["w8a8"]: form})
    artifacts.write(artifacts.smollm2(), artifacts.GPTQ, {found["without adapter"]: form})
    return found


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return make_reference(checkpoint, SETTINGS)


@dataclass(frozen=True)
class Found:
    """What was measured of a runtime."""

    facts: RuntimeFacts
    figures: list[Figure]

    def value(self, name: str) -> float:
        figure = find_figure(self.figures, name)
        assert figure is not None
        return figure.value

    def failed(self, dtype: str = "float16", of_runtime: Sequence[Limit] | None = None) -> list[str]:
        limits = LIMITS[dtype] if of_runtime is None else of_runtime
        gates: list[GateResult] = decide_served([], self.figures, limits, "vllm")
        assert all(gate.verdict in ("pass", "fail") for gate in gates)
        return [gate.name for gate in gates if gate.verdict == "fail"]


def measured(served: Path, reference: Reference, *folders: Path, dtype: ServedDtype = "float16") -> list[Found]:
    """How far a server that has one folder is from our reading of each of these."""
    settings = RuntimeSettings(runtime="vllm", python=PYTHON, dtype=dtype)
    found = list[Found]()
    with ChildRuntime(settings, served, longest=129, programs=Path(__file__).parent) as runtime:
        for folder in folders:
            with open_stored(folder, dtype=torch.float32) as artifact:
                figures = measure_served(runtime, artifact, reference, lambda figures: [], Steps(silent))
            found.append(Found(runtime.facts, figures))
            values = ", ".join(f"{name} {found[-1].value(name):.3g}" for name in SHOWN)
            kernels = runtime.facts.kernels
            print(f"\n{served.name} as {folder.name} in {dtype}: {values}; {kernels}", file=sys.stderr)
    return found


def test_a_sound_folder_is_confirmed(folders: dict[str, Path], reference: Reference) -> None:
    (found,) = measured(folders["gptq"], reference, folders["gptq"])
    assert found.failed() == []
    assert found.value("fidelity_continuations") > 0.99


def test_unquantized_weights_are_confirmed_and_are_no_other_folder(
    folders: dict[str, Path], reference: Reference
) -> None:
    """In place of the 4-bit folder the reference itself is served, so quality alone would be perfect."""
    own, other = measured(folders["none"], reference, folders["none"], folders["gptq"])
    assert own.failed() == []
    assert other.failed() == ["fidelity_kl through vllm"]
    assert other.value("mean_kl") < 0.01


@pytest.mark.parametrize("fault", faults.SEEN)
def test_a_fault_in_the_served_copy_fails(
    fault: str, folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    served = faults.copied(folders["gptq"], tmp_path / fault, faults.SEEN[fault])
    (found,) = measured(served, reference, folders["gptq"])
    assert found.failed() == ["fidelity_kl through vllm"]


def test_a_missing_adapter_fails(folders: dict[str, Path], reference: Reference) -> None:
    (found,) = measured(folders["without adapter"], reference, folders["gptq"])
    assert found.failed() == ["fidelity_kl through vllm"]


def test_another_dtype_fails_and_is_told(folders: dict[str, Path], reference: Reference) -> None:
    (found,) = measured(folders["gptq"], reference, folders["gptq"], dtype="bfloat16")
    assert found.failed("float16") == ["fidelity_kl through vllm"]
    assert found.facts.dtype == "bfloat16"


def test_bfloat16_is_confirmed_unless_vllm_rounds_the_inputs(
    folders: dict[str, Path], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM does by default on CPUs with AMX."""
    (found,) = measured(folders["gptq"], reference, folders["gptq"], dtype="bfloat16")
    assert found.failed("bfloat16") == []
    assert found.facts.arguments["VLLM_CPU_INT4_W4A8"] == "0"
    if not torch.cpu._is_amx_tile_supported():
        return
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    (rounded,) = measured(folders["gptq"], reference, folders["gptq"], dtype="bfloat16")
    assert rounded.failed("bfloat16") == ["fidelity_kl through vllm"]
    assert any(name.endswith("with int8 inputs") for name in rounded.facts.kernels)


def test_what_vllm_does_not_look_at_shows_in_the_bytes_alone(
    folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """It ignores the zero points of symmetric codes, which our reader refuses, and is given token ids."""
    served = faults.copied(folders["gptq"], tmp_path / "zeros and tokenizer", faults.other_zeros)
    faults.give_other_tokenizer(served)
    (found,) = measured(served, reference, folders["gptq"])
    assert found.failed() == []
    load = LoadSettings(base=artifacts.BASE, adapter=str(artifacts.ADAPTER))
    with pytest.raises(InputError, match="the zero points differ"):
        verify(served, load, SHORT, device="cpu")
    renamed = faults.copied(folders["gptq"], tmp_path / "tokenizer")
    faults.give_other_tokenizer(renamed)
    report = verify(renamed, load, SHORT, device="cpu")
    assert {gate.name for gate in report.gates if gate.verdict == "fail"} == {"files", "tokenizer"}


def test_rounded_activations_drift_as_far_as_our_reading_says(
    folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """The two are as far from each other as from the reference, so fidelity proves nothing here. On CPUs with AMX,
    vLLM's int8 kernel has no float16.
    """
    (sound,) = measured(folders["w8a8"], reference, folders["w8a8"], dtype="bfloat16")
    assert sound.failed(of_runtime=DRIFT) == []
    assert sound.failed("bfloat16") == ["fidelity_kl through vllm"]
    damaged = faults.copied(folders["w8a8"], tmp_path / "damaged w8a8", faults.zero_rows)
    (found,) = measured(damaged, reference, folders["w8a8"], dtype="bfloat16")
    assert found.failed(of_runtime=DRIFT) == ["kl_over_reading at_most through vllm"]


def through_endpoint(served: Path, folder: Path, reference: Reference, dtype: ServedDtype, log: Path) -> FromEndpoint:
    """What vLLM's own server that has one folder makes of another one."""
    with (
        serving(PYTHON, served, dtype, log) as url,
        open_stored(folder, dtype=torch.float32) as artifact,
    ):
        settings = RuntimeSettings(url=url, dtype=dtype)
        endpoint = open_endpoint(settings, lambda ids: str(reference.tokenizer.decode(list(ids))))
        found = measure_endpoint(endpoint, artifact, reference, Steps(silent))
    values = ", ".join(f"{figure.name} {figure.value:.3g}" for figure in found.figures)
    print(f"\nvLLM's server with {served.name} in {dtype}: {values}; {endpoint.facts}", file=sys.stderr)
    return found


def test_an_endpoint_is_confirmed_but_for_its_tokenizer(
    folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    served = faults.copied(folders["gptq"], tmp_path / "tokenizer")
    faults.give_other_tokenizer(served)
    found = through_endpoint(served, folders["gptq"], reference, "float16", tmp_path / "vllm.log")
    gates = {gate.name: gate for gate in decide_served([], found.figures, LIMITS["float16"], "vllm", found.checks)}
    assert {name: gate.verdict for name, gate in gates.items()} == {
        "tokenizer through vllm": "fail",
        "fidelity_kl through vllm": "pass",
    }
    assert "other tokens of" in gates["tokenizer through vllm"].reason


@pytest.mark.parametrize("fault", [None, faults.zero_rows])
def test_an_endpoint_drifts_as_far_as_our_reading_says(
    fault: faults.Change | None, folders: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    served = folders["w8a8"] if fault is None else faults.copied(folders["w8a8"], tmp_path / "damaged", fault)
    found = through_endpoint(served, folders["w8a8"], reference, "bfloat16", tmp_path / "vllm.log")
    decided = decide_served([], found.figures, DRIFT, "vllm", found.checks)
    failed = {gate.name for gate in decided if gate.verdict != "pass"}
    assert failed == (set() if fault is None else {"kl_over_reading at_most through vllm"})
