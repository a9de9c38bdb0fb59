"""The stages, in the order in which the data goes through them."""

from qexport.pipeline.from_python import quantize
from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.result import Result
from qexport.pipeline.running import run
from qexport.pipeline.verification import verify

__all__ = ["Plan", "Result", "plan", "quantize", "run", "verify"]
