"""Plans a run, runs the stages in order, and verifies or inspects finished folders."""

from qexport.pipeline.from_python import quantize
from qexport.pipeline.measuring import measured
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.result import Result
from qexport.pipeline.running import run
from qexport.pipeline.sweep_result import SweepResult
from qexport.pipeline.sweeping import sweep
from qexport.pipeline.verification import verify

__all__ = ["Plan", "Result", "SweepResult", "measured", "plan", "quantize", "run", "sweep", "verify"]
