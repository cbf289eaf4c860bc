"""A sampler written by TensorFlow: a SavedModel, ONNX by tf2onnx, LiteRT by its own converter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

NEEDS: dict[str, dict[str, str]] = {
    "tf_saved_model": {},
    "litert": {},
    "onnx": {"onnx": "export", "tf2onnx": "export"},
}


def tf_saved_model(program: Any, path: Path) -> None:
    """Its signature "serving_default" takes the inputs by their names and gives "images"."""
    module, sample = _module(program)
    tf.saved_model.save(module, str(path), signatures={"serving_default": sample})


def litert(program: Any, path: Path) -> None:
    module, sample = _module(program)
    functions = [sample.get_concrete_function()]
    path.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions(functions, module).convert())


def onnx(program: Any, path: Path) -> None:
    import tf2onnx

    _, sample = _module(program)
    handlers: dict[str, Any] = {name: (handler, []) for name, handler in HANDLERS.items()}
    tf2onnx.convert.from_function(
        sample, sample.input_signature, custom_op_handlers=handlers, output_path=str(path)
    )


def _module(program):
    """A module that keeps the weights, and the function of the inputs."""
    names, module = list(program.inputs), tf.Module()
    module.values = [[w.value for w in network.variables] for network in program.networks]
    specs = [tf.TensorSpec(v.shape, v.dtype, name=k) for k, v in program.inputs.items()]

    def sample(*inputs):
        values = [[tf.convert_to_tensor(v) for v in part] for part in module.values]
        return {"images": program(values, **dict(zip(names, inputs)))}

    module.sample = tf.function(sample, autograph=False, input_signature=specs)
    return module, module.sample


# Operations that ONNX has not, each as two that it has -------------------------------------------


def _as_two(first: str, second: str, flipped: bool = False) -> Callable[..., None]:
    """A handler of tf2onnx: `second(first(x), 1)`; `flipped` puts the one in front.

    `Log1p` adds the one first, so its "first" is the addition.
    """

    def handler(context, node, name, arguments):
        (x,), out = node.input, node.output[0]
        alike = dict(shapes=[context.get_shape(out)], dtypes=[context.get_dtype(out)])
        one = context.make_const(f"{node.name}_one", np.array(1, "float32")).output[0]
        context.remove_node(node.name)
        operands = [x, one] if first == "Add" else [x]
        y = context.make_node(first, operands, **alike).output[0]
        pair = [y] if second == "Log" else [one, y] if flipped else [y, one]
        context.make_node(second, pair, outputs=[out], **alike)

    return handler


HANDLERS = {
    "Erfc": _as_two("Erf", "Sub", flipped=True),  # 1 - erf(x)
    "Expm1": _as_two("Exp", "Sub"),  # exp(x) - 1
    "Log1p": _as_two("Add", "Log"),  # log(x + 1)
}
WRITERS = {"tf_saved_model": tf_saved_model, "litert": litert, "onnx": onnx}
