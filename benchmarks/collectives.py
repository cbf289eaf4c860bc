"""What devices send one another: read from the text of a program that XLA has partitioned."""

import collections
import math
import re

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Of an array of S bytes and a group of g devices, what a device sends, in units of S (g - 1) / g:
# rings, the least possible for large arrays (Thakur et al. 2005). S is the larger side.
SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")

Sent = collections.namedtuple("Sent", "kind bytes group")  # group: ids of the devices of one group


def collectives(program):
    """Every collective of a step, as often as it runs: [Sent(kind, bytes sent a device, group)].

    An all-reduce of which each device reads only its own part counts as the reduce-scatter that
    compilers for GPU and TPU make of it; the one for CPUs does not.
    """
    computations, entry = _computations(program)
    found = []

    def visit(name, times):
        lines = computations[name]
        readers = _readers(lines)
        for result, shape, kind, rest in lines:
            for inner, count in _called(kind, rest, computations):
                before = len(found)
                visit(inner, times * (count or 1))
                if count is None and len(found) > before:
                    raise ValueError(f"How often does the loop {result} run? It communicates.")
            if kind.removesuffix("-start") in KINDS:
                if kind.endswith("-start"):
                    raise ValueError("Asynchronous collectives are not read.")
                found.extend([_sent(kind, shape, rest, readers[result])] * times)

    visit(entry, 1)
    return found


def _computations(program):
    """{name: [(result, shape, kind, rest of the line)]}, and the name of the first to run."""
    computations, entry, lines = {}, None, None
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif lines is not None and (found := INSTRUCTION.match(line)):
            lines.append(found.groups())
    return computations, entry


def _readers(lines):
    readers = collections.defaultdict(list)
    for _, shape, kind, rest in lines:
        for operand in set(re.findall(r"%([\w.\-]+)", rest.split("), ")[0])):
            readers[operand].append((shape, kind))
    return readers


def _called(kind, rest, computations):
    """[(computation, how often)] that an instruction runs; None: a loop of unknown length."""
    if kind in ("all-reduce", "reduce-scatter", "reduce", "fusion"):
        return []
    names = re.findall(r"(?:body|to_apply|calls|\w+_computation)=%?([\w.\-]+)", rest)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
        names += re.findall(r"[\w.\-]+", branches)
    count = 1
    if kind == "while":
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
        count = int(trips[1]) if trips else None
    return [(name, count) for name in names if name in computations]


def _sent(kind, shape, rest, readers):
    size = _bytes(shape)
    if kind == "collective-permute":
        pair = re.search(r"source_target_pairs=\{.*?\{(\d+),(\d+)\}", rest)
        return Sent(kind, size, (int(pair[1]), int(pair[2])))
    group = _group(rest)
    if kind == "reduce-scatter":
        size *= len(group)
    part = size / len(group)
    parts = [reader == "dynamic-slice" and _bytes(s) == part for s, reader in readers]
    if kind == "all-reduce" and parts and all(parts) and len(group) > 1:
        kind = "reduce-scatter"
    return Sent(kind, SENT[kind] * size * (len(group) - 1) / len(group), group)


def _bytes(shape):
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays
    )


def _group(rest):
    """Ids of the first group, from any of the three ways to write groups."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{([^}]*)\}", rest):
        return _group_of_mesh(*found.groups())
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+\]\S*?),? ", rest):
        return _ids(_iota(found[3]).reshape(int(found[1]), int(found[2]))[0])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(_ints(found[1]))
    raise ValueError(f"Cannot read the groups of: {rest[:200]}")


def _group_of_mesh(axes, order, names):
    """'a'=2,'b'=4 and 'b', or 'b':(2)2 for the second 2 of 'b', which is 2 x 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", names)
    if len({name for name, *_ in wanted}) < len(wanted):
        raise ValueError(f"Cannot read the groups {names} of a mesh.")
    wanted = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in wanted}
    shape, index = [], []
    for name, size in sizes.items():
        before, own = wanted.get(name, (1, 1))
        shape += [before, own, size // before // own]
        index += [0, slice(None), 0]
    count = math.prod(sizes.values())
    found = re.search(r"device_ids=\((.*\]\S*)\)", order)
    ids = _iota(found[1]) if found else _iota(f"[{count}]")
    return _ids(ids.reshape(shape)[tuple(index)])


def _iota(text):
    """[2,4]T(1,0): 0 to 7 as 2 x 4, transposed."""
    shape, _, order = text.strip("[)").partition("]")
    ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return ids.transpose(_ints(order.removeprefix("T("))) if order else ids


def _ids(array):
    return tuple(int(i) for i in array.ravel())


def _ints(text):
    return [int(n) for n in text.split(",")]
