"""Hostile input by area: what is spoiled in a copy of the world, the command, its exit code, and words of its error."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

import onnx_folders
from world import RECIPE, VERIFY, Spoil, all_of, changed_json, content, cut, header, tensors, write_recipe

PLAN = ("validate", "r.yaml")
RUN = ("run", "r.yaml")
GPTQ = ("run", "g.yaml")
INSPECT = ("validate", "artifact")
VERIFYING = ("verify", "artifact", "--reference", "v.yaml")
GATE = ("gate", "artifact", "--unchecked", "--gates", "gates.yaml")
REPORT = ("report", "artifact", "--unchecked")
LOAD = ("load", "artifact")
"""No command: `qexport.load`."""
GRAPHS = (("load", "graph"), ("verify", "graph", "--reference", "v.yaml"))


@dataclass(frozen=True)
class Case:
    """One spoiled copy of the world."""

    name: str
    spoil: Spoil
    command: Sequence[str]
    code: int
    says: str = ""


def recipe(**values: Any) -> Spoil:
    return lambda world: write_recipe(world / "r.yaml", RECIPE | values)


def verifying(**values: Any) -> Spoil:
    return recipe(verify=VERIFY | values)


class Fires:
    """What a pickle would call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("fired",)


PICKLE = pickle.dumps(Fires())
CODE = "from pathlib import Path\nPath('fired').mkdir()\n"


