"""The names of the files in which a model's folder keeps its tokenizer, its chat templates and its ends of text."""

from __future__ import annotations

from typing import Final

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
TEMPLATES_FOLDER: Final = "additional_chat_templates"
OLD_TEMPLATE: Final = "chat_template.json"
