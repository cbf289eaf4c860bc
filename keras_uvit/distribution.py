"""Several devices and several processes: one line before the model is made.

    distribution.initialize()           where several processes make one job
    distribution.data_parallel()        each device has the model, and a part of each batch
    distribution.model_parallel(...)    each device has a part of the weights too (JAX)

Batch sizes are those of all devices together. Noise is drawn for the global batch, so a run has the
same numbers, up to rounding, on any number of devices, and may be resumed on another.

The layouts of `model_parallel`:

| layout | mesh | what each device holds |
|---|---|---|
| "fsdp" | ("batch",) | a part of the batch and of every kernel, which is gathered layer by layer |
| "tensor" | ("batch", "model") | a part of the batch, of the heads and of the MLP's hidden units |

"fsdp" is stage 3 of Rajbhandari et al. 2020, arXiv 1910.02054; "tensor" is Shoeybi et al. 2019,
arXiv 1909.08053, Section 3. The moving average and the optimizer's slots are split like their
weight.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_uvit import backend
from keras_uvit.networks import unet, uvit
from keras_uvit.private import layers_in

DEVICES = ("one", "all", "job")
BATCH, MODEL = "batch", "model"
LAYOUTS = {"fsdp": (BATCH,), "tensor": (BATCH, MODEL)}  # axes of the mesh; the last is the split
# For every weight of a network: the dimension that "fsdp" splits and the one that "tensor" splits.
RULES = {**uvit.SPLITS, **unet.SPLITS}


def initialize(
    address: str | None = None, num_processes: int | None = None, process_index: int | None = None
) -> None:
    """Joins this process to the others of its job. Before any model or array is made.

    On a TPU pod and under SLURM, JAX finds the others by itself, and under torchrun PyTorch does:
    then it takes no arguments.

    Args:
        address: "HOST:PORT" of process 0.
        num_processes: int.
        process_index: int, from 0.

    Raises:
        NotImplementedError: on TensorFlow.
    """
    backend.initialize(address, num_processes, process_index)


def data_parallel(devices: Sequence[str] | None = None) -> Any:
    """Models made from now on are trained on all devices: each sees its part of every batch.

    JAX: `keras.distribution.DataParallel` over the devices of all processes. TensorFlow:
    `MirroredStrategy` over the devices of one machine. PyTorch: one device a process, started by
    `torchrun --nproc-per-node=N script.py`; gradients are averaged.

    Args:
        devices: list of names, such as `keras.distribution.list_devices()` gives on JAX and
            "GPU:0" on TensorFlow; all of them by default.

    Returns:
        The backend's own object, or None.
    """
    return backend.use_devices(devices)


def process() -> tuple[int, int]:
    """(index, count) of this process; index 0 is the one that prints and draws."""
    return backend.process()


def choose(devices: str = "one", layout: str = "data", model_devices: int | None = None) -> None:
    """What `--devices` and `--layout` of the examples and of `keras-uvit train` mean.

    Args:
        devices: "one"; "all" that this process sees; "job", those of all processes that were
            started together.
        layout: "data" (`data_parallel`), "fsdp" or "tensor" (`model_parallel`).
        model_devices: of `model_parallel`.
    """
    if devices not in DEVICES:
        raise ValueError(f"devices must be one of {DEVICES}. Received: {devices!r}.")
    if devices == "one":
        if layout != "data":
            raise ValueError(f'layout={layout!r} needs several devices: "all" or "job".')
        return
    if devices == "job":
        initialize()
    if layout == "data":
        data_parallel()
    else:
        model_parallel(layout, model_devices)


# Layouts ------------------------------------------------------------------------------------------


def layout_map(
    mesh: keras.distribution.DeviceMesh, layout: str = "fsdp"
) -> keras.distribution.LayoutMap:
    """The rules as Keras takes them; of `network` and `ema_network`, whose paths are the same.

    Args:
        mesh: `keras.distribution.DeviceMesh` with the layout's axes.
        layout: "fsdp" or "tensor".

    Returns:
        `keras.distribution.LayoutMap`.

    Raises:
        ValueError: if there is no such layout, or the mesh has other axes.
    """
    _check_layout(layout)
    if tuple(mesh.axis_names) != LAYOUTS[layout]:
        raise ValueError(
            f"layout={layout!r} needs a mesh with the axes {LAYOUTS[layout]}. "
            f"Received: {tuple(mesh.axis_names)}."
        )
    rules = keras.distribution.LayoutMap(mesh)
    for path, dimensions in RULES.items():
        dimension = dimensions[list(LAYOUTS).index(layout)]
        split = () if dimension is None else (None,) * dimension + (LAYOUTS[layout][-1],)
        # Anchored: Keras before 3.14 searches for a rule anywhere in a path.
        rules[f"^{path}$"] = keras.distribution.TensorLayout(split)
    return rules


def model_parallel(
    layout: str = "fsdp", model_devices: int | None = None, devices: Sequence[str] | None = None
) -> keras.distribution.ModelParallel:
    """Splits the weights of models made from now on over devices. JAX only.

    Args:
        layout: "fsdp" or "tensor"; benchmarks/README.md says when which. Where "fsdp" cannot divide
            a weight evenly, as U-ViT-H's query, key and value kernel over 256 devices, the weight
            stays whole on every device.
        model_devices: int, how many devices share one copy of the weights: only with "tensor",
            which needs it. Best the devices of one machine; divides the number of heads.
        devices: list of str such as "gpu:0"; `None` for all.

    Returns:
        `keras.distribution.ModelParallel`, set for all models made after it. Each process feeds
        its own part of the global batch.

    Raises:
        ValueError: if there is no such layout, or `model_devices` does not fit.
        RuntimeError: on another backend than JAX.

    Example:
        >>> from keras_uvit.distribution import model_parallel
        >>> model_parallel("fsdp").device_mesh.axis_names  # doctest: +SKIP
        ['batch']
    """
    _check_layout(layout)
    if backend.NAME != "jax":
        raise RuntimeError(
            "Splitting weights over devices needs the JAX backend. This is "
            f"{backend.NAME}, where each device holds all weights."
        )
    devices = keras.distribution.list_devices() if devices is None else list(devices)
    shape = _mesh_shape(layout, model_devices, len(devices))
    mesh = keras.distribution.DeviceMesh(shape, list(LAYOUTS[layout]), devices)
    distribution = _Parallel(layout_map=layout_map(mesh, layout), batch_dim_name=BATCH)
    distribution.auto_shard_dataset = False  # Keras 3.10 has no such argument
    keras.distribution.set_distribution(distribution)
    return distribution


def divides_among_processes() -> bool:
    """Whether no process has all weights of a model that is made now."""
    return _divides() and process()[1] > 1


def check_whole() -> None:
    """Raises where no process has all weights, so that none can write them into a file."""
    if divides_among_processes():
        raise ValueError(
            "Each process has a part of the weights: `training.Checkpoint` saves all of them, "
            "and `training.load_checkpoint` makes the whole model of it, in one process."
        )


def _divides():
    return isinstance(keras.distribution.distribution(), keras.distribution.ModelParallel)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, variables are made on one device, and without the other processes."""
    present, seeds = keras.distribution.distribution(), random.getstate()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(present)
        random.setstate(seeds)  # Keras' seeds of new layers: the processes stay in step


