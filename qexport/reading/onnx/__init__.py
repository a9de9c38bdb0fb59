"""Finished ONNX artifacts, read back from disk and run. Needs the extra `onnx`."""
