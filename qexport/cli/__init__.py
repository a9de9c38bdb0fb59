"""Arguments, printing and exit codes."""

from qexport.cli import (
    artifact_commands,
    looking_commands,
    plan_command,
    release_commands,
    report_commands,
    sweep_command,
)
from qexport.cli.app import listed_by_moment, main

listed_by_moment()

__all__ = [
    "artifact_commands",
    "looking_commands",
    "main",
    "plan_command",
    "release_commands",
    "report_commands",
    "sweep_command",
]