def recipes() -> Iterator[Case]:
    text = json.dumps(RECIPE)
    contents: list[tuple[str, str | bytes, str]] = [
        ("empty", "", "is empty"),
        ("a list", "[]", "not a mapping"),
        ("binary", bytes(range(256)), "not UTF-8"),
        ("a NUL", text + "\n# \0", "U+0000"),
        ("200,000 keys", text + "".join(f"\nk{i}: 1" for i in range(200_000)), "larger than"),
        ("9,000 keys", "".join(f"k{i}: 1\n" for i in range(4900)), " problems"),
        ("a long list", f"load: [{'1,' * 20_000}1]", "more than 10000"),
        ("deep", "load: " + "[" * 100_000, "nested deeper"),
        ("deep blocks", "".join(" " * i + "a:\n" for i in range(600)), "nested deeper"),
        ("an alias bomb", "a: &a [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)).replace("*a0", "*a"), "problems"),
        ("an alias of itself", "load: &a [*a]", "names no complete value"),
        ("a tag", "load: !!python/object/apply:os.mkdir [fired]", "the tag"),
        ("two documents", "a: 1\n---\nb: 2", "only one document"),
        ("a key twice", "load: {base: a}\nload: {base: b}", "duplicate key"),
        ("a key that is a list", "? [a, b]\n: 1", "a key must be one word"),
        ("a giant number", "output: " + "9" * 5000, "text"),
        ("an unclosed quote", "output: '" + "a " * 100_000, "not valid YAML"),
        ("a lone surrogate", 'output: "\\ud800"', ""),
        ("a bell", "output: \a", "not allowed"),
    ]  # fmt: skip
    for name, value, says in contents:
        yield Case(name, content("r.yaml", value), PLAN, 2, says)
    fields: list[tuple[str, dict[str, Any]]] = [
        ("no base", {"load": {}}), ("a base of numbers", {"load": {"base": 3}}), ("a base that is a list", {"load": {"base": ["a"]}}),
        ("an unknown key", {"lod": 1}), ("an unknown method", {"quantize": {"method": "magic"}}), ("no method", {"quantize": {}}),
        ("no layout", {"export": []}), ("an unknown layout", {"export": [{"layout": "x"}]}),
        ("a group of 3", {"quantize": {"method": "gptq", "group_size": 3, "calibration": {"source": "a.txt"}}}),
        ("5 bits", {"quantize": {"method": "gptq", "bits": 5, "calibration": {"source": "a.txt"}}}),
        ("NaN damping", {"quantize": {"method": "gptq", "damp_percent": math.nan, "calibration": {"source": "a.txt"}}}),
        ("infinite threshold", {"quantize": {"method": "int8", "threshold": math.inf}}),
        ("no output", {"output": ""}), ("an output of numbers", {"output": 5}),
    ]  # fmt: skip
    for name, values in fields:
        yield Case(name, recipe(**values), PLAN, 2)
    for field in ("max_new_tokens", "windows", "max_windows", "sequence_length"):
        for number in (10**12, 0, -1, 1.5, "many", True, None, 10**400):
            yield Case(f"verify.{field} of {str(number)[:14]}", verifying(**{field: number}), PLAN, 2, field)
    for part, field in [
        ("speed", "prompt_tokens"),
        ("speed", "new_tokens"),
        ("speed", "repeats"),
        ("sampling", "samples"),
    ]:
        yield Case(f"verify.{part}.{field}", verifying(**{part: {field: 10**12}}), PLAN, 2, "less than or equal")
    for field in ("samples", "sequence_length", "seed"):
        spoil = recipe(quantize={"method": "gptq", "calibration": {"source": "a.txt", field: 10**12}})
        yield Case(f"calibration.{field}", spoil, PLAN, 2, "less than or equal")
    for override in (
        "=",
        "quantize",
        "quantize.bits",
        "a=b",
        "export.9.layout=tgi",
        "load.base=[",
        "load=" + "[" * 200,
    ):
        yield Case(f"the override {override[:20]}", recipe(), (*PLAN, override), 2)
    wrong: list[dict[str, Any]] = [
        {"mean_kl": {"at_most": math.nan}},
        {"mean_kl": {"at_most": "x"}},
        {"x": {"at_most": 1}},
        {"mean_kl": []},
    ]
    for gates in wrong:
        yield Case(f"gates {gates}", verifying(gates=gates), PLAN, 2)


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


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shards() -> dict[str, Spoil]:
    file, index = "base/model.safetensors", "base/model.safetensors.index.json"

    def gone(world: Path) -> None:
        (world / file).unlink()

    def indexed(weight_map: Any) -> Spoil:
        return all_of(gone, content(index, json.dumps({"weight_map": weight_map})))

    def linked(world: Path) -> None:
        gone(world)
        (world / file).symlink_to("/etc/passwd")

    def looped(world: Path) -> None:
        gone(world)
        (world / file).symlink_to("model.safetensors")

    def fifo(world: Path) -> None:
        gone(world)
        os.mkfifo(world / file)

    return {
        "none": gone,
        "a pickle": all_of(gone, content("base/pytorch_model.bin", PICKLE)),
        "a pickle with the name of safetensors": content(file, PICKLE),
        "empty": content(file, b""),
        "cut": cut(file, 0.5),
        "cut in the header": cut(file, 0.001),
        "a link out": linked,
        "a link to itself": looped,
        "a pipe": fifo,
        "both kinds": content(index, '{"weight_map": {"a": "b"}}'),
        "an index of nothing": indexed({}),
        "an index of numbers": indexed({"a": 1}),
        "an index that is a list": indexed([]),
        "a shard above": indexed({"a": "../model.safetensors"}),
        "an absolute shard": indexed({"a": "/etc/passwd"}),
        "a long shard name": indexed({"a": "x" * 300 + ".safetensors"}),
        "a very long shard path": indexed({"a": "x/" * 3000 + "y"}),
        "a shard with a NUL": indexed({"a": "x\0y"}),
        "a shard of surrogates": indexed({"a": "\ud800"}),
        "a shard that is a folder": indexed({"a": "."}),
        "2,000 shards": indexed({f"t{i}": f"s{i}.safetensors" for i in range(2000)}),
        "600,000 tensors in an index": indexed({f"t{i}": "s" for i in range(600_000)}),
        "a million empty tensors": header(file, b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(600_000)) + b"}"),
        "100,000 empty tensors": header(file, {f"t{i}": entry([0], 0, 0) for i in range(100_000)}),
        "a surrogate in a name": header(file, b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "control characters in a name": header(file, {"\x1b[2J\n": entry([1], 0, 4)}, bytes(4)),
        "a million dimensions": header(file, {"t": entry([2**60] * 400_000, 0, 0)}),
        "a header of spaces": header(file, b" " * (40 << 20)),
        "a header that is too long": header(file, b"{}", length=2**63),
        "a header of depth": header(file, b'{"a":' * 100_000),
        "a negative shape": header(file, {"t": entry([-1], 0, 4)}, bytes(4)),
        "a fraction": header(file, {"t": entry([1.5], 0, 4)}, bytes(4)),
        "an overlap": header(file, {"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)),
        "a giant shape": header(file, {"t": entry([2**62, 2**62], 0, 4)}, bytes(4)),
        "an unknown dtype": header(file, {"t": entry([1], 0, 4, "F5")}, bytes(4)),
        "metadata of numbers": header(file, {"__metadata__": {"a": 1}}),
        "one tensor too few": tensors(file, lambda found: found.pop("model.norm.weight")),
        "one tensor too many": tensors(file, lambda found: found.update(extra=torch.zeros(2))),
        "another shape": tensors(file, lambda found: found.update({"model.norm.weight": torch.zeros(3)})),
        "another dtype": tensors(file, lambda found: found.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)})),
    }  # fmt: skip


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


