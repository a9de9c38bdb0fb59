"""GGUF files whose header lies."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cases import CODE, PICKLE, PLAN, Case, recipe
from world import Spoil, all_of, content


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
