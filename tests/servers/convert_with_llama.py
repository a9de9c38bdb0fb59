"""Runs in the environment of llama.cpp: its own converter, for several models.

    python convert_with_llama.py CONVERTER JOBS

JOBS is a JSON file with a list of [model, output, pre-tokenizer]: the converter itself knows public tokenizers only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(converter: str, jobs: str) -> None:
    """Converts each model to BF16."""
    sys.path[:0] = [converter, f"{converter}/gguf-py"]
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    import transformers
    from conversion import base  # type: ignore[import-not-found]

    models = vars(base)["ModelBase"]
    models.load_hparams = staticmethod(with_own_keys(models.load_hparams))
    vars(transformers)["AutoTokenizer"] = transformers.PreTrainedTokenizerFast  # which is as tokenizer.json says
    for model, output, name in json.loads(Path(jobs).read_text(encoding="utf-8")):
        vars(base)["TextModel"].get_vocab_base_pre = lambda self, tokenizer, name=name: name
        run(convert_hf_to_gguf, ["--outtype", "bf16", "--outfile", output, model])


def with_own_keys(load: Any) -> Any:
    """The configuration that transformers makes, with a key that it drops and the converter reads."""

    def loaded(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = load(folder, is_mistral_format)
        return {**({"rotary_pct": own["rotary_pct"]} if "rotary_pct" in own else {}), **found}

    return loaded


def run(converter: Any, arguments: list[str]) -> None:
    """The converter's command line."""
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    converter.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
