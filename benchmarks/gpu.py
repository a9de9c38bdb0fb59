"""What one GPU takes for the oracles of tests/gpu, merge + GPTQ, NF4 and a verification, within a time budget.

Each job is a process of its own, which says after each block how far it is; at the end of its time it is stopped, and
what it has said is written. The result is one JSON, which is written anew after each job. Checkpoints have random
weights and are written to the disk before: so reading and merging are part of what is measured, the writing of an
artifact is not.

    benchmarks/gpu.sh --output gpu.json --scratch /a/disk/with/30/GB
    benchmarks/gpu.sh --device cpu --tiny
    benchmarks/gpu.sh --show gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from falcon_checkpoint import write_shapes
from transformers import FalconConfig, LlamaConfig, PretrainedConfig

from qexport.architectures.runner import BlockRunner
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.merge import MergeSettings
from qexport.merge.merging import merge
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.layer import Hessian
from qexport.quantizing.method import CalibrationSettings, PassInputs
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.solver import Options, factorize, loop_on, plain_loop, solve
from qexport.tensors import CalibrationSet, GroupQuantized, Origin
from qexport.verifying.divergence import compare_two
from qexport.verifying.lockstep import run_in_lockstep

HERE = Path(__file__).parent
ORACLES_SHARE = 0.25
"""Of the budget, that the oracles may take at most."""

GPU_MEMORY = 8e9
"""Bytes that Falcon-7B is given."""


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        windows: of calibration text.
        length: of each, in tokens.
        compared: windows of the verification.
        blocks: that both models have.
        fewer: blocks of the checkpoints of the shorter jobs.
        matrix: inputs of the largest layer of the job `parts`.
    """

    windows: int = 128
    length: int = 2048
    compared: int = 32
    blocks: int = 32
    fewer: int = 4
    matrix: int = 14336


TINY = Size(windows=4, length=64, compared=2, blocks=2, fewer=2, matrix=256)


def main() -> None:
    arguments = _arguments()
    if arguments.show:
        print(_table(json.loads(arguments.show.read_text())))
    elif arguments.job:
        _JOBS[arguments.job](arguments)
    else:
        _run_all(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--budget", type=float, default=570, help="seconds until everything has ended")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--scratch", help="folder for the checkpoints: 25 GB at all blocks")
    parser.add_argument("--blocks", type=int, help="of Llama-8B's shapes, instead of all 32")
    parser.add_argument("--tiny", action="store_true", help="the same jobs on models of a few thousand weights")
    parser.add_argument("--show", type=Path, help="print the table of a JSON, and do nothing else")
    parser.add_argument("--job", choices=_JOBS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_all(arguments: argparse.Namespace) -> None:
    """The short jobs first; what is left of the time is the last one's."""
    started = time.monotonic()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU of CUDA here; --device cpu --tiny tries the script out")
    found: dict[str, Any] = {"machine": _machine(arguments.device), "tiny": arguments.tiny, "jobs": {}}
    with tempfile.TemporaryDirectory(prefix="qexport-", dir=arguments.scratch) as scratch:
        if arguments.device == "cuda":
            found["oracles"] = _oracles(arguments.budget * ORACLES_SHARE, Path(scratch))
            _write(arguments.output, found)
        for name in _JOBS:
            left = arguments.budget - (time.monotonic() - started)
            found["jobs"][name] = _job(name, arguments, Path(scratch), left)
            found["seconds"] = time.monotonic() - started
            _write(arguments.output, found)
    print(_table(found))


def _machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "processors": os.cpu_count()}
    if device == "cpu":
        return found | {"card": None, "processor": platform.machine()}
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(driver, capture_output=True, text=True) if shutil.which(driver[0]) else None
    return found | {
        "card": torch.cuda.get_device_name(),
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
        "driver": answer.stdout.strip() if answer else None,
        "column_loop": loop_on(torch.device("cuda")).__name__,
    }


def _oracles(seconds: float, scratch: Path) -> dict[str, Any]:
    """The tests of tests/gpu, and what those that failed have said."""
    log = scratch / "oracles.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=line", "--durations=5", "tests/gpu"]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT)
        ended = _ends(process, seconds)
    lines = log.read_text(errors="replace").splitlines()[-40:]
    return {"passed": ended and process.returncode == 0, "seconds": time.monotonic() - start, "last_lines": lines}


def _ends(process: subprocess.Popen[Any], seconds: float) -> bool:
    """Whether it has ended by itself in its time; else it is stopped."""
    try:
        process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def _job(name: str, arguments: argparse.Namespace, scratch: Path, seconds: float) -> dict[str, Any]:
    """The last thing that a job has said, and how it ended."""
    own = ["--device", arguments.device, "--scratch", str(scratch), "--job", name]
    own += ["--tiny"] * arguments.tiny + (["--blocks", str(arguments.blocks)] if arguments.blocks else [])
    print(f"{name}, at most {seconds:.0f} s ...", file=sys.stderr)
    process = subprocess.Popen([sys.executable, str(HERE / "gpu.py"), *own], stdout=subprocess.PIPE, text=True)
    start, timer = time.monotonic(), Timer(max(1.0, seconds), process.kill)
    timer.start()
    assert process.stdout is not None
    said = [json.loads(line) for line in process.stdout if line.startswith("{")]
    timer.cancel()
    status = process.wait()
    late = time.monotonic() - start >= seconds and status < 0
    ended = "finished" if status == 0 else "stopped, its time was over" if late else f"failed with {status}"
    last: dict[str, Any] = said[-1] if said else {}
    return {"ended": ended} | last


