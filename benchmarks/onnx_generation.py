r"""Tokens a second, time to the first token and peak memory of ONNX folders, beside transformers and onnxruntime-genai.

Greedy, batch 1, on the CPU: decoding after a prompt of 64 tokens, and the first token after a prompt of 512. Every
measurement is a process of its own. All are measured in every round, one after the other, in the opposite order in
every second round, and a ratio compares what two did in the same round.

    python benchmarks/onnx_generation.py --folder int4=out/gptq-4bit/onnx
    python benchmarks/onnx_generation.py --folder int4=out/gptq-4bit/onnx --dense out/dense/safetensors --baseline int4
    python benchmarks/onnx_generation.py --checkpoint out/gptq-4bit/safetensors --peer genai=/path/to/its/env/bin/python

All programs in one table, by CPU seconds:

    OMP_NUM_THREADS=1 python benchmarks/onnx_generation.py --cpu-time --threads 1 --dense out/dense/safetensors \
        --folder ours=out/gptq-4bit-onnx/onnx --openvino OPENVINO/bin/python \
        --checkpoint out/gptq-4bit-onnx/safetensors --peer genai=GENAI/bin/python \
        --gguf Q4_0=out/gptq-4bit-gguf/model.gguf --llama LLAMA/bin/python

`--openvino` adds a row for each folder whose attention is plain. `--context 1500` decodes after a longer prompt.
`--shared` lets fused graphs and the builder's append to the memory of their past, as long prompts want it.

`--dense` adds transformers in bfloat16 and float32. With `--peer genai=...`, onnxruntime-genai's builder makes graphs
of the GPTQ checkpoint's codes, embedding and head in float32, at accuracy levels 0 and 4; they run through the same
loop as the folders, and through that runtime's own.

onnxruntime computes the prompt's logits at all positions, transformers at the last one only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost import ROOT, measure
from generation import Figures, Rows, figures, in_turns, ratio, spread
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

PEERS = Path(__file__).parent / "peers"
LONG = 512
ONNXRUNTIME = "onnxruntime_generation.py"
LEVELS = (0, 4)
EXCLUDED = "/lm_head/MatMul,/model/embed_tokens/Gather"


@dataclass(frozen=True)
class Contestant:
    """A script of `peers/`, the environment that it runs in, and what it reads."""

    python: str
    script: str
    folder: Path
    dtype: str = ""
    shared: bool = False


def main() -> None:
    """Builds the peer's graphs, then measures round after round and shows the table after each."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        contestants = _contestants(arguments, work)
        baseline = arguments.baseline or next(iter(contestants))
        if baseline not in contestants:
            raise SystemExit(f"--baseline {baseline}: one of {', '.join(contestants)}")
        if arguments.peer:
            _build(arguments, work)
        job = _job(arguments, next(iter(contestants.values())).folder)
        rows: Rows = {name: [] for name in contestants}
        for number in range(arguments.rounds):
            for name in in_turns(contestants, number):
                rows[name].append(_figures(contestants[name], job, work))
            _show(rows, baseline)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", default=[], type=_named, help="NAME=PATH, layout onnx; repeatable")
    parser.add_argument("--dense", type=Path, help="folder of the 16-bit model, for transformers")
    parser.add_argument("--checkpoint", type=Path, help="GPTQ folder that the peer's builder reads")
    parser.add_argument("--peer", type=_peer, help="genai=PYTHON")
    parser.add_argument("--openvino", help="interpreter of an environment with OpenVINO")
    parser.add_argument("--gguf", action="append", default=[], type=_gguf, help="NAME=FILE; repeatable")
    parser.add_argument("--llama", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompt before the decoded ones")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor, not those that pass")
    parser.add_argument("--shared", action="store_true", help="one memory for past and present")
    parser.add_argument("--baseline", help="row that the ratios refer to; the first one unless given")
    parser.add_argument(
        "--text", type=Path, default=ROOT / "calibration/heldout.jsonl", help="where the prompts are from"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--scratch", help="folder for the peer's graphs, twice the size of the float32 embedding and more"
    )
    arguments = parser.parse_args()
    if bool(arguments.peer) != bool(arguments.checkpoint):
        parser.error("--peer and --checkpoint belong together")
    if bool(arguments.gguf) != bool(arguments.llama):
        parser.error("--gguf and --llama belong together")
    if not (arguments.folder or arguments.dense or arguments.peer):
        parser.error("nothing to measure: give --folder, --dense or --peer")
    return arguments


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not (Path(path) / "model.onnx").is_file():
        raise argparse.ArgumentTypeError("NAME=PATH, with PATH a folder that has a model.onnx")
    return name, Path(path).resolve()


