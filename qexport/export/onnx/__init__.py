"""The onnx layout: one graph for prefill and decoding, traced without weights, and the codes that every layout has.

What is said of ONNX Runtime's own operators (domain `com.microsoft`) comes from its `docs/ContribOperators.md`.
"""
