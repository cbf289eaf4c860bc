"""Which operations of a function take longest, as PyTorch's or JAX's profiler saw them.

On a GPU these are kernels, on a CPU the framework's operations. "all of them" beside the time of
the call says how long the device had nothing to do; on several CPU cores it can exceed that.
"""

import collections
import re
import tempfile
from pathlib import Path

COUNT = 8
WIDTH = 60  # characters of a name; C++ templates have hundreds


def longest(function, framework):
    """Calls the function once; returns one dict per operation, the longest first.

    `framework` is "jax" or "torch". `ms` and `calls` are those of one call of the function, `share`
    is the part of the time of all operations.
    """
    spans = {"jax": _spans_of_jax, "torch": _spans_of_torch}[framework](function)
    total, spent = 0.0, collections.defaultdict(lambda: [0.0, 0])
    for name, ms, calls in spans:
        total += ms
        known = spent[re.sub(r"[._]\d+", "", name)[:WIDTH]]  # fusion.12 and fusion.7 are of a kind
        known[0] += ms
        known[1] += calls
    if not total:
        raise RuntimeError("The profiler saw no operations.")
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])[:COUNT]
    ranked.insert(0, ("all of them", (total, sum(calls for _, calls in spent.values()))))
    return [
        dict(operation=name, ms=round(ms, 4), share=round(ms / total, 3), calls=calls)
        for name, (ms, calls) in ranked
    ]


def _spans_of_torch(function):
    """Yields (name, milliseconds, calls)."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        function()
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in seen.key_averages():
        if event.device_type == device and not event.is_user_annotation:  # spans of operations
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            yield event.key, us / 1000, event.count


def _spans_of_jax(function):
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            function()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            for event in line.events:
                # A GPU's lines are its streams; a CPU's hold much beside the program's operations.
                if line.name.startswith("Stream") if gpus else "hlo_op" in dict(event.stats):
                    yield event.name, event.duration_ns / 1e6, 1
