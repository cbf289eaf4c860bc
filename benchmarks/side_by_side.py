"""Contenders and their rival measured in turn: each in a process of its own, one at work at a time.

All prepare themselves (weights, compiling, a warm-up), then wait for their turns, so that they see
the same machine: A B A B ... What is reported is the median of the turns. The rival stays alive
beside one contender after the other. Not more than two are alive: what a third one keeps in memory
would be taken from the others' caches.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / ".gpu-bundle"  # what `make gpu-bundle` prepared


def _commit():
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        done = None
    if done and done.returncode == 0:
        return done.stdout.strip()
    bundled = BUNDLE / "commit"  # a copy of the files alone, without the repository
    return f"{bundled.read_text('utf-8').strip()} (when bundled)" if bundled.exists() else "unknown"


COMMIT = _commit()
LONG = 60.0  # seconds of a first turn, after which there is nothing left to warm


class Ended(Exception):
    """A contender's process ended before it answered."""

    def __init__(self, name, doing):
        super().__init__(f"its process ended {doing}; its message is on the error stream")
        self.name = name


class Contender:
    """`command` is a script that calls `serve`; `framework` computes, under Keras or without."""

    def __init__(self, name, command, framework):
        environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND=framework)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, *command], env=environment, **pipes)
        self.name, self.seconds = name, []
        self.about = self._answer("while it prepared")  # one prepares at a time too

    def turn(self):
        time.sleep(0.2)  # the others' threads fall asleep
        answer = self._ask("turn")
        self.seconds.append(answer["seconds"])
        self.about["peak_gib"] = answer["peak_gib"]

    def profile(self):
        return self._ask("profile")["operations"]

    def stop(self):
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, word):
        doing = f"during its {word}"
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self.name, doing) from None
        return self._answer(doing)

    def _answer(self, doing):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Ended(self.name, doing)
        return json.loads(line)


def serve(prepare):
    """A contender's side: `prepare()` returns what one turn does, and facts to report."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the other stream

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    turn, about = prepare()
    first = timed(turn)
    if first < LONG:
        timed(turn)  # the second may still settle: caches, the allocator
    answer(first_seconds=round(first, 3), **about)
    for line in sys.stdin:
        if line.strip() == "profile":
            from operations import longest

            answer(operations=longest(turn, os.environ["KERAS_BACKEND"]))
        else:
            answer(seconds=timed(turn), peak_gib=peak_gib())


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_gib():
    """Largest memory so far: the accelerator's where there is one, else the process'."""
    peak = _accelerator_peak(os.environ["KERAS_BACKEND"])
    if peak is None:
        with open("/proc/self/status", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    return round(peak / 2**30, 2)


def _accelerator_peak(framework):
    """Bytes. Only the framework that computes is asked: Keras imports others too, and a question
    would make them take some of the device.
    """
    module = sys.modules.get(framework)  # none if the side is plain Python
    if framework == "torch" and module.cuda.is_available():
        return module.cuda.max_memory_allocated()
    if framework == "jax" and (statistics_of := module.local_devices()[0].memory_stats()):
        return statistics_of["peak_bytes_in_use"]
    if framework == "tensorflow" and module.config.list_physical_devices("GPU"):
        return module.config.experimental.get_memory_info("GPU:0")["peak"]
    return None


def measure(rival, contenders, turns, profile=False):
    """The rival alone, then each contender in turn with it.

    One whose process ends (no memory left, say) is a row that says so, and the others go on,
    without a ratio if it was the rival.

    Args:
        rival: function that starts a `Contender`.
        contenders: list of such functions.
        turns: int, turns of each.
        profile: whether each is asked, after its turns, which operations take longest.

    Yields:
        dicts: `_row` of each; with `profile` its operations too, `operations.longest`.
    """
    beside = None
    for start in (rival, *contenders):
        one = None
        try:
            one = start()
            if start is rival:
                beside = one
            yield _row(one, beside, turns)
            if profile:
                yield from ({"contender": one.name, **row} for row in one.profile())
        except Ended as error:
            yield {"contender": error.name, "failed": str(error), "commit": COMMIT}
        if beside and beside.process.poll() is not None:
            beside = None
        if one and one is not beside:
            one.stop()
    if beside:
        beside.stop()


def _row(one, rival, turns):
    """Median, fastest and slowest seconds of a contender, and how much faster it is."""
    pair = [rival, one] if rival not in (None, one) else [one]
    for each in pair:
        each.seconds = []
    for _ in range(turns):
        for each in pair:
            each.turn()
    own = statistics.median(one.seconds)
    theirs = statistics.median(rival.seconds) if rival else None
    return {
        "contender": one.name,
        "rival": rival.name if rival else None,
        "seconds": own,
        "fastest": min(one.seconds),
        "slowest": max(one.seconds),
        "rival_seconds": theirs,
        "ratio": float(f"{theirs / own:.3g}") if rival else None,
        "commit": COMMIT,
        **one.about,
    }


OPERATIONS = ["contender", "operation", "ms", "share", "calls"]


def report(rows, columns):
    """What `measure` yielded, as Markdown: the rows, who failed, the longest operations."""
    failed = [row for row in rows if "failed" in row]
    operations = [row for row in rows if "operation" in row]
    rest = [row for row in rows if "failed" not in row and "operation" not in row]
    lines = [table(rest, columns)] if rest else []
    lines += [f"\n**{row['contender']} failed**: {row['failed']}." for row in failed]
    if operations:
        lines += ["", table(operations, OPERATIONS)]
    return "\n".join(lines)


def table(rows, columns):
    """Rows as Markdown, a column a key."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[_short(row.get(key)) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(value):
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float | np.floating) else str(value)
