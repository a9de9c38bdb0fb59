"""The tgi layout: a folder that Text Generation Inference 3.3 serves, its launch files, and a checker of its rules.

Facts about TGI come from its sources (https://github.com/huggingface/text-generation-inference, 3.3). Paths in
docstrings are below `server/text_generation_server/`, unless they begin with `server`, `router` or `launcher`.
"""
