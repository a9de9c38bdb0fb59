"""Embedding and head in 8 bits in a graph: values of the gguf package, logits of transformers, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import factories
from onnx_exports import CPU, METHODS, Export, Pass, deviation, export, greedy, prompts, run_pass, steps
from qexport.errors import CompatibilityError, InputError
from qexport.export.onnx.files import shared_names
from qexport.formats.onnx import OnnxFormat
from qexport.reading.onnx.graph import GRAPH_NAME
from qexport.reading.onnx.weights import OnnxWeights
from qexport.reading.stored_model import open_stored
from qexport.tensors import TensorRecord, TensorSpec
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.served import own_reading

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ENDS: dict[bool, dict[str, str]] = {
    True: {"token_embedding_type": "q8_0"},
    False: {"token_embedding_type": "q8_0", "output_tensor_type": "q8_0"},
}
"""By whether the head is tied."""

_LOGITS = 1e-4
"""Of the largest logit, in float32."""


@cache
def passed(tied: bool, method: str = "gptq") -> Pass:
    return run_pass(factories.llama_config(tie_word_embeddings=tied, num_hidden_layers=1), METHODS[method])


def made(folder: Path, *, tied: bool, **settings: Any) -> Export:
    return export(passed(tied), folder, **ENDS[tied], **settings)


def wanted(done: Export) -> dict[str, Tensor]:
    """The safetensors artifact's weights, its ends after a round trip through the gguf package's Q8_0."""
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = {name: tensor.float() for name, tensor in done.stored().items()}
    rounded = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(stored[name].numpy(), kind), kind))
        for name in (EMBEDDING, HEAD)
        if name in stored
    }
    assert all(not torch.equal(rounded[name], stored[name]) for name in rounded)
    return stored | rounded


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_values_are_those_of_the_gguf_package(tied: bool, level: int, tmp_path: Path) -> None:
    done = made(tmp_path, tied=tied, accuracy_level=level)
    expected, found = wanted(done), done.weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name]) for name in expected)
    assert any("rounded to Q8_0" in note and EMBEDDING in note for note in done.layout.notes)
    assert EMBEDDING not in done.graph().initializers


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_logits_are_those_of_transformers_with_these_values(tied: bool, activations: str, tmp_path: Path) -> None:
    done = made(tmp_path, tied=tied, activations=activations)
    model, reference, (ids, mask) = done.model(), done.reference(wanted(done)), prompts()
    tokens = greedy(reference, ids, mask)[:, :4]
    found, expected = (steps(each, ids, mask, tokens) for each in (model, reference))
    assert deviation(found, expected) < (_LOGITS if activations == "float32" else 0.01)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@torch.no_grad()
def test_our_reading_rounds_the_heads_inputs_at_level_4_too(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a rounded embedding lie on a grid, so the first layers' inputs have ties, beside which another code may
    follow; with the embedding as it is there are none.
    """
    ends = ENDS[tied] if tied else {"output_tensor_type": "q8_0"}
    done, (ids, _) = export(passed(tied), tmp_path, accuracy_level=4, **ends), prompts()
    served = done.model()(input_ids=ids).logits
    whole = distance(done.onnx, ids, served)
    monkeypatch.setattr(OnnxWeights, "layers", property(layers_of_blocks))
    assert whole < distance(done.onnx, ids, served) * (0.8 if tied else 0.1)


def layers_of_blocks(weights: OnnxWeights) -> dict[str, Any]:
    return {name: matrix.layer(weights._graph) for name, matrix in weights.quantized.items() if "layers" in name}


def distance(folder: Path, ids: Tensor, served: Tensor) -> float:
    with open_stored(folder, dtype=torch.float32) as artifact:
        runner = own_reading(artifact, CPU)
        (batches,), _ = run_in_lockstep([runner], ids, lambda _: None, drift=False)
        with runner.head() as head:
            found = torch.cat([head(batch.hidden) for batch in batches])
    return float((found - served).abs().mean())


def test_a_block_of_zeros_stays_one() -> None:
    value = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    value[1, 32:], value[2] = 0, 1e-9
    form = OnnxFormat(torch.float32, accuracy_level=4, rounded=frozenset({HEAD}))
    parts = form.tensors(TensorRecord(HEAD, value))
    specs = form.specs(HEAD, TensorSpec((4, 64), torch.float32))
    assert {name: TensorSpec(tuple(each.shape), each.dtype) for name, each in parts.items()} == specs
    values = (parts["lm_head.qweight"].float() - 128) * parts["lm_head.scales"][..., None]
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(values.flatten(1).numpy(), gguf.dequantize(gguf.quantize(value.numpy(), kind), kind))
    assert not values[1, 1].any()


def test_shared_weights_are_not_those_that_are_rounded(tmp_path: Path) -> None:
    done = made(tmp_path, tied=False, share_weights=True)
    assert EMBEDDING in shared_names(done.passed.outputs)
    assert done.layout.weights.shared == shared_names(done.passed.outputs) - {EMBEDDING, HEAD}
    assert done.weights().keys() == done.stored().keys()


# What is refused.


def test_a_tied_head_has_no_type_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="no output head of its own") as caught:
        export(passed(True), tmp_path, output_tensor_type="q8_0")
    assert "token_embedding_type" in str(caught.value)


def test_rows_that_are_no_multiple_of_the_block_are_refused(tmp_path: Path) -> None:
    config = factories.llama_config(hidden_size=48, num_hidden_layers=1)
    with pytest.raises(CompatibilityError, match="no multiple of 32"):
        export(run_pass(config, METHODS["none bf16"]), tmp_path, token_embedding_type="q8_0")


def of(graph: onnx.GraphProto, op_type: str) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in graph.node if node.op_type == op_type]
    return found[0]


def other_zero(graph: onnx.GraphProto) -> None:
    inside = [each for each in graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL]
    zero = next(each for each in inside if numpy_helper.to_array(each).flatten().tolist() == [128.0])
    zero.CopyFrom(numpy_helper.from_array(np.array([127], np.float32), zero.name))


def other_rows_scales(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if "scales" in "".join(node.input) and node.op_type == "Gather").input[1] = (
        "position_ids"
    )


def swapped_nibbles(graph: onnx.GraphProto) -> None:
    pair = of(graph, "Concat")
    pair.input[0], pair.input[1] = pair.input[1], pair.input[0]


def added(graph: onnx.GraphProto) -> None:
    of(graph, "Sub").op_type = "Add"


FAULTS: dict[str, tuple[int, Callable[[onnx.GraphProto], None]]] = {
    "another zero": (4, other_zero),
    "scales of other rows": (4, other_rows_scales),
    "added": (4, added),
    "another zero of nibbles": (0, other_zero),
    "nibbles swapped": (0, swapped_nibbles),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_are_dequantized_in_another_way_are_refused(fault: str, tmp_path: Path) -> None:
    level, change = FAULTS[fault]
    done = made(tmp_path, tied=True, accuracy_level=level)
    model = onnx.load_model(done.onnx / GRAPH_NAME, load_external_data=False)
    change(model.graph)
    onnx.save_model(model, done.onnx / GRAPH_NAME)
    with pytest.raises(InputError, match="dequantized in an unknown way"):
        done.weights()
