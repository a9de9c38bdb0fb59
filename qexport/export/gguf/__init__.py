"""The layout gguf: one file that llama.cpp and the programs around it run.

`layout` puts it together: `model_keys` and `tokenizer_keys` say what the file's header tells, `files` writes it.
"""
