"""What is written for CUDA, on a device that stands in for it: the same passes as on the CPU, without a GPU.

Nothing here is said of GPUs. What needs one is in tests/gpu.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import PretrainedConfig

import factories
from cuda_stand_in import StandIn, cuda_stands_in
from qexport.architectures.architecture import Architecture, Checkpoint
from qexport.architectures.sending import sends
from qexport.execution.inline import INLINE
from qexport.quantizing import gptq_pass, importance, refinement, tiles
from qexport.quantizing.activations import StateFiles, stays
from qexport.quantizing.importance import token_importance
from qexport.quantizing.method import PassInputs
from qexport.quantizing.offloading import DeviceOffload, Room, offload_on, working_memory
from qexport.quantizing.parking import Parking
from qexport.tensors import GroupQuantized, Origin, TensorRecord
from test_block_runner import token_windows
from test_gptq import calibration, settings
from test_gptq_experts import Files

CPU = torch.device("cpu")
ONE_BLOCK: dict[str, Any] = {"num_hidden_layers": 1}
MIXTURE = factories.mixtral_config(**ONE_BLOCK)
HEAD = factories.llama_config(**ONE_BLOCK, tie_word_embeddings=False)
NO_GROUPS: dict[str, Any] = {"desc_act": True, "static_groups": False}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(tiles, "ON_CUDA", 80)  # so that there are several
    monkeypatch.setattr(gptq_pass, "BATCH_TOKENS", 32)
    with cuda_stands_in(monkeypatch) as device:
        yield device


def passed(config: PretrainedConfig, options: dict[str, Any], device: torch.device) -> dict[str, TensorRecord]:
    """A pass over a model with the names that its files have."""
    with tempfile.TemporaryDirectory() as folder:
        factories.build(config, dtype=torch.float32).save_pretrained(folder)
        source = Checkpoint(Architecture(config.to_dict()), Files(Path(folder)), {}, Origin("folder", "tiny"))
        windows, method = calibration(token_windows(4, 32)), settings(**options)
        inputs = PassInputs(
            source, method.plan(source), windows, dtype=torch.float32, device=device, scratch=Path(folder)
        )
        with patch.object(importance, "token_importance", on_the_cpu):
            return {record.name: record for record in method.quantize(inputs)}


def on_the_cpu(*args: Any, **named: Any) -> dict[str, torch.Tensor]:
    """Autograd knows only the devices that there are when it is first used in a process."""
    return token_importance(*args, **named | {"device": CPU})


@pytest.mark.parametrize(
    ("config", "options", "equal"),
    [
        (factories.llama_config(**ONE_BLOCK), {}, 0.999),
        (factories.falcon_config(**ONE_BLOCK), {}, 0.999),
        (
            factories.gpt2_config(n_layer=1),
            {"effort": "high"},
            0.9,
        ),  # scales that are fitted to few tokens magnify roundings
        (MIXTURE, NO_GROUPS, 0.999),
        (HEAD, {"lm_head": True, "true_sequential": False}, 0.999),
    ],
    ids=["llama", "falcon", "effort", "mixture", "head"],
)
def test_a_pass_finds_the_codes_of_the_cpu(
    config: PretrainedConfig, options: dict[str, Any], equal: float, cuda: torch.device
) -> None:
    ours, theirs = passed(config, options, cuda), passed(config, options, CPU)
    assert ours.keys() == theirs.keys()
    same = total = 0
    for name, record in ours.items():
        other = theirs[name]
        assert not isinstance(record.value, StandIn)
        if isinstance(record.value, GroupQuantized):
            assert isinstance(other.value, GroupQuantized)
            assert record.layer is not None
            assert other.layer is not None
            assert record.layer.loss == pytest.approx(other.layer.loss, rel=0.02)
            same += int((record.value.codes == other.value.codes).sum())
            total += other.value.codes.numel()
    assert same / total > equal


def test_a_tensor_on_the_wrong_device_is_refused(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="on cuda and on the CPU"):
        torch.ones(3, device=cuda) + torch.ones(3)
    monkeypatch.setattr(refinement._Rows, "_expanded", lambda self, per_group: torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="on cuda and on the CPU"):
        passed(factories.gpt2_config(n_layer=1), {"effort": "high"}, cuda)


def test_products_of_16_bit_factors_are_not_rounded(cuda: torch.device) -> None:
    left, right = torch.randn(5, 300).bfloat16(), torch.randn(300, 4).bfloat16()
    found = tiles.product(left.to(cuda), right.to(cuda))
    assert found.dtype == torch.float32
    assert torch.allclose(found.cpu(), left.float() @ right.float(), atol=1e-4)


def test_offloaded_tensors_stay_while_there_is_room_then_go_to_main_memory_then_to_the_disk(tmp_path: Path) -> None:
    with DeviceOffload(tmp_path, Room(device=4000, host=8000)) as offload:
        for _ in range(2):
            tensors = [torch.randn(1000) for _ in range(5)]
            copies = [tensor.clone() for tensor in tensors]
            restores = [offload.offload(tensor.untyped_storage()) for tensor in tensors]
            assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [4000, 0, 0, 0, 0]
            assert restores[0] is stays
            assert offload._file.seek(0, 2) == 8000
            for tensor, restore in zip(tensors, restores, strict=True):
                restore(tensor.untyped_storage())
            assert all(map(torch.equal, tensors, copies))
            offload.empty()


def test_states_that_stay_take_the_device_s_room_or_are_offloaded(tmp_path: Path) -> None:
    with DeviceOffload(tmp_path, Room(device=4000, host=0)) as offload:
        assert [offload.reserve(3000), offload.reserve(3000), offload.reserve(1000)] == [True, False, True]
        storage = torch.ones(1).untyped_storage()
        assert offload.offload(storage) is not stays


@pytest.mark.parametrize("on_device", [True, False])
def test_states_that_stay_are_written_to_be_kept(on_device: bool, tmp_path: Path) -> None:
    hidden, empty = torch.randn(2, 3, 8), torch.zeros(2, 3, 8)
    expected = hidden.clone()
    with StateFiles(tmp_path, hidden.nbytes, kept=True, on_device=on_device) as states:
        restores = [states.offload(1, 0, hidden), *states.read(1, {0: empty})]
        for tensor, restore in zip((hidden, empty), restores, strict=True):
            assert tensor.untyped_storage().nbytes() == (expected.nbytes if on_device else 0)
            restore(tensor.untyped_storage())
            assert torch.equal(tensor, expected)


def test_a_stopped_forward_gets_back_what_has_stayed(tmp_path: Path) -> None:
    with DeviceOffload(tmp_path, Room(device=1 << 20, host=0)) as offload:
        parking = Parking(offload)
        with parking:
            made = torch.full((1 << 15,), 2.0)
        for _ in range(2):
            parking.park()
            with parking:
                assert float(made.sum()) == 1 << 16


def test_room_is_left_for_solving_the_largest_layer(cuda: torch.device, tmp_path: Path) -> None:
    linears = Architecture(HEAD.to_dict()).structure.block_linears
    widest = max(linears, key=lambda each: each.in_features)
    assert working_memory(linears) > 4 * widest.in_features * (3 * widest.in_features + widest.out_features)
    assert isinstance(offload_on(cuda, tmp_path, linears), DeviceOffload)
    assert not isinstance(offload_on(CPU, tmp_path, linears), DeviceOffload)


def test_the_next_block_is_read_while_cuda_computes() -> None:
    assert sends(INLINE, torch.device("cuda"))
    assert not sends(INLINE, CPU)
