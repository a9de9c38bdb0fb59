"""Runs in the environment of llama.cpp: trains SentencePiece's BPE, whose own file llama.cpp's converter reads.

    python train_with_sentencepiece.py TEXT FOLDER STYLE

TEXT has one text a line; STYLE is JSON with `prefix`, `special` and `found` as in `sentencepiece_tokenizers.Style`.
FOLDER gets tokenizer.model, and pieces.json with all pieces in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(text: str, folder: str, style: str) -> None:
    """Nothing is normalized, and all spaces stay."""
    import sentencepiece  # type: ignore[import-not-found]

    chosen, target = json.loads(style), Path(folder)
    unknown, begin, end, *control = chosen["special"]
    sentencepiece.SentencePieceTrainer.train(
        input=text, model_prefix=str(target / "tokenizer"), model_type="bpe", vocab_size=700, byte_fallback=True,
        add_dummy_prefix=chosen["prefix"], remove_extra_whitespaces=False, normalization_rule_name="identity",
        unk_piece=unknown, bos_piece=begin, eos_piece=end, control_symbols=control,
        user_defined_symbols=chosen["found"], allow_whitespace_only_pieces=True,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(target / "tokenizer.model"))
    pieces = [model.IdToPiece(number) for number in range(model.vocab_size())]
    (target / "pieces.json").write_text(json.dumps(pieces), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
