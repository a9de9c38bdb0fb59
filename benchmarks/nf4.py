"""Merge + NF4 of a checkpoint with Falcon-7B's shapes and random weights: seconds and peak memory of the whole process.

Beside it, each in a process of its own: bitsandbytes' own `quantize_4bit` over the same tensors one after the other,
and the bare reading of the base and writing of as many bytes as the artifact has. Files leave the page cache before
each.

    python benchmarks/nf4.py --scratch /a/disk/with/24/GB
    python benchmarks/nf4.py --blocks 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cost import Cost, measure
from falcon_checkpoint import write_checkpoint
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qexport.architectures.architecture import Architecture
from qexport.architectures.structure import Structure

_CHUNK = 1 << 22


def main() -> None:
    """Runs the parts and shows what each took."""
    arguments = _arguments()
    if arguments.part:
        _PARTS[arguments.part](Path.cwd(), arguments.peer_blocks)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        structure = _prepare(work, arguments.blocks, double_quant=arguments.double_quant)
        rows: dict[str, Cost] = {}
        myself = [sys.executable, str(Path(__file__).resolve()), "--peer-blocks", str(arguments.peer_blocks)]
        commands = {"qexport run": [sys.executable, "-m", "qexport", "run", "recipe.yaml"]} | {
            part: [*myself, "--part", part] for part in _PARTS
        }
        for name, command in commands.items():
            _leave_cache(work)
            rows[name] = measure(command, work)
            _show(rows)  # each time: the next part takes minutes
        _check(work, structure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32, help="decoder blocks; Falcon-7B has 32")
    parser.add_argument("--peer-blocks", type=int, default=32, help="bitsandbytes quantizes only so many of them")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--scratch", help="folder for the checkpoint and the artifact: 20 GB with all blocks")
    parser.add_argument("--part", choices=_PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(work: Path, blocks: int, *, double_quant: bool) -> Structure:
    """The checkpoint, and the recipe."""
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<unk>": 1}, unk_token="<unk>"))
    structure = write_checkpoint(work, blocks)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(work / "base")
    recipe = {
        "load": {"base": str(work / "base"), "adapter": str(work / "adapter")},
        "quantize": {"method": "nf4", "double_quant": double_quant},
        "export": [{"layout": "safetensors"}],
        "output": str(work / "artifact"),
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return structure


def _bitsandbytes(work: Path, blocks: int) -> None:
    """Its own quantization of the same matrices one after the other; nothing is merged or written."""
    from bitsandbytes.functional import quantize_4bit

    double_quant = json.loads((work / "recipe.yaml").read_text())["quantize"]["double_quant"]
    structure = Architecture(json.loads((work / "base" / "config.json").read_text())).structure
    quantized = {f"{linear.name}.weight" for linears in structure.linears.values() for linear in linears}
    seconds, cpu, count = 0.0, 0.0, 0
    for path in itertools.islice(_shards(work / "base"), blocks + 1):
        with safe_open(path, "pt") as file:
            for name in quantized.intersection(_names(path)):
                weight = file.get_tensor(name)
                start, cpu_start = time.perf_counter(), time.process_time()
                quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
                seconds, cpu = seconds + time.perf_counter() - start, cpu + time.process_time() - cpu_start
                count += weight.numel()
    print(f"quantize_4bit alone: {count / 1e9:.2f} billion parameters in {seconds:.1f} s, {cpu:.1f} CPU s")


def _bare(work: Path, _: int) -> None:
    """Reads the base and writes as many bytes as the artifact's weights have, down to the disk."""
    size = sum(path.stat().st_size for path in _shards(work / "artifact"))
    buffer = bytearray(_CHUNK)
    for path in _shards(work / "base"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with (work / "copy").open("wb", buffering=0) as file:
        for start in range(0, size, _CHUNK):
            file.write(memoryview(buffer)[: size - start])
        os.fsync(file.fileno())
    (work / "copy").unlink()


_PARTS = {"bitsandbytes": _bitsandbytes, "bare": _bare}


def _shards(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("*.safetensors")))


def _names(path: Path) -> set[str]:
    with path.open("rb") as file:
        return set(json.loads(file.read(int.from_bytes(file.read(8), "little")))) - {"__metadata__"}


def _leave_cache(work: Path) -> None:
    """Every part reads from the disk, not from what the part before has left in memory."""
    for path in [*_shards(work / "base"), *_shards(work / "artifact")]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check(work: Path, structure: Structure) -> None:
    """Every linear layer has been quantized."""
    names = {name for path in _shards(work / "artifact") for name in _names(path)}
    linears = [linear.name for each in structure.linears.values() for linear in each]
    assert all(f"{name}.weight.quant_state.bitsandbytes__nf4" in names for name in linears)


def _show(rows: dict[str, Cost]) -> None:
    table = Table("", "wall s", "CPU s", "peak MB")
    for name, cost in rows.items():
        table.add_row(name, f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{cost.peak_mb:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
