"""ONNX artifacts in ONNX Runtime, against transformers with the weights that the same file holds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel

import factories
import onnx_folders
import stored_models
from onnx_exports import open_graph
from qexport.errors import CompatibilityError, InputError, RecipeError
from qexport.reading.filled_model import unquantized_model
from qexport.reading.onnx import session as session_module
from qexport.reading.onnx.model import OnnxCache, OnnxCausalLM
from qexport.reading.onnx.session import open_session
from qexport.reading.onnx.weights import OnnxWeights
from qexport.reading.safetensors_weights import SafetensorsWeights
from qexport.reading.stored_model import StoredModel, open_stored
from qexport.tensors import Quantized, RowQuantized
from qexport.tensors.input_rounding import InputRounding
from qexport.verifying import SpeedSettings
from qexport.verifying.continuation import continue_all, likeliest_along
from qexport.verifying.lockstep import run_in_lockstep
from qexport.verifying.prompt_batches import batch_prompts, check_padding
from qexport.verifying.served import own_reading
from qexport.verifying.speed import measure_speed

CPU = torch.device("cpu")
CONFIG = factories.llama_config()
IDS = torch.randint(1, factories.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :4], MASK[2, :9] = 0, 0
GREEDY: dict[str, Any] = dict(do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=0)


def write(folder: Path, name: str, accuracy_level: int = 0) -> Path:
    """An artifact, with the codes that another library has computed."""
    quantization = stored_models.QUANTIZATIONS.get(name)
    model = factories.build(CONFIG)
    values: dict[str, Tensor | Quantized] = dict(model.state_dict())
    if quantization is not None:
        with SafetensorsWeights(
            stored_models.write(model, folder / "safetensors", quantization), dtype=torch.float32
        ) as source:
            codes = {module: weight.quantized(source.tensors(module)) for module, weight in source.quantized.items()}
        values |= {f"{module}.weight": value for module, value in codes.items()}
    return onnx_folders.llama(values, CONFIG, folder / "onnx", accuracy_level=accuracy_level)


def reference(folder: Path) -> PreTrainedModel:
    weights = OnnxWeights(folder, dtype=torch.float32)
    return unquantized_model(weights.architecture, weights, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense"), "dense")


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxCausalLM:
    return open_graph(folder)


@pytest.fixture(scope="module")
def own(folder: Path) -> PreTrainedModel:
    return reference(folder)


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """`generate` without transformers' own types."""
    found = model.generate(ids, **options)
    assert isinstance(found, Tensor)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_logits_are_those_of_transformers(model: OnnxCausalLM, own: PreTrainedModel) -> None:
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    expected = own(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits[MASK.bool()]
    for given in (positions, None):
        found = model(input_ids=IDS, attention_mask=MASK, position_ids=given).logits[MASK.bool()]
        assert error(found, expected) < 1e-5
    assert error(model(IDS).logits, own(IDS).logits) < 1e-5


@pytest.mark.parametrize("name", ["gptq", "nf4", "fp4", "int8", "nf4 double"])
@torch.no_grad()
def test_quantized_graphs_compute_with_the_weights_that_are_read(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, name)
    model, own = open_graph(folder), reference(folder)
    assert error(model(IDS).logits, own(IDS).logits) < 1e-5
    assert torch.equal(generate(model, IDS, **GREEDY), generate(own, IDS, **GREEDY))


@torch.no_grad()
def test_cached_decoding_goes_on_where_prefill_ended(model: OnnxCausalLM, own: PreTrainedModel) -> None:
    whole = own(IDS).logits
    first = model(IDS[:, :7])
    assert isinstance(first.past_key_values, OnnxCache)
    assert first.past_key_values.get_seq_length() == 7
    second = model(IDS[:, 7:11], past_key_values=first.past_key_values)
    third = model(IDS[:, 11:], past_key_values=second.past_key_values)
    assert error(torch.cat([first.logits, second.logits, third.logits], 1), whole) < 1e-5
    assert third.past_key_values.get_seq_length() == 12


@torch.no_grad()
def test_without_the_cache_only_logits_are_asked_for(model: OnnxCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    run = model.session.run

    def watch(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        asked.append(list(outputs))
        run(inputs, outputs)

    monkeypatch.setattr(model.session, "run", watch)
    assert model(IDS, use_cache=False).past_key_values is None
    cache = model(IDS).past_key_values
    before = dict(cache.states)
    assert model(IDS[:, :1], past_key_values=cache, use_cache=False).past_key_values is None
    assert asked[0] == asked[2] == ["logits"]
    assert len(asked[1]) == 1 + 2 * CONFIG.num_hidden_layers
    assert cache.states == before


def test_positions_are_counted_from_each_rows_first_token(model: OnnxCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings would not show it: only differences of positions count in them."""
    given: list[Tensor] = []
    run = model.session.run

    def watch(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        given.append(inputs["position_ids"])
        run(inputs, outputs)

    monkeypatch.setattr(model.session, "run", watch)
    cache = model(IDS[:, :10], attention_mask=MASK[:, :10]).past_key_values
    model(IDS[:, 10:], attention_mask=MASK, past_key_values=cache)
    model(IDS[:, :1], past_key_values=model(IDS).past_key_values)
    assert given[0].tolist() == [[*range(10)], [0, 0, 0, 0, *range(6)], [0] * 10]
    assert given[1].tolist() == [[10, 11], [6, 7], [1, 2]]
    assert given[3].tolist() == [[12], [12], [12]]


@torch.no_grad()
def test_the_last_logits_and_chosen_ones(model: OnnxCausalLM) -> None:
    whole = model(IDS).logits
    for count in (1, 5, 12, 99):
        assert torch.equal(model(IDS, logits_to_keep=count).logits, whole[:, -count:])
    assert torch.equal(model(IDS, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    assert model(IDS, logits_to_keep=1).logits.untyped_storage().nbytes() == whole[:, -1:].nbytes
    assert torch.equal(model(IDS, return_dict=False)[0], whole)


@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "whole"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}, {"use_cache": False, "max_new_tokens": 4},
     {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "sampled", "beams", "no cache", "several"],
)  # fmt: skip
def test_texts_are_those_of_transformers(
    mask: Tensor | None, changes: dict[str, Any], model: OnnxCausalLM, own: PreTrainedModel
) -> None:
    texts = []
    for each in (model, own):
        torch.manual_seed(7)
        texts.append(generate(each, IDS, attention_mask=mask, **(GREEDY | changes)))
    assert torch.equal(*texts)


def test_verification_runs_with_it(model: OnnxCausalLM, own: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3, 4, 5, 6]]
    batches = batch_prompts(prompts, new_tokens=8, fill=0, padded=True)
    settings = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=8, pad_token_id=0, eos_token_id=[1])
    padding = check_padding(model, batches, settings)
    assert padding.allowed
    assert padding.kl is not None
    assert padding.kl < 1e-8
    found = continue_all(model, batches, settings, lambda: None, lambda _: LogitsProcessorList())
    expected = continue_all(own, batches, settings, lambda: None)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert np.allclose(found[0].margins, expected[0].margins, atol=1e-4)
    assert likeliest_along(model, batches, found) == [each.tokens for each in found]
    prompt = torch.tensor([prompts[1]])
    speed = measure_speed((own, model), prompt, SpeedSettings(prompt_tokens=16, new_tokens=8, repeats=6))
    assert min(speed.artifact_tokens_per_second) > 0


def test_it_is_a_model_of_transformers(model: OnnxCausalLM, folder: Path) -> None:
    assert model.device == CPU
    assert model.dtype == torch.float32
    assert model.can_generate()
    assert model.config.get_text_config().vocab_size == factories.VOCABULARY
    assert model.stored_bytes == OnnxWeights(folder, dtype=torch.float32).stored_bytes
    assert model.session.provider == "CPUExecutionProvider"
    assert not model.training
    model.tie_weights()
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output.logits))
    model(IDS)
    hook.remove()
    assert seen[0].shape == (3, 12, factories.VOCABULARY)


def test_the_generation_config_is_read(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 1}')
    assert generate(open_graph(tmp_path), IDS).shape == (3, 15)


def test_a_cache_of_another_model_is_refused(model: OnnxCausalLM) -> None:
    with pytest.raises(CompatibilityError, match="DynamicCache"):
        model(IDS, past_key_values=DynamicCache())
    cache = model(IDS).past_key_values
    for refused in (lambda: cache.crop(1), cache.reset, lambda: cache.update(IDS, IDS, 0)):
        with pytest.raises(CompatibilityError):
            refused()


def test_rows_of_a_cache_can_be_taken(model: OnnxCausalLM) -> None:
    caches = [model(IDS).past_key_values for _ in range(2)]
    caches[0].batch_select_indices(torch.tensor([2, 0]))
    caches[0].batch_repeat_interleave(2)
    caches[1].reorder_cache(torch.tensor([2, 2, 0, 0]))
    for name, state in caches[0].states.items():
        assert torch.equal(state, caches[1].states[name])


def test_w8a8_rounds_activations_per_token(tmp_path: Path) -> None:
    """Against the same arithmetic in float64, where a rounded activation would show."""
    state = factories.build(CONFIG).state_dict()
    rows = {}
    for name, weight in state.items():
        if name.endswith("_proj.weight"):
            absmax = weight.float().abs().amax(1)
            rows[name] = RowQuantized((weight / (absmax / 127)[:, None]).round().to(torch.int8), absmax)
    folder = onnx_folders.llama(state | rows, CONFIG, tmp_path, integers=True)
    model, own = open_graph(folder), reference(folder)
    for name, module in own.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (fake_int8(inputs[0]),))
    assert error(model(IDS).logits, own(IDS).logits.detach()) < 1e-4
    assert {weight.kind for weight in OnnxWeights(folder, dtype=torch.float32).quantized.values()} == {"MatMulInteger"}
    with open_stored(folder, dtype=torch.float32) as artifact:
        assert all(layer.input_rounding == InputRounding() for layer in artifact.layers.values())
        reading = read_logits(artifact)
        unrounded = reference(folder)(IDS).logits.detach()
        assert error(reading, own(IDS).logits.detach()) < 1e-4 < error(reading, unrounded)


def read_logits(artifact: StoredModel) -> Tensor:
    runner = own_reading(artifact, CPU)
    (batches,), _ = run_in_lockstep([runner], IDS, lambda _: None, drift=False)
    with runner.head() as head:
        return torch.cat([head(batch.hidden) for batch in batches])


@pytest.mark.parametrize("name", ["gptq", "int8"])
@torch.no_grad()
def test_our_reading_rounds_the_inputs_that_onnxruntime_rounds_at_level_4(name: str, tmp_path: Path) -> None:
    """Beside a tie another code may follow, as with W8A8."""
    folder = write(tmp_path, name, accuracy_level=4)
    served, unrounded = open_graph(folder)(IDS).logits, reference(folder)(IDS).logits
    with open_stored(folder, dtype=torch.float32) as artifact:
        assert artifact.rounds_activations
        reading = read_logits(artifact)
    effect = (unrounded - served).abs().mean()
    assert effect > 1e-3 * served.abs().mean()
    assert (reading - served).abs().mean() < effect / 10


def fake_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def recurrent(folder: Path) -> Path:
    """Logits from the running sum of real tokens' embeddings, which is the state; the keys are those embeddings."""
    graph = onnx_folders.Builder()
    size, vocabulary = CONFIG.hidden_size, factories.VOCABULARY
    generator = torch.Generator().manual_seed(3)
    for name, length in {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}.items():
        graph.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length]))
    states: dict[str, Any] = {
        "key": ["batch", 1, "n", size],
        "value": ["batch", 1, "n", size],
        "recurrent_state": ["batch", size],
    }
    for name, shape in states.items():
        for way, values in (("past_key_values", graph.inputs), ("present", graph.outputs)):
            values.append(helper.make_tensor_value_info(f"{way}.0.{name}", TensorProto.FLOAT, shape))
    table = graph.weight("table", torch.randn(vocabulary, size, generator=generator))
    length = graph.add("Neg", graph.add("Shape", "input_ids", start=1, end=2))
    real = graph.add("Slice", "attention_mask", length, graph.constant([1 << 60]), graph.constant([1]))
    wide = graph.add("Cast", graph.add("Unsqueeze", real, graph.constant([2])), to=TensorProto.FLOAT)
    embedded = graph.add("Mul", graph.add("Gather", table, "input_ids"), wide)
    before = graph.add("Unsqueeze", "past_key_values.0.recurrent_state", graph.constant([1]))
    sums = graph.add("Add", graph.add("CumSum", embedded, graph.constant(1)), before)
    keys = graph.add("Unsqueeze", embedded, graph.constant([1]))
    for name in ("key", "value"):
        graph.named(f"present.0.{name}", graph.add("Concat", f"past_key_values.0.{name}", keys, axis=2))
    graph.named("present.0.recurrent_state", graph.add("Gather", sums, graph.constant(-1), axis=1))
    head = graph.weight("head", torch.randn(size, vocabulary, generator=generator))
    graph.named("logits", graph.add("MatMul", sums, head))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])
    graph.outputs.insert(0, logits)
    return graph.write(folder, CONFIG.to_dict())


