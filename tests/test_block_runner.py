"""The block-by-block forward against the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import factories
from qexport.architectures.architecture import Architecture
from qexport.architectures.runner import BlockRunner
from qexport.tensors import TensorSpec

CONFIGS = {
    "llama": factories.llama_config(),
    "llama tied": factories.llama_config(tie_word_embeddings=True),
    "llama rope scaled": factories.llama_config(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "mistral sliding window": factories.mistral_config(),
    "qwen2": factories.qwen2_config(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "falcon 7b": factories.falcon_config(),
    "falcon 7b biases": factories.falcon_config(bias=True),
    "falcon 40b": factories.falcon_40b_config(),
    "one block": factories.llama_config(num_hidden_layers=1),
    "falcon rw": factories.falcon_config(
        alibi=True, multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False
    ),
}


class StateDict:
    """A model's tensors as a weight source."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors: dict[str, Tensor] = dict(model.state_dict())
        self.reads: list[str] = []

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].clone()


def run(runner: BlockRunner, ids: Tensor, batch_size: int = 2) -> Tensor:
    batches = runner.embed(ids, batch_size)
    for index in range(len(runner.structure.blocks)):
        with runner.block(index) as block:
            for batch in batches:
                runner.forward(index, block, batch)
    with runner.head() as head:
        return torch.cat([head(batch.hidden) for batch in batches])


def token_windows(count: int = 5, length: int = 40) -> Tensor:
    return torch.randint(factories.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_whole_models_bit_for_bit_in_float32(name: str) -> None:
    config = CONFIGS[name]
    model = factories.build(config, dtype=torch.float32)
    ids = token_windows()
    runner = BlockRunner(
        Architecture(config.to_dict()), StateDict(model), dtype=torch.float32, device=torch.device("cpu")
    )
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in ids.split(2)])
    assert torch.equal(run(runner, ids), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_equal_the_whole_models_bit_for_bit_in_bfloat16(name: str) -> None:
    config: PretrainedConfig = CONFIGS[name]
    model = factories.build(config, dtype=torch.float32)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.bfloat16()
    ids = token_windows()
    runner = BlockRunner(
        Architecture(config.to_dict()), StateDict(model), dtype=torch.bfloat16, device=torch.device("cpu")
    )
    with torch.no_grad():
        expected = torch.cat([model.base_model(part)[0] for part in ids.split(2)])
    batches = runner.embed(ids, 2)
    for index in range(len(runner.structure.blocks)):
        with runner.block(index) as block:
            for batch in batches:
                runner.forward(index, block, batch)
    with runner.head_inputs() as head_inputs:
        assert torch.equal(torch.cat([head_inputs(batch.hidden) for batch in batches]), expected)


def test_every_block_is_read_once_and_given_back() -> None:
    config = factories.llama_config(num_hidden_layers=3)
    source = StateDict(factories.build(config))
    runner = BlockRunner(Architecture(config.to_dict()), source, dtype=torch.bfloat16, device=torch.device("cpu"))
    run(runner, token_windows())
    in_blocks = [name for name in source.reads if ".layers." in name]
    assert sorted(in_blocks) == sorted(set(in_blocks)) == sorted(n for n in source.tensors if ".layers." in n)
    assert all(parameter.is_meta for parameter in runner._model.parameters())


def test_equal_arguments_are_kept_once_for_all_batches() -> None:
    config = factories.falcon_config()
    source = StateDict(factories.build(config))
    runner = BlockRunner(Architecture(config.to_dict()), source, dtype=torch.bfloat16, device=torch.device("cpu"))
    batches = runner.embed(token_windows(count=5), 2)
    assert batches[1].calls is batches[0].calls
    assert batches[2].calls is not batches[0].calls
