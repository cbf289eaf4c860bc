"""PyTorch: eager steps, of blocks that torch.compile may compile; many devices by a process each,
as torchrun starts them.
"""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist
from keras import ops

from keras_uvit.backend import steps
from keras_uvit.backend.steps import guards_itself, is_ok
from keras_uvit.backend.steps import image_by_image as image_by_image
from keras_uvit.private import layers_in
from keras_uvit.types import Array, Tensor

# Asked once: the answer stays, and torch.compile cannot trace the question.
ACCELERATOR = torch.cuda.is_available() or torch.backends.mps.is_available()


def has_accelerator() -> bool:
    return ACCELERATOR


def fuses_attention() -> bool:
    # On a CPU only its forward pass is fast.
    return has_accelerator() or not torch.is_grad_enabled()


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # Keras' own allows PyTorch's flash kernel alone; PyTorch chooses cuDNN's where that is faster.
    query, key, value = (a.transpose(1, 2) for a in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.inference_mode()(function)


def holding(
    network: keras.Model, weights: Sequence[Tensor]
) -> contextlib.AbstractContextManager[Any]:
    # All are of one network. The scope is in the way of torch.compile, which would make a program
    # for each block.
    if weights[0] is network.variables[0].value:
        return contextlib.nullcontext()
    return steps.holding(network, weights)


def compile_blocks(network: keras.Model, wanted: bool) -> None:
    blocks = [b for b in layers_in(network) if getattr(b, "compiles_once", False)]
    if wanted and not blocks:
        warnings.warn(
            f"On PyTorch jit_compile=True does nothing for {type(network).__name__}, whose blocks "
            "differ in shape: each would be compiled on its own.",
            stacklevel=3,
        )
    for block in blocks:
        kind: Any = type(block)
        body = _compiled_body(kind) if wanted else kind._body
        block._body = body.__get__(block)


@functools.cache
def _compiled_body(kind):
    """One program for all blocks of a kind: their weights are its inputs."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    return torch.compile(kind._body)


def normal_per_image(seeds: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    def draw(seed):
        # The odd constant keeps (seed, step) and (seed + 1, step - 1) apart.
        generator = torch.Generator(seeds.device).manual_seed(seed * 1_000_003 + int(step))
        return torch.randn(shape, generator=generator, device=seeds.device)

    return torch.stack([draw(seed) for seed in seeds.tolist()])


def images_at_once(size: int) -> int:
    if has_accelerator():
        return 64
    # glibc maps what is larger than 32 MiB again each time, which takes a sixth of U-ViT-S/2's
    # sampling. A power of two divides what people ask for.
    return min(64, 2 ** int(math.log2(max(1, 2**25 // size))))


def constant(array: np.ndarray) -> Tensor:
    return ops.convert_to_tensor(array)  # once, and not in a call: torch.compile cannot trace it


def project(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, kernel.T, bias)


# What steps.py does, by torch.optim's own way to take all weights at once.


def norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm([t.float() for t in tensors])).norm()


def blend(
    averages: Sequence[keras.Variable], weights: Sequence[keras.Variable], decay: Tensor
) -> None:
    averages, weights = ([v.value.data for v in variables] for variables in (averages, weights))
    torch._foreach_lerp_(averages, weights, [1.0 - decay] * len(averages))


_KerasAdamW: Any = type(keras.optimizers.AdamW())  # the one for PyTorch


class AdamW(_KerasAdamW):
    def _parallel_update_step(self, grads, variables, learning_rate):
        if self.amsgrad:
            return super()._parallel_update_step(grads, variables, learning_rate)

        def values(slots):
            return [slots[self._get_variable_index(v)].value for v in variables]

        # One pass. Keras' own makes a dozen, and temporary copies of all weights: half of the time
        # of a step of 287M.
        torch._fused_adamw_(
            [v.value.data for v in variables],
            grads,
            values(self._momentums),
            values(self._velocities),
            [],
            [ops.cast(self.iterations + 1, "float32")] * len(variables),
            lr=ops.convert_to_tensor(learning_rate),
            beta1=self.beta_1,
            beta2=self.beta_2,
            weight_decay=0.0,  # was applied before
            eps=self.epsilon,
            amsgrad=False,
            maximize=False,
        )


# Training -----------------------------------------------------------------------------------------


def train_step(model: Any, data: Any) -> dict[str, Tensor]:
    batch, optimizer, weights = model.unpack(data), model.optimizer, model.trainable_variables
    model.zero_grad()
    loss = model.loss_of(batch)
    optimizer.scale_loss(loss).backward()
    with torch.no_grad():
        gradients = [weight.value.grad for weight in weights]
        loss = loss.detach()
        if replicas() > 1:
            _average([loss, *(g for g in gradients if g is not None)])
        norm = model.gradient_norm(gradients)
        ok = is_ok(loss, norm)
        before = optimizer.iterations + 0  # a copy: the variable changes in place
        if guards_itself(optimizer) or ok:
            optimizer.apply(gradients, weights)
        model.after_step(ok, before)
        return model.report(loss, norm)


@torch.no_grad()
def test_step(model: Any, data: Any) -> dict[str, Tensor]:
    batch = model.unpack(data)
    loss = model.test_loss_of(batch)
    if replicas() > 1:
        _average([loss])
    return model.test_report(batch, loss)


def _average(tensors):
    """In place, over all processes, in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= replicas()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


# Many devices -------------------------------------------------------------------------------------


def initialize(
    address: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    if address is not None:
        os.environ["MASTER_ADDR"], _, os.environ["MASTER_PORT"] = address.rpartition(":")
        os.environ["WORLD_SIZE"], os.environ["RANK"] = str(count), str(index)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def use_devices(devices: Sequence[str] | None = None) -> Any:
    if devices is not None:
        raise ValueError(
            "PyTorch uses one device a process: leave `devices` out and start the script with "
            "torchrun --nproc-per-node=N."
        )
    if not dist.is_initialized() and "RANK" in os.environ:
        initialize()
    return None


def replicas() -> int:
    return process()[1]


def drawn(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
    index, count = process()
    return draw((shape[0] * count, *shape[1:])).chunk(count)[index]


def process() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_shard() -> tuple[int, int]:
    return process()


def synchronize(model: keras.Model) -> None:
    """Process 0's weights, everywhere."""
    if replicas() > 1:
        with torch.no_grad():
            for variable in (*model.variables, *model.optimizer.variables):
                dist.broadcast(variable.value.data, 0)


def pieces(variable: keras.Variable) -> list[tuple[list[int], np.ndarray]]:
    if process()[0]:
        return []
    return [([0] * len(variable.shape), ops.convert_to_numpy(variable))]


def assign(variable: keras.Variable, read: Callable[..., Array]) -> None:
    variable.assign(read((slice(None),) * len(variable.shape)))


def barrier(name: str) -> None:
    if replicas() > 1:
        dist.barrier()


def any_process(flag: bool, step: int) -> bool:
    if replicas() == 1:
        return flag
    votes = torch.tensor(float(flag), device=ops.convert_to_tensor(0).device)
    dist.all_reduce(votes)
    return bool(votes)


def catches_sigterm() -> bool:
    return False


def from_first(number: int) -> int:
    if replicas() == 1:
        return number
    numbers = [number]
    dist.broadcast_object_list(numbers)
    return numbers[0]


def spread(array: Array, axis: int | None = 0, together: bool = True) -> Tensor:
    index, count = process()
    if together and axis == 0 and count > 1:
        array = np.array_split(array, count)[index]
    return ops.convert_to_tensor(array)


def whole(tensor: Tensor) -> np.ndarray:
    if replicas() == 1:
        return ops.convert_to_numpy(tensor)
    parts = [torch.empty_like(tensor) for _ in range(replicas())]
    dist.all_gather(parts, tensor.contiguous())
    return ops.convert_to_numpy(torch.cat(parts))


def alone(tensor: Tensor) -> Tensor:
    return tensor