def test_recurrent_states_are_passed_on(tmp_path: Path) -> None:
    session = open_session(recurrent(tmp_path), device=CPU)
    model = OnnxCausalLM(CONFIG, session, stored_bytes=0)
    out = model(IDS, attention_mask=MASK)
    table, head = (torch.from_numpy(np.frombuffer((tmp_path / "model.onnx.data").read_bytes(), np.float32).copy())
                   .reshape(2, -1))  # fmt: skip
    sums = (table.reshape(-1, CONFIG.hidden_size)[IDS] * MASK[:, :, None]).cumsum(1)
    assert error(out.logits, sums @ head.reshape(CONFIG.hidden_size, -1)) < 1e-5
    assert error(out.past_key_values.states["past_key_values.0.recurrent_state"], sums[:, -1]) < 1e-5
    assert out.past_key_values.states["past_key_values.0.key"].shape == (3, 1, 12, CONFIG.hidden_size)
    greedy = generate(model, IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(greedy, generate(model, IDS, attention_mask=MASK, **GREEDY, use_cache=False))


def test_cuda_is_never_replaced_silently(folder: Path) -> None:
    if session_module.CUDA in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(InputError, match="no CUDA"):
        open_session(folder, device=torch.device("cuda"))


def test_threads_and_exact_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    session = onnxruntime.InferenceSession

    def watch(path: str, options: Any, **rest: Any) -> Any:
        made.append(options)
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    open_session(folder, device=CPU)
    assert made[0].intra_op_num_threads == 2
    assert made[0].get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "0"


def test_a_dequantized_product_stays_exact(tmp_path: Path) -> None:
    """Left to itself, ONNX Runtime rounds the activations of this graph to 8 bits."""
    generator = torch.Generator().manual_seed(4)
    graph = onnx_folders.Builder()
    codes = torch.randint(16, (64, 32), generator=generator, dtype=torch.uint8)
    packed = helper.make_tensor(
        "w", TensorProto.UINT4, [64, 32], onnx_folders.pack_bits(codes.reshape(1, -1).numpy(), 4).tobytes(), raw=True
    )
    graph.initializers.append(packed)
    scales = graph.constant(np.full((2, 32), 0.05), np.float32)
    wide = graph.add("DequantizeLinear", "w", scales, axis=0, block_size=32)
    graph.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64]))
    graph.outputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32]))
    graph.named("y", graph.add("MatMul", "x", wide))
    session = open_session(graph.write(tmp_path, {}), device=CPU)
    x, y = torch.randn(4, 64, generator=generator), torch.empty(4, 32)
    session.run({"x": x}, {"y": y})
    assert error(y, x @ (codes * 0.05)) < 1e-6