def tokenizers() -> Iterator[Case]:
    config, file = "base/tokenizer_config.json", "base/tokenizer.json"
    for case, value in [
        ("no JSON", b"{"),
        ("a list", b"[]"),
        ("binary", b"\xff\xfe"),
        ("empty", b""),
        ("deep", b"[" * 90_000),
        ("null", b"null"),
    ]:
        yield Case(f"tokenizer.json: {case}", content(file, value), GPTQ, 3)
        yield Case(f"tokenizer_config.json: {case}", content(config, value), GPTQ, 3)
    fields: dict[str, dict[str, Any]] = {
        "a class of nowhere": {"tokenizer_class": "EvilTokenizer"},
        "a class of numbers": {"tokenizer_class": 3},
        "a template of numbers": {"chat_template": 5},
        "templates without a default": {"chat_template": [{"name": "x", "template": "x"}]},
        "a surrogate": {"eos_token": "\ud800"},
        "added tokens of text": {"added_tokens_decoder": {"x": {"content": "a"}}},
        "an added token far away": {"added_tokens_decoder": {"99999999999": {"content": "zz", "special": True}}},
    }
    for case, values in fields.items():
        spoil = all_of(lambda world: (world / "base/chat_template.jinja").unlink(), changed_json(config, **values))
        yield Case(case, spoil, GPTQ, 3)
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    yield Case(
        "auto_map in the tokenizer", all_of(changed_json(config, **auto), content("base/evil.py", CODE)), GPTQ, 0
    )
    code = {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "trust_remote_code": True,
        "use_kernels": True,
    }
    yield Case(
        "auto_map in the config",
        all_of(changed_json("base/config.json", **code), content("base/evil.py", CODE), content("kernels.py", CODE)),
        RUN,
        0,
    )
    yield Case("a generation config that is a list", content("base/generation_config.json", "[]"), ("run", "v.yaml"), 3)
    yield Case("a generation config of nonsense", content("base/generation_config.json", "{"), ("run", "v.yaml"), 3)


TEMPLATES: Mapping[str, str] = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "4 GB": "{{ 'a' * (4 * 10**9) }}",
    "500 MB": "{{ 'a' * (5 * 10**8) }}",
    "20 MB of text": "{{ 'a' * (2 * 10**7) }}",
    "a giant power": "{{ 9 ** (9 ** 9) }}",
    "a giant shift": "{{ (10 ** 5000000) | string | length }}",
    "a doubling text": "{% set n = namespace(t='a' * 1000) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "doubling lists": "{% set n = namespace(t=[1]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wide recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a wide format": "{{ '%9999999999d' | format(1) }}",
    "a wide pad": "{{ 'a' | center(10 ** 11) }}",
    "indented": "{{ ('a\n' * 1000000) | indent(100000) }}",
    "a long sum": "{{ " + "1 + " * 30000 + "1 }}",
    "parentheses": "{{ " + "(" * 50000 + " }}",
    "blocks": "{% if 1 %}" * 5000,
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('fired') }}",
    "attributes": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format strings": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mapped attributes": "{{ [''] | map(attribute='__class__') | list | first | attr('mro') }}",
    "the namespace": "{% set n = namespace(__class__=1) %}",
    "imports": "{% import 'os' as os %}{{ os.mkdir('fired') }}",
    "includes": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'base' %}",
    "self": "{{ self._TemplateReference__context.environment.loader }}{{ self.__init__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('fired') }}",
    "joiner": "{{ joiner.__init__.__globals__.os.mkdir('fired') }}",
    "changed messages": "{% do messages.append(1) %}{{ messages.append(1) }}",
    "an exception": "{{ raise_exception('no') }}",
    "a division": "{{ 1 // 0 }}",
    "a surrogate": "{{ '\\ud800' }}",
    "nonsense": "{% nonsense",
    "not a name": "{{ nothing.at.all }}",
}  # fmt: skip