def _write(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def _size(arguments: argparse.Namespace) -> Size:
    size = TINY if arguments.tiny else Size()
    return replace(size, blocks=arguments.blocks) if arguments.blocks else size


def _falcon(blocks: int, *, tiny: bool) -> PretrainedConfig:
    hidden, heads, vocabulary = (64, 4, 96) if tiny else (4544, 71, 65024)
    return FalconConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=blocks, vocab_size=vocabulary,
        multi_query=True, parallel_attn=True, bias=False, alibi=False, new_decoder_architecture=False,
        architectures=["FalconForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def _llama(blocks: int, *, tiny: bool) -> PretrainedConfig:
    hidden, wide, heads, pairs, vocabulary = (64, 256, 4, 2, 96) if tiny else (4096, 14336, 32, 8, 128256)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads, num_key_value_heads=pairs,
        num_hidden_layers=blocks, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def _merged(folder: Path, config: PretrainedConfig, adapted: str) -> tuple[Any, Any]:
    """Base and merged model. A checkpoint that an earlier job has written is used again."""
    if not (folder / "adapter").exists():
        write_shapes(folder, config, adapted)
    base = load_checkpoint(LoadSettings(base=str(folder / "base")))
    origin = Origin("folder", "adapter")
    return base, merge(base, folder / "adapter", MergeSettings(), adapter_origin=origin).checkpoint


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


class _Clock:
    """Seconds and peak memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def read(self) -> dict[str, float | None]:
        if self._device.type == "cpu":
            return {"seconds": time.perf_counter() - self._start, "peak_gb": None}
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        return {"seconds": seconds, "peak_gb": torch.cuda.max_memory_reserved() / 1e9}


def _quantize(arguments: argparse.Namespace, method: Any, base_of: Callable[[int], Any], blocks: int, of: int) -> None:
    """Says after each block how far it is, and what all blocks would take at that speed."""
    size, device = _size(arguments), torch.device(arguments.device)
    clock = _Clock(torch.device("cpu"))
    checkpoint = base_of(blocks)
    prepared = clock.read()["seconds"]
    ids = torch.randint(
        checkpoint.architecture.structure.vocab_size, (size.windows, size.length),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        inputs = PassInputs(
            checkpoint, method.plan(checkpoint), CalibrationSet(ids, sha256="", origin="random"),
            dtype=torch.bfloat16, device=device, scratch=Path(scratch),
        )  # fmt: skip
        clock, losses = _Clock(device), list[float]()
        for done, block in enumerate(_blocks(method.quantize(inputs), checkpoint.architecture.structure.blocks), 1):
            losses += [each for each in block if each is not None]
            read = clock.read()
            _say(
                blocks=done, of=of, tokens=ids.numel(), prepare_seconds=prepared, **read,
                seconds_of_all=_of_all(read["seconds"], done, of), measured=done == of,
                largest_loss=max(losses, default=None),
            )  # fmt: skip


def _of_all(seconds: float | None, done: int, of: int) -> float:
    """What all blocks take, if they take as long as those that are done."""
    assert seconds is not None
    return seconds / done * of


def _blocks(records: Iterator[Any], names: Sequence[str]) -> Iterator[list[float | None]]:
    """The losses of the layers of each block, once all of its tensors have come."""
    losses: list[float | None] = []
    current = None
    for record in records:
        block = next((name for name in names if record.name.startswith(f"{name}.")), None)
        if current is not None and block != current:
            yield losses
            losses = []
        current = block if block is not None else None
        if record.layer:
            losses.append(record.layer.loss)
    if current is not None:
        yield losses


def _gptq() -> Gptq:
    return Gptq(method="gptq", bits=4, group_size=64, calibration=CalibrationSettings(source="-"))


def _gptq_llama(arguments: argparse.Namespace) -> None:
    def make(blocks: int) -> Any:
        return _merged(Path(arguments.scratch) / "llama", _llama(blocks, tiny=arguments.tiny), "q_proj")[1]

    blocks = _size(arguments).blocks
    _quantize(arguments, _gptq(), make, blocks, _of(arguments))


def _gptq_falcon(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, GPU_MEMORY / total))

    def make(blocks: int) -> Any:
        folder = Path(arguments.scratch) / "falcon"
        return _merged(folder, _falcon(blocks, tiny=arguments.tiny), "query_key_value")[1]

    _quantize(arguments, _gptq(), make, _size(arguments).fewer, _of(arguments))


def _nf4(arguments: argparse.Namespace) -> None:
    _quantize(arguments, Nf4(), lambda blocks: _short_llama(arguments)[1], _size(arguments).fewer, _of(arguments))


def _of(arguments: argparse.Namespace) -> int:
    return TINY.blocks if arguments.tiny else Size.blocks


def _short_llama(arguments: argparse.Namespace) -> tuple[Any, Any]:
    config = _llama(_size(arguments).fewer, tiny=arguments.tiny)
    return _merged(Path(arguments.scratch) / "short-llama", config, "q_proj")


def _verification(arguments: argparse.Namespace) -> None:
    """The merged model against its base, both read from the disk, block by block."""
    size, device = _size(arguments), torch.device(arguments.device)
    base, merged = _short_llama(arguments)
    vocabulary = merged.architecture.structure.vocab_size
    ids = torch.randint(vocabulary, (size.compared, size.length), generator=torch.Generator().manual_seed(1))
    first, second = (
        BlockRunner(each.architecture.in_dtype(torch.bfloat16), each.weights, dtype=torch.bfloat16, device=device)
        for each in (merged, base)
    )
    clock = _Clock(device)
    batches, _ = run_in_lockstep([first, second], ids, lambda _: None, drift=False)
    forwards = clock.read()["seconds"]
    figures = compare_two((first, second), (batches[0], batches[1]), ids)
    read = clock.read()
    assert read["seconds"] is not None
    assert forwards is not None
    blocks, of = size.fewer, _of(arguments)
    whole = forwards / blocks * of + read["seconds"] - forwards
    _say(
        blocks=blocks, of=of, tokens=ids.numel(), **read, forward_seconds=forwards, seconds_of_all=whole,
        measured=blocks == of, tokens_per_second=ids.numel() / whole, mean_kl=float(figures.kl.mean()),
    )  # fmt: skip


def _parts(arguments: argparse.Namespace) -> None:
    """The parts of a solve, each twice: the first time compiles and warms up."""
    size, device = _size(arguments), torch.device(arguments.device)
    width, generator = size.matrix, torch.Generator().manual_seed(0)
    tokens = torch.randn(size.length, width, generator=generator).bfloat16().to(device)
    weight = torch.randn(min(4096, width), width, generator=generator).to(device)
    hessian, found = Hessian(width, device), dict[str, float]()

    def timed(name: str, function: Callable[[], object]) -> None:
        for _ in range(2):
            clock = _Clock(device)
            function()
            read = clock.read()["seconds"]
            assert read is not None
            found[name] = read
        _say(inputs=width, outputs=len(weight), tokens=len(tokens), seconds_of_parts=found)

    timed("hessian of a batch", lambda: hessian.add(tokens))
    matrix = hessian.matrix()
    matrix.diagonal().add_(1.0)
    options = Options(bits=4, group_size=64, order="static", sym=True, damp_percent=0.01, search=True)
    timed("factorization", lambda: factorize(matrix, options))
    timed("cholesky of the library, once", lambda: torch.linalg.cholesky_ex(matrix))
    factor = factorize(matrix, options)
    timed("solve", lambda: solve(weight, matrix, factor, options))
    if loop_on(device) is not plain_loop:
        timed("solve with the plain loop", lambda: _solve_plainly(weight, matrix, factor, options))
        ours, theirs = solve(weight, matrix, factor, options), _solve_plainly(weight, matrix, factor, options)
        equal = float((ours.codes == theirs.codes).float().mean())
        _say(inputs=width, outputs=len(weight), tokens=len(tokens), seconds_of_parts=found, equal_codes=equal)


def _solve_plainly(weight: torch.Tensor, matrix: torch.Tensor, factor: Any, options: Options) -> GroupQuantized:
    from qexport.quantizing import solver

    before, solver.loop_on = solver.loop_on, lambda device: plain_loop
    try:
        return solve(weight, matrix, factor, options)
    finally:
        solver.loop_on = before


_JOBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "parts": _parts,
    "verification": _verification,
    "nf4": _nf4,
    "gptq falcon-7b, 8 GB": _gptq_falcon,
    "gptq llama-8b": _gptq_llama,
}
"""In the order in which they run."""


def _table(found: Mapping[str, Any]) -> str:
    """Markdown for benchmarks/README.md."""
    lines = [
        json.dumps(found["machine"]) + (", tiny models, which say nothing of speed" if found["tiny"] else ""),
        "",
        f"oracles: {'not run' if 'oracles' not in found else 'passed' if found['oracles']['passed'] else 'FAILED'}",
        "",
        "| job | ended | blocks | s | s for all blocks | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, job in found["jobs"].items():
        done = f"{job['blocks']} of {job['of']}" if "blocks" in job else ""
        whole = f"{job['seconds_of_all']:.0f}{'' if job['measured'] else ', extrapolated'}" if done else ""
        peak = f"{job['peak_gb']:.1f}" if job.get("peak_gb") else ""
        seconds = f"{job['seconds']:.1f}" if "seconds" in job else ""
        lines.append(f"| {name} | {job['ended']} | {done} | {seconds} | {whole} | {peak} |")
    parts = found["jobs"].get("parts", {}).get("seconds_of_parts", {})
    return "\n".join([*lines, "", *(f"- {name}: {seconds:.3f} s" for name, seconds in parts.items())])


if __name__ == "__main__":
    main()
