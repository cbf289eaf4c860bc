"""Kills a run that writes a cache, again and again: python killed.py FOLDER KILLS.

A process of its own, so that it forks before anything starts threads.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from caches import content, read_cache, write_captioned

from keras_uvit.data.manifest import CacheError
from keras_uvit.encoders import SpaceToDepth

NUM_SHARDS = 5


def work(seconds=0.001):
    """Takes so much of the process's own time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Slow(SpaceToDepth):
    def encode(self, images, batch_size=None, verbose=0):
        work()
        return super().encode(images)


def write(path, autoencoder):
    write_captioned(path, autoencoder=autoencoder, shard_size=2, batch_size=1)


def killed(path, after):
    """Whether the run was killed, after so many seconds of its own time: others' do not count."""
    child = os.fork()
    if not child:
        synchronize = os.fsync
        os.fsync = lambda file: (work(0.0005), synchronize(file))  # longer in write_file
        signal.setitimer(signal.ITIMER_PROF, after)  # whose signal nobody handles
        try:
            write(path, Slow())
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGPROF), status
    return status != 0


def done(path):
    """Shards that are there, by what a reader is told."""
    try:
        return read_cache(path) and NUM_SHARDS
    except FileNotFoundError:  # killed before the plan was there
        return 0
    except CacheError as error:
        words = str(error).split("is unfinished: ")[1].split()
        assert words[1:4] == ["of", str(NUM_SHARDS), "shards"], words
        return int(words[0])


out, wanted = Path(sys.argv[1]), int(sys.argv[2])
write(out / "whole", SpaceToDepth())
clock, kills, halves, folders = random.Random(0), 0, 0, 0
while kills < wanted:
    path, before = out / f"killed-{folders}", 0
    folders += 1
    while killed(path, clock.uniform(0.005, 0.08)):
        kills += 1
        halves += path.is_dir() and any(path.glob("tmp-*"))
        now = done(path)
        assert now >= before, (now, before)
        before = now
    assert content(path) == content(out / "whole")  # and no tmp-* beside
print(json.dumps({"kills": kills, "halves": halves}))