def templates() -> Iterator[Case]:
    for name, template in TEMPLATES.items():
        yield Case(name, content("base/chat_template.jinja", template), GPTQ, 3)
    yield Case("not UTF-8", content("base/chat_template.jinja", b"\xff"), GPTQ, 3)


def gguf_files() -> Iterator[Case]:
    def string(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def head(count: int, values: int, rest: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
        return magic + struct.pack("<IQQ", version, count, values) + rest

    name = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
    wide = string(b"x") + struct.pack("<IIQ", 9, 9, 1)
    files = {
        "empty": b"", "magic alone": b"GGUF", "another magic": head(0, 0, magic=b"GGML"), "version 9": head(0, 0, version=9), "big-endian": head(0, 0, version=3 << 24),
        "2^63 tensors": head(2**63, 0), "2^63 values": head(0, 2**63), "a long text": head(0, 1, struct.pack("<Q", 2**62)), "a million values": head(0, 10**6, bytes(10**6)),
        "arrays in arrays": head(0, 1, wide * 1000), "an unknown type": head(0, 1, string(b"x") + struct.pack("<I", 99)), "no UTF-8": head(0, 1, string(b"\xff") + struct.pack("<IB", 0, 1)),
        "an unknown family": head(0, 1, name.replace(b"llama", b"evil!")), "nothing else": head(0, 1, name), "zero alignment": head(0, 1, string(b"general.alignment") + struct.pack("<II", 4, 0)),
        "a giant array": head(0, 1, string(b"x") + struct.pack("<IIQ", 9, 4, 2**61)), "a million empty texts": head(0, 1, string(b"x") + struct.pack("<IIQ", 9, 8, 10**6) + bytes(8 * 10**6)),
        "a tensor far away": head(1, 1, name + string(b"t") + struct.pack("<IQIQ", 1, 32, 0, 2**62)), "an overflow": head(1, 1, name + string(b"t") + struct.pack("<IQQQIQ", 3, 2**62, 2**62, 2**62, 0, 0)),
        "giant sizes": head(0, 5, name + b"".join(string(b"llama." + key) + struct.pack("<IQ", 10, 10**15) for key in (b"block_count", b"embedding_length", b"feed_forward_length", b"attention.head_count"))),
        "a pickle": PICKLE,
    }  # fmt: skip

    def package(value: bytes) -> Spoil:
        return all_of(
            lambda world: (world / "evilmodel").mkdir(),
            content("evilmodel/__init__.py", CODE),
            content("evilmodel/m.gguf", value),
            recipe(load={"base": "pkg:evilmodel/m.gguf"}),
        )

    for case, value in files.items():
        yield Case(case, package(value), PLAN, 4 if case == "an unknown family" else 3)


def texts() -> Iterator[Case]:
    lines: dict[str, bytes] = {
        "empty": b"", "blank lines": b"\n" * 100_000, "no JSON": b"{\n", "a list": b"[]\n", "binary": bytes(range(256)), "deep": b"[" * 90_000 + b"\n", "no text": b'{"a": 1}\n',
        "a number": b'{"text": 1}\n', "a surrogate": b'{"text": "\\ud800"}\n', "messages of text": b'{"messages": "x"}\n', "messages of numbers": b'{"messages": [1]}\n', "no role": b'{"messages": [{"content": "a"}]}\n',
        "no content": b'{"messages": [{"role": "user"}]}\n', "too little": b'{"text": "a"}\n', "a key twice": b'{"text": "a", "text": "b"}\n', "NUL": b"\0" * 1000, "a long line": b'{"text": "' + b"a" * (70 << 20) + b'"}\n',
        "a long number": b'{"text": ' + b"9" * 10_000 + b"}\n", "a domain of numbers": b'{"text": "a", "domain": 3}\n',
    }  # fmt: skip
    for case, value in lines.items():
        yield Case(f"calibration: {case}", content("text.jsonl", value), GPTQ, 3)
        yield Case(f"held-out: {case}", content("held-out.jsonl", value), VERIFYING, 3)
    prompts: dict[str, list[Any]] = {
        "none": [], "no id": [{"prompt": "a"}], "an id twice": [{"id": "a", "prompt": "x"}] * 2, "an id of numbers": [{"id": 1, "prompt": "x"}], "a prompt of numbers": [{"id": "a", "prompt": 1}],
        "both": [{"id": "a", "prompt": "x", "messages": []}], "no messages": [{"id": "a", "messages": []}], "ends with the assistant": [{"id": "a", "messages": [{"role": "assistant", "content": "x"}]}],
        "a style of nonsense": [{"id": "a", "prompt": "x", "style": "odd"}], "a lonely pair": [{"id": "a", "prompt": "x", "pair": "p"}], "a style that is a list": [{"id": "a", "prompt": "x", "style": []}],
        "a list": [[]], "null": [None], "a surrogate": [{"id": "a", "prompt": "\ud800"}], "a pair of numbers": [{"id": "a", "prompt": "x", "pair": 3}], "a role of numbers": [{"id": "a", "messages": [{"role": 1, "content": "x"}]}],
    }  # fmt: skip
    for case, rows in prompts.items():
        content_of = "".join(json.dumps(row) + "\n" for row in rows)
        yield Case(f"prompts: {case}", content("prompts.jsonl", content_of), VERIFYING, 3)
    for name in ("nowhere.jsonl", "base", "r.yaml", "x" * 300 + ".jsonl"):
        yield Case(f"a text called {name[:15]!r}", verifying(text=name), RUN, 3)
    yield Case("a text with a NUL", verifying(text="a\0b.jsonl"), RUN, 2, "is not a path")


def unlisted(world: Path) -> None:
    """Makes the artifact a folder of another tool."""
    for name in ("qexport-manifest.json", "SHA256SUMS"):
        (world / "artifact" / name).unlink()
    (world / "artifact.sha256").unlink()
    shutil.rmtree(world / "artifact/report")


def artifacts() -> Iterator[Case]:
    file, config = "artifact/model.safetensors", "artifact/config.json"
    quantization = ("quantization_config",)
    for command in (INSPECT, VERIFYING, LOAD):
        for case, spoil in {
            "no config": lambda world: (world / config).unlink(),
            "config: no JSON": content(config, "{"),
            "config: a list": content(config, "[]"),
            "num_labels": changed_json(config, num_labels=10**9),
            "a billion layers": changed_json(config, num_hidden_layers=10**9),
            "an unknown method": changed_json(config, *quantization, quant_method="evil"),
            "a method of numbers": changed_json(config, *quantization, quant_method=3),
            "weights: empty": content(file, b""),
            "weights: cut": cut(file, 0.5),
            "weights: a pickle": content(file, PICKLE),
            "weights: 100,000 tensors": header(file, {f"t{i}": entry([0], 0, 0) for i in range(100_000)}),
        }.items():
            yield Case(f"{command[0]}: {case}", spoil, command, 3)
            if command != INSPECT:  # digests do not stand before what reads the files
                yield Case(f"{command[0]}, unlisted: {case}", all_of(unlisted, spoil), command, 3)
    for name in ("qexport-manifest.json", "report/report.json"):
        reading = INSPECT if name == "qexport-manifest.json" else REPORT
        for case, value in [("no JSON", b"{"), ("a list", b"[]"), ("deep", b"[" * 90_000), ("binary", b"\xff"), ("empty", b""), ("null", b"null"), ("a long number", b"9" * 9000),
                            ("a surrogate", b'{"schema_version": "\\ud800"}'), ("another version", b'{"schema_version": 99}'), ("an older version", b'{"schema_version": -1}')]:  # fmt: skip
            yield Case(f"{name}: {case}", content(f"artifact/{name}", value), reading, 3)
    others: list[Any] = [None, 5, "x", [], {"a": 1}, ...]
    for key in ("figures", "gates", "identity", "protocol", "schema_version"):
        for other in others:
            if other == [] and key in ("figures", "gates"):
                continue  # a report may have none
            spoil = changed_json("artifact/report/report.json", **{key: other})
            yield Case(f"report.json: {key} is {str(other)[:9]}", spoil, REPORT, 3)
            yield Case(f"gate: {key} is {str(other)[:9]}", spoil, GATE, 3)
    for case, text in [
        ("empty", ""),
        ("a list", "[]"),
        ("deep", "[" * 9000),
        ("an unknown figure", "gates: {x: {at_most: 1}}"),
        ("a tag", "gates: !!python/name:os.mkdir x"),
    ]:
        yield Case(f"gates: {case}", content("gates.yaml", text), GATE, 2)
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, "use_kernels": True}
    files = all_of(
        content("artifact/evil.py", CODE), content("artifact/modeling_evil.py", CODE), content("kernels.py", CODE)
    )
    for command in (VERIFYING, LOAD):
        spoil = all_of(changed_json(config, **code), files)
        yield Case(f"{command[0]}: auto_map", spoil, command, 3, "not listed")
    yield Case("load, unlisted: auto_map", all_of(unlisted, spoil), LOAD, 0)
    yield Case("verify, unlisted: auto_map", all_of(unlisted, spoil), VERIFYING, 6, "auto_map is")


def graphs() -> Iterator[Case]:
    def graph(change: Callable[[onnx.ModelProto, Path], object]) -> Spoil:
        def spoil(world: Path) -> None:
            builder = onnx_folders.Builder()
            builder.add("Identity", builder.weight("w", torch.zeros(2, 2)))
            folder = builder.write(world / "graph", json.loads((world / "base/config.json").read_text()))
            model = builder.model()
            change(model, folder)
            (folder / "model.onnx").write_bytes(model.SerializeToString())

        return spoil

    def placed(location: str) -> Callable[[onnx.ModelProto, Path], object]:
        return lambda model, _: setattr(model.graph.initializer[0].external_data[0], "value", location)

    def operator(name: str, domain: str) -> Callable[[onnx.ModelProto, Path], object]:
        return lambda model, _: model.graph.node.append(onnx.helper.make_node(name, ["w"], ["x"], domain=domain))

    def linked(_: onnx.ModelProto, folder: Path) -> None:
        (folder / "model.onnx.data").unlink()
        (folder / "model.onnx.data").symlink_to("../base/model.safetensors")

    changes: dict[str, tuple[Callable[[onnx.ModelProto, Path], object], str]] = {
        "data above": (placed("../base/model.safetensors"), "not beside the graph"),
        "data at an absolute path": (placed("/etc/passwd"), "not beside the graph"),
        "data behind a link": (linked, "symbolic link"),
        "Python": (operator("PyOp", "ai.onnx.contrib"), "PyOp"),
        "a domain of its own": (operator("Fire", "evil"), "Fire"),
        "a context of a provider": (operator("EPContext", "com.microsoft"), "EPContext"),
    }
    for name, (change, says) in changes.items():
        for command in GRAPHS:
            yield Case(f"{command[0]}: {name}", graph(change), command, 3, says)


AREAS = {
    "recipes": recipes, "bases": bases, "adapters": adapters, "tokenizers": tokenizers, "templates": templates, "gguf": gguf_files, "texts": texts,
    "artifacts": artifacts, "graphs": graphs,
}  # fmt: skip
