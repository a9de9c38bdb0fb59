"""Folders of safetensors files, by what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from cases import PICKLE
from world import Spoil, all_of, content, cut, entry, header, tensors


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
