"""Weights of an ONNX graph: the operators that multiply with codes, and the initializers that each takes."""
