"""What TGI would compute with, read from the folder by a stand-in that follows its rules and knows nothing of ours.

The rules: `utils/hub.py` (which files), `utils/weights.py` (`get_tensor`, `get_sharded`), `layers/gptq/__init__.py` and
`layers/gptq/triton.py` (how codes are joined, split and read), `layers/compressed_tensors/w8a8_int.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import FalconConfig, PretrainedConfig
from transformers.models.falcon.modeling_falcon import FalconAttention

import factories
from qexport.export.tgi.families import tgi_config
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.w8a8 import W8a8
from qexport.tensors import GroupQuantized, RowQuantized
from quantized_models import gptq_method
from tgi_folders import TgiModel, falcon, falcon_40b, llama

LLAMA = {
    "column": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    "row": [["self_attn.o_proj"], ["mlp.down_proj"]],
}
FALCON = {
    "column": [["self_attention.query_key_value"], ["mlp.dense_h_to_4h"]],
    "row": [["self_attention.dense"], ["mlp.dense_4h_to_h"]],
}


@dataclass(frozen=True)
class StandIn:
    """One shard of the server."""

    folder: Path
    shards: int = 1
    rank: int = 0

    def tensor(self, name: str) -> torch.Tensor:
        (file,) = [path for path in self.folder.glob("*.safetensors") if name in _names(path)]
        with safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

    def sharded(self, name: str, dim: int) -> torch.Tensor:
        whole = self.tensor(name)
        size, rest = divmod(whole.shape[dim], self.shards)
        assert rest == 0
        return whole.narrow(dim, self.rank * size, size)

    def column(self, modules: list[str], bits: int) -> torch.Tensor:
        qweight, qzeros, scales = (
            torch.cat([self.sharded(f"{module}.{part}", 1) for module in modules], 1)
            for part in ("qweight", "qzeros", "scales")
        )
        g_idx = [self.tensor(f"{module}.g_idx") for module in modules]
        assert all(torch.equal(g_idx[0], other) for other in g_idx[1:])
        return _dequantize(qweight, qzeros, scales, g_idx[0], bits)

    def row(self, module: str, bits: int, group_size: int) -> torch.Tensor:
        qweight, g_idx = self.sharded(f"{module}.qweight", 0), self.sharded(f"{module}.g_idx", 0)
        if group_size == -1:
            return _dequantize(qweight, self.tensor(f"{module}.qzeros"), self.tensor(f"{module}.scales"), g_idx, bits)
        qzeros, scales = (self.sharded(f"{module}.{part}", 0) for part in ("qzeros", "scales"))
        return _dequantize(qweight, qzeros, scales, g_idx - g_idx[0], bits)


def _names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as opened:
        return set(opened.keys())


def _dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    """The values [out, in] that the kernels multiply with."""
    mask, per_word = 2**bits - 1, 32 // bits
    rows, columns = torch.arange(qweight.shape[0] * per_word), torch.arange(qweight.shape[1])
    codes = (qweight[rows // per_word] >> ((rows % per_word) * bits)[:, None]) & mask
    zeros = (qzeros[:, columns // per_word] >> ((columns % per_word) * bits)) & mask
    zeros = (zeros + 1) & mask
    group = g_idx.long()
    values: torch.Tensor = (codes - zeros[group]).float() * scales[group].float()
    return values.t()


@pytest.mark.parametrize(
    ("config", "linears", "prefix", "shards"),
    [
        (llama(), LLAMA, "model.layers", [1, 2]),
        (falcon(), FALCON, "transformer.h", [1]),
        (falcon_40b(), FALCON, "transformer.h", [1, 2]),
    ],
    ids=["llama", "falcon", "falcon 40b"],
)
@pytest.mark.parametrize(
    ("bits", "group_size", "sym"), [(4, 32, True), (4, -1, True), (4, 32, False), (8, 32, True)],
    ids=["4 bits", "one group", "asymmetric", "8 bits"],
)  # fmt: skip
def test_the_server_computes_with_the_weights_that_were_found(
    config: PretrainedConfig,
    linears: dict[str, list[list[str]]],
    prefix: str,
    shards: list[int],
    bits: int,
    group_size: int,
    sym: bool,
    tmp_path: Path,
) -> None:
    if bits == 8 and config.hidden_size % 128:
        config = factories.falcon_config(hidden_size=256, num_attention_heads=4)
    made = TgiModel(config, gptq_method(bits=bits, group_size=group_size, sym=sym))
    folder = made.write(tmp_path / "out")
    ours = {
        record.name.removesuffix(".weight"): record.value.dequantize()
        for record in made.model.records()
        if isinstance(record.value, GroupQuantized)
    }
    for count in shards:
        for rank in range(count):
            server = StandIn(folder, count, rank)
            for modules in linears["column"]:
                names = [f"{prefix}.1.{module}" for module in modules]
                expected = torch.cat([ours[name].chunk(count)[rank] for name in names])
                assert torch.equal(server.column(names, bits), expected)
            for (module,) in linears["row"]:
                name = f"{prefix}.1.{module}"
                expected = ours[name].chunk(count, 1)[rank]
                assert torch.equal(server.row(name, bits, group_size), expected)


def test_int8_weights_and_their_scales_are_joined_and_read(tmp_path: Path) -> None:
    made = TgiModel(llama(), W8a8(method="w8a8"))
    server = StandIn(made.write(tmp_path / "out"), 2, 1)
    names = [f"model.layers.0.{module}" for module in LLAMA["column"][0]]
    codes = torch.cat([server.sharded(f"{name}.weight", 0) for name in names])
    scales = torch.cat([server.sharded(f"{name}.weight_scale", 0) for name in names]).reshape(-1, 1)
    ours = {record.name: record.value for record in made.records() if isinstance(record.value, RowQuantized)}
    expected = torch.cat([ours[f"{name}.weight"].dequantize().chunk(2)[1] for name in names])
    assert torch.equal(codes.float() * scales, expected)


def test_16_bit_weights_are_the_merged_ones(tmp_path: Path) -> None:
    made = TgiModel(falcon(), NoQuantization(method="none"))
    server = StandIn(made.write(tmp_path / "out"))
    source = made.checkpoint.weights
    assert all(torch.equal(server.tensor(name), source.read(name)) for name in source.specs())


@pytest.mark.parametrize(
    ("config", "same"),
    [(falcon(), True), (falcon_40b(), True), (factories.falcon_config(multi_query=False), False)],
    ids=["multi-query", "new decoder", "one key and value a head"],
)
def test_the_falcons_that_are_served_are_those_whose_heads_tgi_splits_rightly(config: FalconConfig, same: bool) -> None:
    """The order of `flash_rw_modeling.py` against that of transformers, on rows that are numbered."""
    attention = FalconAttention(config, layer_idx=0)
    rows = attention.query_key_value.out_features
    query, key, value = attention._split_heads(torch.arange(rows, dtype=torch.float32).reshape(1, 1, rows))
    heads, kv_heads = config.num_attention_heads, tgi_config(config.to_dict())["num_kv_heads"]
    served_query, served_key, served_value = _tgi_split(
        torch.arange(rows, dtype=torch.float32), heads, kv_heads, new=bool(config.new_decoder_architecture)
    )
    repeats = heads // kv_heads if config.new_decoder_architecture else 1
    equal = [
        torch.equal(query.reshape(heads, -1), served_query),
        torch.equal(key.reshape(-1, served_key.shape[1]), served_key.repeat_interleave(repeats, 0)),
        torch.equal(value.reshape(-1, served_value.shape[1]), served_value.repeat_interleave(repeats, 0)),
    ]
    assert equal == [same] * 3


def _tgi_split(fused: torch.Tensor, heads: int, kv_heads: int, *, new: bool) -> tuple[torch.Tensor, ...]:
    if new:
        parts = fused.view(kv_heads, heads // kv_heads + 2, -1)
        return parts[:, :-2].reshape(heads, -1), parts[:, -2], parts[:, -1]
    size = fused.numel() // (heads + 2 * kv_heads)
    query, kv = fused.split([heads * size, 2 * kv_heads * size])
    kv = kv.view(2, kv_heads, size)
    return query.view(heads, size), kv[0], kv[1]
