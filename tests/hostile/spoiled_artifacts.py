"""Finished artifacts, their reports, and files of gates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import CODE, GATE, INSPECT, LOAD, PICKLE, REPORT, VERIFYING, Case
from world import all_of, changed_json, content, cut, entry, header


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