def _gguf(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not Path(path).is_file():
        raise argparse.ArgumentTypeError("NAME=FILE")
    return name, Path(path).resolve()


def _peer(text: str) -> str:
    name, _, python = text.partition("=")
    if name != "genai" or not python:
        raise argparse.ArgumentTypeError("genai=PYTHON")
    return python


def _contestants(arguments: argparse.Namespace, work: Path) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {}
    if arguments.dense:
        script, folder = "transformers_generation.py", arguments.dense.resolve()
        for dtype in ("bfloat16", "float32"):
            found[f"transformers {dtype}"] = Contestant(sys.executable, script, folder, dtype)
    for name, folder in arguments.folder:
        if name in found:
            raise SystemExit(f"--folder {name}: two rows of one name")
        fused = _is_fused(folder)
        found[name] = Contestant(sys.executable, ONNXRUNTIME, folder, shared=arguments.shared and fused)
        if arguments.openvino and not fused:
            found[f"{name}, OpenVINO"] = Contestant(arguments.openvino, "openvino_generation.py", folder)
    for name, file in arguments.gguf:
        found[f"{name}, llama.cpp"] = Contestant(arguments.llama, "llama_generation.py", file)
    for level in LEVELS if arguments.peer else ():
        folder = _built(work, level)
        found[f"builder, level {level}"] = Contestant(sys.executable, ONNXRUNTIME, folder, shared=arguments.shared)
        found[f"genai, level {level}"] = Contestant(arguments.peer, "genai_generation.py", folder)
    return found


def _is_fused(folder: Path) -> bool:
    return b"GroupQueryAttention" in (folder / "model.onnx").read_bytes()


def _built(work: Path, level: int) -> Path:
    return work / f"builder-{level}"


def _build(arguments: argparse.Namespace, work: Path) -> None:
    """The builder's graphs of the checkpoint's codes. Left alone, it would round embedding and head to 4 bits too."""
    source = ["-i", str(arguments.checkpoint.resolve()), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
    for level in LEVELS:
        options = ["--extra_options", f"accuracy_level={level}", f"nodes_to_exclude={EXCLUDED}"]
        module = [arguments.peer, "-m", "onnxruntime_genai.models.builder"]
        measure([*module, *source, "-o", str(_built(work, level)), *options], work)


def _job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The prompts, with the tokenizer of one of the folders: all have the same."""
    text = arguments.text.read_text()
    if arguments.text.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
    longest = max(LONG, arguments.context)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:longest]
    if len(tokens) < longest:
        raise SystemExit(f"--text has {len(tokens)} tokens, {longest} are needed")
    return {
        "threads": arguments.threads,
        "new_tokens": arguments.new_tokens,
        "long": tokens[:LONG],
        "short": tokens[: arguments.context],
        "cpu_time": arguments.cpu_time,
    }


def _figures(contestant: Contestant, job: dict[str, Any], work: Path) -> Figures:
    place = str(contestant.folder)
    own = {"folder": place, "file": place, "dtype": contestant.dtype, "shared": contestant.shared}
    return figures(contestant.python, PEERS / contestant.script, job | own, work)


def _show(rows: Rows, baseline: str) -> None:
    """Medians with minimum and maximum; the ratios are medians over the rounds."""
    table = Table("", "tokens/s", "ratio", "first token s", "ratio", "peak MB", "equal tokens")
    for name, row in rows.items():
        table.add_row(
            name,
            spread([each.speed for each in row], 1),
            ratio(row, rows[baseline], lambda each: each.speed),
            spread([each.first_token for each in row], 2),
            ratio(row, rows[baseline], lambda each: each.first_token),
            spread([each.peak_mb for each in row], 0),
            f"{_equal(row[-1].tokens, rows[baseline][-1].tokens)} of {len(row[-1].tokens)}",
        )
    Console(width=140).print(table, f"ratios and equal tokens refer to {baseline}; {len(rows[baseline])} rounds")


def _equal(tokens: list[int], expected: list[int]) -> int:
    """How many tokens are the same before the first one that is not."""
    return next((index for index, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(tokens))


if __name__ == "__main__":
    main()
