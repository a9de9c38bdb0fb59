"""PEFT adapters that are damaged, attack who reads them, or are those of another base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from cases import CODE, PICKLE, PLAN, RUN, Case
from world import all_of, changed_json, content, cut, entry, header, tensors


def adapters() -> Iterator[Case]:
    config, file = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("an infinite alpha", {"lora_alpha": math.inf}), ("a NaN alpha", {"lora_alpha": math.nan}), ("a text as alpha", {"lora_alpha": "8"}),
        ("an alpha of null", {"lora_alpha": None}), ("a giant rank", {"r": 10**12}), ("a rank of 0", {"r": 0}), ("a negative rank", {"r": -2}),
        ("a rank of text", {"r": "2"}), ("no type", {"peft_type": ...}), ("a type of numbers", {"peft_type": 3}), ("an unknown type", {"peft_type": "EVIL"}),
        ("no targets", {"target_modules": None}), ("targets of numbers", {"target_modules": [1]}), ("an empty list", {"target_modules": []}),
        ("targets that are not there", {"target_modules": ["nothing"]}), ("a bomb", {"target_modules": "(.*)*(.*)*(.*)*(.*)*x"}),
        ("a bad pattern", {"target_modules": "("}), ("a nested bomb", {"target_modules": "((a|a)*)*b" + "(.+)+" * 20 + "$"}),
        ("a giant repeat", {"target_modules": "(?:(?:a{1000}){1000}){1000}"}), ("layers beyond", {"layers_to_transform": [10**9]}), ("negative layers", {"layers_to_transform": [-1]}),
        ("a bomb of ranks", {"rank_pattern": {"(.*)*(.*)*(.*)*x": 4}}), ("alphas of text", {"alpha_pattern": {"q_proj": "x"}}),
        ("an excluded bomb", {"exclude_modules": "(.*)*(.*)*(.*)*x"}), ("a list as the type", {"peft_type": ["LORA"]}),
    ]  # fmt: skip
    for case, values in wrong:
        yield Case(case, changed_json(config, **values), PLAN, 3)
    unknown: list[tuple[str, dict[str, Any]]] = [
        ("an unknown option", {"use_magic": True}), ("a bias of nonsense", {"bias": "most"}), ("init that is evil", {"init_lora_weights": "evil"}),
        ("a patterned layer", {"layers_to_transform": [0], "layers_pattern": "(.*)*(.*)*x"}),
    ]  # fmt: skip
    for case, values in unknown:  # a newer PEFT may know them
        yield Case(case, changed_json(config, **values), PLAN, 4)
    spoil = changed_json(config, modules_to_save=["nothing"])
    yield Case("modules that are not there", spoil, PLAN, 0, "no module of the base ends in 'nothing'")
    yield Case("auto_mapping", all_of(changed_json(config, auto_mapping={"base_model_class": "evil", "parent_library": "evil"}), content("adapter/evil.py", CODE)), RUN, 0)  # fmt: skip
    for case, value in [
        ("no JSON", b"{"),
        ("a list", b"[]"),
        ("deep", b"[" * 90_000),
        ("5 MB", b" " * (5 << 20)),
        ("binary", b"\xff"),
    ]:
        yield Case(f"adapter_config.json: {case}", content(config, value), PLAN, 3)
    for case, change in {
        "NaN": lambda found: found[name].fill_(math.nan),
        "Inf": lambda found: found[name].fill_(math.inf),
    }.items():
        yield Case(case, tensors(file, change), RUN, 3)
    for case, change in {
        "a key too few": lambda found: found.pop(name),
        "a key too many": lambda found: found.update({name.replace("layers.0", "layers.9"): torch.zeros(2, 64)}),
        "a key of nothing": lambda found: found.update({"x": torch.zeros(1)}),
        "of another base": lambda found: found.update({name: torch.zeros(2, 4096)}),
        "of another rank": lambda found: found.update({name: torch.zeros(7, 64)}),
        "whole numbers": lambda found: found.update({name: torch.zeros(2, 64, dtype=torch.int64)}),
        "three dimensions": lambda found: found.update({name: torch.zeros(2, 64, 1)}),
    }.items():
        yield Case(case, tensors(file, change), PLAN, 3)
    yield Case(
        "a pickle",
        all_of(lambda world: (world / file).unlink(), content("adapter/adapter_model.bin", PICKLE)),
        PLAN,
        3,
        "pickle",
    )
    yield Case("a pickle as safetensors", content(file, PICKLE), PLAN, 3)
    yield Case("100,000 empty tensors", header(file, {f"t{i}": entry([0], 0, 0) for i in range(100_000)}), PLAN, 3)
    yield Case("weights cut", cut(file, 0.7), PLAN, 3)
