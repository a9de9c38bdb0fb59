"""Results go to stdout, progress and messages to stderr. A pipe that is closed early stops neither."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from qexport.amounts import duration, size
from qexport.architectures.memory import resident
from qexport.progress import Notice, Progress, ProgressCallback, Stage


class Terminal(Console):
    """A rich console that prints nothing more once its pipe is closed. The run goes on and keeps its exit code."""

    def on_broken_pipe(self) -> None:
        """Called by rich instead of raising."""
        self.quiet = True
        _discard(sys.stderr if self.stderr else sys.stdout)


def stdout() -> Terminal:
    """The console for results."""
    return Terminal(highlight=False)


def stderr() -> Terminal:
    """The console for progress, notes and errors."""
    return Terminal(stderr=True, highlight=False)


def write(text: str) -> None:
    """Writes a result to stdout, with one newline at its end; what stdout cannot encode becomes an escape.

    Raises:
        OSError: it could not be written, for example because the disk is full.
    """
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.rstrip("\n").encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def write_json(document: Any) -> None:
    """Writes the one JSON document of a command with `--json`, in ASCII where stdout cannot encode all of it."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    write(text)


def _discard(stream: IO[str]) -> None:
    """Redirects a stream to the null device, so that later writes of libraries cannot fail the run."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines of a stage. Its start and its end are always printed."""

_WIDEST_STAGE = len("calibrate")


@contextmanager
def progress_display(console: Console) -> Iterator[ProgressCallback]:
    """A callback that shows progress on this console: bars on a terminal, else plain lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        with _Bars(console) as live:
            yield live.show
    else:
        yield PlainLines(console).show


class Stopwatch:
    """The elapsed and the remaining time of each stage. A stage whose steps are counted anew begins again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.starts: dict[Stage, tuple[float, int]] = {}
        self.latest: dict[Stage, int] = {}

    def words(self, event: Progress) -> str:
        """`1:05 left` at the pace since the stage's first event, `took 2:10` at its end, or nothing."""
        if event.done < self.latest.get(event.stage, 0):
            del self.starts[event.stage]
        self.latest[event.stage] = event.done
        began, already_done = self.starts.setdefault(event.stage, (self.clock(), event.done))
        elapsed, finished = self.clock() - began, event.done - already_done
        if finished <= 0 or event.total <= 0:
            return ""
        if event.done >= event.total:
            return f"took {duration(elapsed)}"
        return f"{duration(elapsed / finished * (event.total - event.done))} left"


class PlainLines:
    """Plain lines for each stage: at its start, at its end, and every few seconds between them."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.stopwatch = Stopwatch(clock)
        self.last_printed: dict[Stage, float] = {}

    def show(self, event: Progress | Notice) -> None:
        """Prints the event, unless the stage has printed a line just before."""
        if isinstance(event, Notice):
            _print_note(self.console, event)
            return
        timing = self.stopwatch.words(event)
        is_due = self.clock() - self.last_printed.get(event.stage, float("-inf")) >= PLAIN_INTERVAL
        if is_due or (event.total and event.done >= event.total):
            self.last_printed[event.stage] = self.clock()
            parts = (position(event), tokens(event), timing, memory(), event.detail)
            line = f"{event.stage:<{_WIDEST_STAGE}}  {', '.join(filter(None, parts))}"
            self.console.print(Text(line), soft_wrap=True)


class _Bars(bars.Progress):
    """One bar per stage that has begun, and the memory below."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            bars.TextColumn("{task.description}", table_column=Column(min_width=_WIDEST_STAGE)),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.fields[position]}", table_column=Column(no_wrap=True)),
            bars.TextColumn("{task.fields[tokens]}", style="dim", table_column=Column(no_wrap=True)),
            bars.TextColumn("{task.fields[time]}", style="cyan", table_column=Column(no_wrap=True)),
            bars.TextColumn(
                "{task.fields[detail]}", style="dim", markup=False, table_column=Column(no_wrap=True, ratio=1)
            ),
            console=console,
            refresh_per_second=2,
            redirect_stdout=False,
            expand=True,
        )
        self.stopwatch = Stopwatch()
        self.rows: dict[Stage, bars.TaskID] = {}

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws: the bars and the memory."""
        yield self.make_tasks_table(self.tasks)
        yield Text(memory(), style="dim")

    def show(self, event: Progress | Notice) -> None:
        """Draws the event."""
        if isinstance(event, Notice):
            _print_note(self.console, event)
            return
        if event.stage not in self.rows:
            self.rows[event.stage] = self.add_task(event.stage, position="", tokens="", time="", detail="")
        self.update(
            self.rows[event.stage],
            completed=event.done,
            total=event.total or None,
            position=position(event),
            tokens=tokens(event),
            time=self.stopwatch.words(event),
            detail=event.detail,
        )


def position(event: Progress) -> str:
    """`block 12 of 30`, `1.2 GB of 4.5 GB`, or `12 files` where the total is not known."""
    if event.unit == "byte":
        return f"{size(event.done, decimals=1)} of {size(event.total, decimals=1)}"
    return f"{event.unit} {event.done} of {event.total}" if event.total else f"{event.done} {event.unit}s"


def tokens(event: Progress) -> str:
    """`32,768 tokens`, or nothing."""
    return f"{event.tokens:,} tokens" if event.tokens else ""


def memory() -> str:
    """`memory 512 MB, at peak 640 MB`."""
    held = resident()
    now = "" if held.now is None else f"{size(held.now)}, "
    return f"memory {now}at peak {size(held.peak)}"


def _print_note(console: Console, notice: Notice) -> None:
    console.print(Text.assemble(("note: ", "yellow"), notice.text), soft_wrap=True)
