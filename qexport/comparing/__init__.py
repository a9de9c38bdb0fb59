"""Two models, adapters or artifacts of any maker, compared: their tensors, small files, recipes and figures."""
