"""The format of AutoGPTQ v1: writing (`format`), reading (`reading`), bit layout (`tensors`)."""
