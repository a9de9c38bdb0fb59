"""Arguments, printing and exit codes."""

from qexport.cli.commands import main

__all__ = ["main"]
