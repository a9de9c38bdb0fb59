"""The tgi layout: a folder that Text Generation Inference 3.3 serves, its launch files, and a checker of its rules.

What is said of TGI comes from its sources (https://github.com/huggingface/text-generation-inference, 3.3); names of
files without a folder of their own stand for files below `server/text_generation_server/`.
"""
