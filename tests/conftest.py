"""What holds for every test."""

import torch
from hypothesis import settings

# Tiny models gain nothing from a second thread, and lose much where other programs keep the cores busy. Tests that are
# about threads set their own number.
torch.set_num_threads(1)

# Speed is measured in benchmarks/, not in tests: coverage and busy cores make single examples slow.
settings.register_profile("qexport", deadline=None)
settings.load_profile("qexport")