def check_layouts(network: keras.Model) -> None:
    """Raises unless the current distribution knows how to split `network`; see `model_parallel`.

    Keras leaves a weight whole that no rule names, so that a renamed layer fills every device's
    memory without a word. Does nothing without a `keras.distribution.ModelParallel`.

    Raises:
        ValueError: if a weight has no rule or several, or if a dimension or the number of heads
            cannot be divided.
    """
    if not _divides():
        return
    distribution = keras.distribution.distribution()
    for weight in network.weights:
        rule = distribution.get_tensor_layout(weight.path)  # raises if there are several
        if rule is None and len(weight.shape) > 1:
            raise ValueError(
                f"No rule says how to split the weight {weight.path!r} of shape "
                f"{tuple(weight.shape)}: add a row to SPLITS of its network in keras_uvit.networks."
            )
        distribution.get_variable_layout(weight)  # raises if it cannot be divided
    # Of all layers of attention the greatest common divisor; 0, which all divide, where none is.
    heads = math.gcd(*(getattr(part, "num_heads", 0) for part in layers_in(network)))
    count = _sizes(distribution.device_mesh).get(MODEL, 1)
    if heads % count:
        raise ValueError(
            f"num_heads={heads} cannot be divided among model_devices={count}. Choose "
            f"model_devices from {_divisors(heads)}."
        )


class _Parallel(keras.distribution.ModelParallel):
    """Decides by the shape too, where a LayoutMap knows only the path; JAX would raise later."""

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        layout, shape = super().get_variable_layout(variable), tuple(variable.shape)
        if not isinstance(layout, keras.distribution.TensorLayout):
            return layout  # of a variable that is placed, as Keras before 3.15 answers: JAX's own
        sizes = _sizes(self.device_mesh)
        for size, axis in zip(shape, layout.axes):
            if axis is None or size % sizes[axis] == 0:
                continue
            if axis == BATCH:  # "fsdp": no reason to stop, it only costs memory
                return keras.distribution.TensorLayout((None,) * len(shape), self.device_mesh)
            raise ValueError(
                f"The weight {variable.path!r} of shape {shape} has a dimension of {size}, which "
                f"cannot be divided among model_devices={sizes[axis]}. Choose model_devices from "
                f"{_divisors(size)}."
            )
        return layout


def _check_layout(layout):
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {list(LAYOUTS)}. Received: {layout!r}.")


def _mesh_shape(layout, model_devices, count):
    if layout == "fsdp":
        if model_devices is not None:
            raise ValueError(
                'model_devices is for layout="tensor": "fsdp" splits weights over all devices. '
                f"Received: model_devices={model_devices}."
            )
        return (count,)
    fitting = _divisors(count)
    if model_devices not in fitting:
        nearest = min(fitting, key=lambda n: abs(n - (model_devices or min(8, count))))
        raise ValueError(
            f'layout="tensor" needs model_devices that divides the {count} devices: one of '
            f"{fitting}. Received: {model_devices}; the nearest is {nearest}."
        )
    return (count // model_devices, model_devices)


def _divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def _sizes(mesh):
    return dict(zip(mesh.axis_names, mesh.shape))
