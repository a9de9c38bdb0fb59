"""Arguments, printing and exit codes."""

from qexport.cli import artifact_commands, release_commands, report_commands
from qexport.cli.app import main

__all__ = ["artifact_commands", "main", "release_commands", "report_commands"]
