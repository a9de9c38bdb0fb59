"""Base models whose config.json or folder is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from cases import PLAN, RUN, Case, recipe
from spoiled_weights import shards
from world import changed_json, content, tensors

NUMBERS: Mapping[str, Any] = {
    "num_labels": 10**9, "num_hidden_layers": 10**9, "hidden_size": 10**12, "intermediate_size": 10**15, "vocab_size": 10**12,
    "num_attention_heads": 10**9, "num_key_value_heads": 10**9, "max_position_embeddings": 10**15, "head_dim": 10**12,
    "num_experts": 10**9, "num_local_experts": 10**7, "sliding_window": 10**18, "bos_token_id": 10**30, "made_up": 10**20,
    "image_size": 10**12, "num_classes": 10**8, "mamba_n_heads": 10**9, "depths": [10**9], "kernel_dim": 10**30,
}  # fmt: skip
SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")  # fmt: skip


def bases() -> Iterator[Case]:
    config = "base/config.json"
    for key, value in NUMBERS.items():
        yield Case(f"{key} of {value}"[:60], changed_json(config, **{key: value}), PLAN, 3, "no model has")
        yield Case(f"text_config.{key}", changed_json(config, "text_config", **{key: value}), PLAN, 3, "no model has")
    for key in SIZES:
        for wrong in (-5, True, 2.5, "64", math.nan, [[10**9]], {"a": 1}):
            yield Case(f"{key} is {wrong}", changed_json(config, **{key: wrong}), PLAN, 3)
        yield Case(f"{key} is 0", changed_json(config, **{key: 0}), PLAN, 3)
        yield Case(f"{key} is 7", changed_json(config, **{key: 7}), PLAN, 3)
    for name, value in [("no JSON", b"{"), ("a list", b"[]"), ("deep", b'{"a":' * 50_000), ("binary", b"\xff\xfe"), ("a key twice", b'{"a":1,"a":2}'),
                        ("a long number", b'{"model_type":' + b"9" * 9000 + b"}"), ("no family", b"{}"), ("5 MB", b" " * (5 << 20)),
                        ("a surrogate", b'{"model_type":"llama","x":"\\ud800"}'), ("empty", b"")]:  # fmt: skip
        yield Case(f"config.json: {name}", content(config, value), PLAN, 3)
    yield Case("an unknown family", changed_json(config, model_type="evil"), PLAN, 4, "no native model")
    yield Case("a family without text", changed_json(config, model_type="vit"), PLAN, 4)
    yield Case("a million rope factors", changed_json(config, rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 70_000, "long_factor": [1.0]}), PLAN, 3)  # fmt: skip
    yield Case("already quantized", changed_json(config, quantization_config={"quant_method": "gptq"}), PLAN, 3)
    for name, spoil in shards().items():
        yield Case(f"weights: {name}", spoil, PLAN, 3)
    for name, value in [("NaN", math.nan), ("Inf", math.inf)]:
        yield Case(f"weights: {name}", tensors("base/model.safetensors", lambda found, value=value: found["model.norm.weight"].fill_(value)), RUN, 3, "NaN or Inf")  # type: ignore[misc]  # fmt: skip
    yield Case("a missing base", recipe(load={"base": "./nowhere"}), PLAN, 3)
    yield Case("a base that is a file", recipe(load={"base": "./r.yaml"}), PLAN, 3)
    yield Case("a base with a NUL", recipe(load={"base": "./a\0b"}), PLAN, 2)
    yield Case("a base with a long name", recipe(load={"base": "./" + "a" * 5000}), PLAN, 2)
    yield Case("a package that is not there", recipe(load={"base": "pkg:nothing/x.gguf"}), PLAN, 3)
    yield Case("a package path outside", recipe(load={"base": "pkg:json/../../x.gguf"}), PLAN, 3)
