"""The names of the files of a tokenizer and of generation, as transformers writes them."""

from __future__ import annotations

from typing import Final

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
TEMPLATES_FOLDER: Final = "additional_chat_templates"
OLD_TEMPLATE: Final = "chat_template.json"
