"""A sampler written by PyTorch: ONNX.

`torch.onnx.export` would write out the loop, all rows of it one after the other: minutes of work,
and nine times the file for 25 rows of a small model. So it exports one row of `Program.advance`,
and the rows are the iterations of a `Loop` of ONNX around it.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

NEEDS: dict[str, dict[str, str]] = {"onnx": {"onnx": "export", "onnxscript": "export"}}
CARRY = ("x", "anchor", "denoised_1", "denoised_2")


class _Row(torch.nn.Module):
    """One row of the sampler, guided or not."""

    def __init__(self, program, is_guided):
        super().__init__()
        self.networks = torch.nn.ModuleList(program.networks)
        self.program, self.runs = program, ((is_guided, 1),)

    def forward(self, x, anchor, denoised_1, denoised_2, row, *conditions):
        names = [name for name in self.program.inputs if name != "noise"]
        carry = x, anchor, denoised_1, denoised_2
        given = dict(zip(names, conditions))
        return self.program.advance(_values(self.program), carry, row, self.runs, given)


class _Finish(torch.nn.Module):
    """Images of what the loop ends at."""

    def __init__(self, program):
        super().__init__()
        self.networks = torch.nn.ModuleList(program.networks[len(program.parties) :])
        self.program = program

    def forward(self, x):
        return self.program.finish(_values(self.program), x + 0.0)  # no output is an input


def _values(program):
    return [[w.value for w in network.variables] for network in program.networks]


def onnx(program: Any, path: Path) -> None:
    import onnx

    examples = {name: torch.from_numpy(value) for name, value in program.inputs.items()}
    noise, *conditions = examples.values()
    row, names = torch.from_numpy(program.table[:1]), list(examples)[1:]
    step = {
        is_guided: _exported(
            _Row(program, is_guided),
            # Copies: one tensor given four times would be one input.
            (*(noise.clone() for _ in CARRY), row, *conditions),
            [*CARRY, "row", *names],
            [f"new_{name}" for name in CARRY],
        )
        for is_guided in {is_guided for is_guided, _ in program.runs}
    }
    end = _exported(_Finish(program), (noise,), ["x"], ["images"])
    graph = _Graph(program)
    first = 0
    for k, (is_guided, count) in enumerate(program.runs):
        graph.loop(f"run_{k}/", step[is_guided], program.table[first : first + count], names)
        first += count
    onnx.save(graph.model(end), str(path))


def _exported(module, arguments, inputs, outputs):
    """The ONNX model of a module, its weights inside."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            module.eval(),
            arguments,
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            verbose=False,
        )
    return written.model_proto


class _Graph:
    """The graph of all runs: nodes one after the other, and each array once."""

    def __init__(self, program):
        from onnx import helper, numpy_helper

        self.helper, self.to_tensor = helper, numpy_helper.from_array
        self.program = program
        self.nodes = []
        self.arrays = {}  # tensor by the hash of its content
        zeros = self.array(np.zeros_like(program.inputs["noise"]))
        self.carry = ["noise", "noise", zeros, zeros]

    def array(self, array: np.ndarray) -> str:
        return self.keep(self.to_tensor(array, "array"))

    def keep(self, tensor: Any) -> str:
        """The name of a tensor in the graph; equal ones, such as all runs' weights, are one."""
        tensor.name = ""
        name = "array_" + hashlib.sha256(tensor.SerializeToString()).hexdigest()[:16]
        tensor.name = name
        self.arrays.setdefault(name, tensor)
        return name

    def part(self, prefix: str, model: Any) -> Any:
        """The graph of a model whose names have a prefix, without its arrays, which are kept."""
        from onnx import compose

        graph = compose.add_prefix(model, prefix).graph
        names = {tensor.name: self.keep(tensor) for tensor in graph.initializer}
        for node in graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = names.get(name, name)
        del graph.initializer[:]
        return graph

    def loop(self, prefix: str, model: Any, table: np.ndarray, conditions: list[str]) -> None:
        """Adds a run of rows: the iterations of a `Loop` whose body is one row."""
        make, types = self.helper, self.helper.np_dtype_to_tensor_dtype
        body, rows = self.part(prefix, model), self.array(table)
        for name in conditions:  # the body sees what is outside of it
            self.nodes.append(make.make_node("Identity", [name], [prefix + name]))
        index, going = f"{prefix}index", f"{prefix}going"
        at = [
            make.make_node("Gather", [rows, index], [f"{prefix}numbers"], axis=0),
            make.make_node(
                "Unsqueeze",
                [f"{prefix}numbers", self.array(np.array([0], "int64"))],
                [f"{prefix}row"],
            ),
            make.make_node("Identity", [going], [f"{prefix}goes_on"]),
        ]
        scalars = [
            make.make_tensor_value_info(index, types(np.dtype("int64")), []),
            make.make_tensor_value_info(going, types(np.dtype("bool")), []),
        ]
        goes_on = make.make_tensor_value_info(f"{prefix}goes_on", types(np.dtype("bool")), [])
        inputs = [*scalars, *list(body.input)[: len(CARRY)]]
        graph = make.make_graph([*at, *body.node], f"{prefix}body", inputs, [goes_on, *body.output])
        count = self.array(np.array(len(table), "int64"))
        new = [f"{prefix}after/{name}" for name in CARRY]
        self.nodes.append(make.make_node("Loop", [count, "", *self.carry], new, body=graph))
        self.carry = new

    def model(self, end: Any) -> Any:
        """The whole model: the runs, then what `end` makes of x."""
        make = self.helper
        last = self.part("end/", end)
        self.nodes.append(make.make_node("Identity", [self.carry[0]], ["end/x"]))
        self.nodes += last.node
        self.nodes.append(make.make_node("Identity", ["end/images"], ["images"]))
        (images,) = last.output
        images.name = "images"
        inputs = [
            make.make_tensor_value_info(k, make.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in self.program.inputs.items()
        ]
        arrays = list(self.arrays.values())
        graph = make.make_graph(self.nodes, "sampler", inputs, [images], arrays)
        return make.make_model(graph, opset_imports=end.opset_import, ir_version=end.ir_version)


WRITERS = {"onnx": onnx}
