"""A contender and its rival measured in turn: each in a process of its own, one at work at a time.

Both prepare themselves (weights, compiling, a warm-up), then wait for their turns, so that they see
the same machine: A B A B ... What is reported is the median of the turns. Not more than two are
alive: what a third one keeps in memory would be taken from the others' caches.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

COMMIT = subprocess.run(
    ["git", "describe", "--always", "--dirty"],
    capture_output=True,
    text=True,
    cwd=os.path.dirname(__file__),
).stdout.strip()


LONG = 60.0  # seconds of a first turn, after which there is nothing left to warm


class Contender:
    """`command` is a script that calls `serve`; the backend goes by the environment."""

    def __init__(self, name, command, backend=None):
        environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3")
        if backend:
            environment["KERAS_BACKEND"] = backend
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, *command], env=environment, **pipes)
        self.name, self.seconds = name, []
        self.about = self._answer()  # one prepares at a time too

    def turn(self):
        time.sleep(0.2)  # the others' threads fall asleep
        self._say("turn")
        self.seconds.append(self._answer()["seconds"])

    def stop(self):
        self._say("stop")
        self.about |= self._answer()
        self.process.wait()

    def _say(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended before it answered; its message is above.")
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
        if line.strip() == "stop":
            break
        answer(seconds=timed(turn))
    answer(peak_gib=peak_gib())


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_gib():
    """Largest memory so far: the accelerator's where there is one, else the process'."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return round(sys.modules["torch"].cuda.max_memory_allocated() / 2**30, 2)
    if "jax" in sys.modules:
        statistics_of = sys.modules["jax"].local_devices()[0].memory_stats()
        if statistics_of:
            return round(statistics_of["peak_bytes_in_use"] / 2**30, 2)
    if "tensorflow" in sys.modules and sys.modules["tensorflow"].config.list_physical_devices(
        "GPU"
    ):
        used = sys.modules["tensorflow"].config.experimental.get_memory_info("GPU:0")
        return round(used["peak"] / 2**30, 2)
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)


def measure(rival, contender, turns):
    """Both are functions that start a `Contender`.

    Returns:
        A dict: median, fastest and slowest seconds of both, and how much faster the contender is.
    """
    pair = [rival(), contender()]
    for _ in range(turns):
        for one in pair:
            one.turn()
    for one in pair:
        one.stop()
    theirs, own = (statistics.median(one.seconds) for one in pair)
    return {
        "contender": pair[1].name,
        "rival": pair[0].name,
        "seconds": own,
        "fastest": min(pair[1].seconds),
        "slowest": max(pair[1].seconds),
        "rival_seconds": theirs,
        "ratio": float(f"{theirs / own:.3g}"),
        "commit": COMMIT,
        **pair[1].about,
    }


def table(rows, columns):
    """Rows as Markdown, a column a key."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[_short(row.get(key)) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(value):
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float | np.floating) else str(value)
