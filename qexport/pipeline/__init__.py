"""The stages, in the order in which the data goes through them."""

from qexport.pipeline.planning import Plan, plan
from qexport.pipeline.quantizing import quantize
from qexport.pipeline.running import Result, run
from qexport.pipeline.verification import verify

__all__ = ["Plan", "Result", "plan", "quantize", "run", "verify"]
