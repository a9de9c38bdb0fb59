"""Recipes that are no YAML, no recipe, or ask for what nothing can do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from cases import PLAN, Case, recipe, verifying
from world import RECIPE, content


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
