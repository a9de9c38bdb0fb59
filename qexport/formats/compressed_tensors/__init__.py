"""The format of compressed-tensors: writing (`format`), reading (`reading`), bit layout (`tensors`)."""
