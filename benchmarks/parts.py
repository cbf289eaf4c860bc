"""Runs scripts one after the other, each within its share of the time, and keeps what they print.

A script prints one JSON object per row; a row is in `rows.jsonl` as soon as it is printed, so that
whatever ends a script, or the run, leaves the rows before it. Everything else it says is in a log.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import side_by_side

HERE = Path(__file__).parent
ROWS = "rows.jsonl"
LEAST = 5  # seconds; with less nothing can be measured


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    seconds: int  # its share of the time
    about: str  # one line, for --help
    command: tuple  # what Python is given, in this folder
    columns: tuple = ()  # of its table


@dataclasses.dataclass(frozen=True)
class Outcome:
    part: Part
    status: str  # "ok", or why not
    seconds: float
    rows: list


def run(parts, minutes, out, environment):
    """Yields an `Outcome` for each part.

    The shares are stretched to fill the minutes. A part may run until the shares of all parts up to
    it are used up: what one leaves over, the next ones have.

    Args:
        parts: list of `Part`, the most valuable first.
        minutes: float, for all of them.
        out: `Path` of a folder for `rows.jsonl` and one log per part.
        environment: dict, of the processes.
    """
    start = time.monotonic()
    stretch = 60 * minutes / sum(part.seconds for part in parts)
    end = start
    for part in parts:
        end += stretch * part.seconds
        began = time.monotonic()
        if end - began < LEAST:
            status, rows = "not started: no time was left", []
        else:
            status, rows = _run_one(part, end - began, out, environment)
        seconds = round(time.monotonic() - began, 1)
        keep(out, {"part": part.name, "status": status, "part_seconds": seconds})
        yield Outcome(part, status, seconds, rows)


def keep(out, row):
    with open(out / ROWS, "a", encoding="utf-8") as file:
        print(json.dumps(row), file=file)


def _run_one(part, seconds, out, environment):
    """Returns (status, rows)."""
    rows, command = [], [sys.executable, *part.command]
    with open(out / f"{part.name}.log", "w", buffering=1, encoding="utf-8") as log:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        # A session of its own: what the script starts has to end with it.
        process = subprocess.Popen(
            command, cwd=HERE, env=environment, start_new_session=True, **pipes
        )
        over = threading.Event()
        timer = threading.Timer(seconds, lambda: (over.set(), _kill(process)))
        timer.start()
        try:
            for line in process.stdout:
                row = _row(line)
                if row is None:
                    log.write(line)
                else:
                    rows.append({"part": part.name, **row})
                    keep(out, rows[-1])
            process.wait()
        finally:
            timer.cancel()
            _kill(process)
    if over.is_set():
        return f"out of time after {seconds:.0f} s", rows
    code = process.returncode
    return ("ok" if code == 0 else f"failed with exit status {code}"), rows


def _row(line):
    """The row that a line is; None for other words, such as a line that was cut off."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _kill(process):
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)


def summary(outcomes):
    """Markdown: what became of each part, and its rows."""
    sections = []
    for outcome in outcomes:
        part = outcome.part
        sections.append(f"## {part.name}: {outcome.status} ({outcome.seconds:.0f} s)")
        if outcome.rows:
            sections.append(side_by_side.report(outcome.rows, part.columns))
        if outcome.status != "ok":
            sections.append(f"The end of {part.name}.log says more.")
    return "\n\n".join(sections)
