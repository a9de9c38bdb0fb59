"""The onnx layout: one graph for prefill and decoding, traced without weights, with the same codes as other layouts.

Facts about ONNX Runtime's own operators (domain `com.microsoft`) come from its `docs/ContribOperators.md`.
"""
