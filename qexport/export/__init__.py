"""The layouts that artifacts are written in, and the writer of weights that they share."""