def test_graphs_that_are_no_language_models_are_refused(tmp_path: Path) -> None:
    graph = onnx_folders.Builder()
    graph.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64]))
    graph.outputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64]))
    graph.named("y", "x")
    session = open_session(graph.write(tmp_path, {}), device=CPU)
    with pytest.raises(InputError, match="is not a causal language model"):
        OnnxCausalLM(CONFIG, session, stored_bytes=0)
    with pytest.raises(InputError, match="cannot run"):
        session.run({"x": torch.zeros(4, 63)}, {"y": torch.zeros(4, 64)})
    with pytest.raises(InputError, match="cannot run"):
        session.run({"x": torch.zeros(0, 64)}, {"y": torch.zeros(0, 64)})


def test_a_cache_that_does_not_come_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recurrent(tmp_path)
    session = open_session(folder, device=CPU)
    outputs = {name: value for name, value in session.outputs.items() if name != "present.0.value"}
    monkeypatch.setattr(session, "outputs", outputs)
    with pytest.raises(InputError, match="different cache inputs and outputs"):
        OnnxCausalLM(CONFIG, session, stored_bytes=0)


def test_graphs_that_onnx_runtime_cannot_load_are_told(tmp_path: Path) -> None:
    graph = onnx_folders.Builder()
    graph.add("Identity", "nowhere")
    with pytest.raises(InputError, match="cannot load the graph"):
        open_session(graph.write(tmp_path, {}), device=CPU)


def test_without_onnx_runtime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, session_module.__name__)
    with pytest.raises(RecipeError) as caught:
        importlib.import_module(session_module.__name__)
    assert caught.value.mend is not None
    assert "pip install 'qexport[onnx]'" in caught.value.mend
