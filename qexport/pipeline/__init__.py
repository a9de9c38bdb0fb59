"""Plans a run, runs the stages in order, and verifies or inspects finished folders.

Names are imported when they are used: what needs a part of the pipeline does not wait for the imports of all stages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexport.pipeline.from_python import quantize
    from qexport.pipeline.measuring import measured
    from qexport.pipeline.planning import Plan, plan
    from qexport.pipeline.result import Result
    from qexport.pipeline.running import run
    from qexport.pipeline.sweep_result import SweepResult
    from qexport.pipeline.sweeping import sweep
    from qexport.pipeline.verification import verify

__all__ = ["Plan", "Result", "SweepResult", "measured", "plan", "quantize", "run", "sweep", "verify"]

_PLACES = {
    "Plan": "planning",
    "Result": "result",
    "SweepResult": "sweep_result",
    "measured": "measuring",
    "plan": "planning",
    "quantize": "from_python",
    "run": "running",
    "sweep": "sweeping",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
