"""GGUF files of other makers, verified as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import factories
import gguf_folders
import qexport
from gguf_faults import Rows, rows_of, value_of
from qexport.artifact.names import GGUF_NAME
from qexport.artifact.report import Report
from qexport.errors import CompatibilityError, InputError
from qexport.pipeline.gguf_files import as_folder
from qexport.reading.folders import artifact_place
from qexport.reading.gguf_weights import GgufWeights
from qexport.reading.stored_model import open_stored
from qexport.tensors import ValuesQuantized

KINDS: Mapping[str, gguf.GGMLQuantizationType] = {
    "token_embd": gguf.GGMLQuantizationType.Q5_1,
    "attn_output": gguf.GGMLQuantizationType.Q4_1,
    "output.weight": gguf.GGMLQuantizationType.Q8_0,
    "ffn_down": gguf.GGMLQuantizationType.Q5_0,
    "attn_v": gguf.GGMLQuantizationType.Q4_0,
    "weight": gguf.GGMLQuantizationType.Q4_1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> gguf_folders.Made:
    folder = tmp_path_factory.mktemp("made")
    return gguf_folders.make(factories.llama_config(), folder, gguf_folders.NONE)


@pytest.fixture(scope="module")
def foreign(made: gguf_folders.Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_folders.as_others_quantize(made.gguf, tmp_path_factory.mktemp("other") / "llama-Q4_1.gguf", KINDS)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factories.write_text(tmp_path_factory.mktemp("text") / "held.jsonl", passages=12, seed=3)


def verified(path: Path, made: gguf_folders.Made, held_out: Path) -> Report:
    return qexport.verify(path, qexport.LoadSettings(base=str(made.base)), settings_of(held_out))


def settings_of(held_out: Path) -> qexport.VerifySettings:
    return qexport.VerifySettings(text=str(held_out), windows=4, max_windows=4, sequence_length=32, profile="off")


def test_every_value_is_that_of_the_gguf_package(foreign: Path) -> None:
    reader = gguf.GGUFReader(foreign)
    wanted = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    with as_folder(foreign) as folder, open_stored(folder, dtype=torch.float32) as own:
        assert isinstance(own, GgufWeights)
        assert own.method == "GGUF, Q4_0 and Q4_1 and Q5_0 and Q5_1 and Q8_0"
        found = own.read("model.layers.1.mlp.down_proj.weight")
        assert np.array_equal(found.numpy(), wanted["blk.1.ffn_down.weight"])
        assert np.array_equal(own.read("model.embed_tokens.weight").numpy(), wanted["token_embd.weight"])
        assert isinstance(own.stored("model.layers.0.mlp.up_proj.weight"), ValuesQuantized)
        assert own.layers["model.layers.0.mlp.down_proj"].bits == 5
        assert set(own.grids) == {"lm_head", *(f"model.layers.{block}.self_attn.v_proj" for block in range(2))}
        ids = torch.arange(20)[None]
        model = own.model(device=torch.device("cpu"), dtype=torch.float32)
        assert model(input_ids=ids).logits.isfinite().all()
    assert not folder.exists()


def test_a_sound_file_is_measured_with_every_gate(foreign: Path, made: gguf_folders.Made, held_out: Path) -> None:
    report = verified(foreign, made, held_out)
    assert [f"{check.name}: {check.detail}" for check in report.checks if not check.passed] == []
    assert report.subject.name == "llama-Q4_1.gguf"
    assert 4 < report.subject.sizes.bits_per_weight < 8
    assert report.weights is not None
    assert {"model.embed_tokens", "lm_head"} & {layer.name for layer in report.weights.layers}


def test_a_base_that_was_itself_quantized_raises_no_alarm(foreign: Path, held_out: Path, tmp_path: Path) -> None:
    """Its values lie on even steps, and its header has floats in single precision."""
    (tmp_path / GGUF_NAME).hardlink_to(foreign)
    path = gguf_folders.as_others_quantize(
        tmp_path, tmp_path / "again.gguf", {"weight": gguf.GGMLQuantizationType.Q5_0}
    )
    report = qexport.verify(path, qexport.LoadSettings(base=str(foreign)), settings_of(held_out))
    assert [f"{check.name}: {check.detail}" for check in report.checks if not check.passed] == []


def doubled(rows: Rows) -> Rows:
    """Scales and minima of Q4_1 times two."""
    found = rows.reshape(len(rows), -1, 20).copy()
    halves = np.ascontiguousarray(found[:, :, :4]).view(np.float16) * np.float16(2)
    found[:, :, :4] = halves.view(np.uint8)
    return found


FAULTS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "values twice as large": (lambda path: rows_of(path, "blk.0.ffn_up.weight", doubled), "mlp.up_proj"),
    "a layer zero": (lambda path: rows_of(path, "blk.1.ffn_down.weight", np.zeros_like), "mlp.down_proj"),
    "an embedding rolled": (
        lambda path: rows_of(path, "token_embd.weight", lambda rows: np.roll(rows, 1, axis=0)), "embed_tokens",
    ),
    "rope base": (
        lambda path: value_of(
            path, "rope.freq_base", np.float32(10000.0).tobytes(), np.float32(5000.0).tobytes()
        ),
        "rope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_a_gate(
    fault: str, foreign: Path, made: gguf_folders.Made, held_out: Path, tmp_path: Path
) -> None:
    change, words = FAULTS[fault]
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(foreign.read_bytes())
    change(copy)
    failed = [check.detail for check in verified(copy, made, held_out).checks if not check.passed]
    assert failed
    assert all(words in each for each in failed)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        artifact_place(tmp_path / "missing.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="not a valid GGUF file"), as_folder(tmp_path / "a.gguf"):
        pass


def test_a_type_that_the_package_does_not_have_is_refused(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with (
        pytest.raises(CompatibilityError, match="cannot dequantize"),
        as_folder(foreign) as folder,
        open_stored(folder, dtype=torch.float32),
    ):
        pass
