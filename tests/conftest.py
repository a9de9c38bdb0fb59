"""What holds for every test."""

import torch

# Tiny models gain nothing from a second thread, and lose much where other programs keep the cores busy. Tests that are
# about threads set their own number.
torch.set_num_threads(1)
