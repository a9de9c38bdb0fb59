"""Our safetensors reader against the reference implementation, and against damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from qexport.errors import InputError
from qexport.tensors.safetensors_file import DTYPES, SafetensorsFile
from qexport.tensors.source import is_finite

SAVED_DTYPES = [dtype for name, dtype in DTYPES.items() if name != "F8_E8M0"]


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header: an object that becomes JSON, or raw bytes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return content.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@given(st.lists(st.tuples(st.sampled_from(SAVED_DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tensor_that_the_reference_writes_is_read_bit_for_bit(
    tmp_path: Path, made: list[tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {f"t.{index}": random_tensor(dtype, tuple(shape)) for index, (dtype, shape) in enumerate(made)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.specs()) == set(tensors)
        for name, tensor in tensors.items():
            read, spec = file.read(name), file.specs()[name]
            assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype) == (torch.Size(spec.shape), spec.dtype)
            if tensor.numel():
                assert same_bytes(read, tensor)
            assert b"".join(bytes(piece) for piece in file.chunks(name)) == bytes(
                tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
            )


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_an_input_error_or_still_a_valid_file(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.arange(6.0), "b": torch.arange(4, dtype=torch.int8)}, {"k": "v"}))
    header = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, header - 1))
    content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(bytes(content))
    try:
        with SafetensorsFile(path) as file:
            total = sum(file.read(name).nbytes for name in file.specs())
    except InputError:
        return
    assert total == len(content) - header


FAULTS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "a length beyond the file": ({}, b"", 1000, "length, 1000, does not fit"),
    "a length of zero": (b"", b"", None, "length, 0, does not fit"),
    "a length beyond the format's limit": ({}, b"", 2**63, "does not fit"),
    "no JSON": (b"{nonsense}", b"", None, "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", None, "not valid JSON"),
    "nested too deeply": (b"[" * 100_000, b"", None, "not valid JSON"),
    "a list": ([], b"", None, "must be a JSON object"),
    "a name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        None,
        "'a' appears twice",
    ),
    "metadata that are no strings": ({"__metadata__": {"a": 1}}, b"", None, "strings to strings"),
    "an entry that is no object": ({"a": 1}, b"", None, "consists of"),
    "an entry with a key too many": ({"a": entry([1], 0, 4) | {"x": 1}}, bytes(4), None, "consists of"),
    "half a byte": ({"a": entry([3], 0, 2, "F4")}, bytes(2), None, "ends inside a byte"),
    "no type of torch": ({"a": entry([4], 0, 3, "F6_E2M3")}, bytes(3), None, "dtype F6_E2M3 cannot be read"),
    "an unknown dtype": ({"a": entry([1], 0, 4, "F5")}, bytes(4), None, "'F5' is not known"),
    "a dtype that is no name": ({"a": entry([1], 0, 4, [])}, bytes(4), None, "is not known"),
    "a negative size": ({"a": entry([-1], 0, 4)}, bytes(4), None, "whole numbers from 0"),
    "a size that is a truth value": ({"a": entry([True], 0, 4)}, bytes(4), None, "whole numbers from 0"),
    "a size that is a fraction": ({"a": entry([1.0], 0, 4)}, bytes(4), None, "whole numbers from 0"),
    "three offsets": ({"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 8]}}, bytes(4), None, "two whole numbers"),
    "a shape that is larger than its bytes": ({"a": entry([2], 0, 4)}, bytes(4), None, "takes 8 bytes, not 4"),
    "a shape of astronomic size": ({"a": entry([2**62, 2**62], 0, 4)}, bytes(4), None, "not 4"),
    "an overlap": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6), None, "overlaps"),
    "two tensors on the same bytes": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4), None, "overlaps"),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), None, "leaves a hole"),
    "a file cut short": ({"a": entry([2], 0, 8)}, bytes(7), None, "the file at"),
    "bytes after the last tensor": ({"a": entry([1], 0, 4)}, bytes(5), None, "the file at"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_file_is_refused(fault: str, tmp_path: Path) -> None:
    header, data, length, message = FAULTS[fault]
    path = write(tmp_path / "bad.safetensors", header, data, length=length)
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(InputError, match="does not fit a file of 3 bytes"):
        SafetensorsFile(tmp_path / "a")


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="the file does not exist"):
            SafetensorsFile(path)


def test_an_unknown_tensor_is_an_error_with_its_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file, pytest.raises(InputError, match=r"a\.safetensors: b"):
        file.read("b")


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    with SafetensorsFile(path) as file:
        with path.open("r+b") as handle:
            handle.truncate(2000)
        with pytest.raises(InputError, match="ends inside this tensor"):
            file.read("a")


def test_a_read_tensor_belongs_to_the_caller(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        file.read("a").fill_(7)
        assert torch.equal(file.read("a"), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_at_any_place(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(7, 149).to(dtype)
    assert is_finite(tensor)
    for place in range(tensor.numel()):
        planted = tensor.clone()
        planted.view(-1)[place] = value
        assert not is_finite(planted)


def test_the_largest_finite_values_are_finite() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.ones(3, dtype=torch.int8))
