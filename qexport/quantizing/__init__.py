"""Quantization methods, one file per method, with the Hessian and the solver of GPTQ."""
