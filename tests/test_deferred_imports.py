"""The command line does without scipy.optimize, which is there all the same for whoever uses it."""

from __future__ import annotations

import subprocess
import sys

import pytest

AFTER_AN_IMPORT = """
import sys
from qexport.deferred_imports import defer_scipy_optimize
defer_scipy_optimize()
import transformers.modeling_utils
assert "scipy.optimize._optimize" not in sys.modules
"""

USES = {
    "the name that transformers imports": (
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment\n"
        "assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]"
    ),
    "a function": "from scipy.optimize import brentq\nassert abs(brentq(lambda x: x - 2, 0, 5) - 2) < 1e-9",
    "the module": "import scipy.optimize\nassert abs(scipy.optimize.brentq(lambda x: x - 2, 0, 5) - 2) < 1e-9",
    "a part of it": "from scipy.optimize._zeros_py import brentq\nassert abs(brentq(lambda x: x - 2, 0, 5) - 2) < 1e-9",
    "all modules": "import inspect\ninspect.getmodule(print)\nassert 'scipy.optimize._optimize' not in sys.modules",
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_deferred_works(use: str) -> None:
    done = subprocess.run([sys.executable, "-c", AFTER_AN_IMPORT + use], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_import_is_deferred_in_a_process_of_a_user() -> None:
    program = "import qexport, sys\nqexport.load\nassert 'scipy.optimize._optimize' in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
