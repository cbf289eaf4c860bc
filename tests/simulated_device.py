"""A device for PyTorch that computes on the CPU and refuses what a GPU refuses.

    KERAS_BACKEND=torch python tests/simulated_device.py     (trains and samples on it)

A tensor on it is a tensor on the CPU in a wrapper whose `device` says otherwise: NumPy cannot read
it, and an operation that finds another tensor of the CPU beside it fails, but for a number in a
tensor without axes. Random numbers are those of the CPU.
"""

import json
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
aten = torch.ops.aten
# What moves numbers from one device to another.
MOVES = (aten._to_copy, aten.copy_, aten._copy_from, aten._local_scalar_dense)


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()


class Factories(TorchDispatchMode):
    """Sees calls without such a tensor too: those that make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def computed(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    wrapped = [t for t in tensors if isinstance(t, OnDevice)]
    strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
    if wrapped and strangers and func.overloadpacket not in MOVES:
        raise RuntimeError(f"{func}: a tensor {tuple(strangers[0].shape)} is on the CPU.")
    stays = bool(wrapped)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    of = {id(t.inner): t for t in wrapped}  # what is changed in place stays the same tensor
    with _disable_current_modes():
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))

    def put(t):
        if not stays or not isinstance(t, torch.Tensor):
            return t
        return of[id(t)] if id(t) in of else OnDevice(t)

    return tree_map(put, out)


def bare(t):
    return t.inner if isinstance(t, OnDevice) else t


def start():
    """From now on Keras makes its tensors there; before Keras is imported."""
    # As where they are not installed: Keras imports them for what is not tried here.
    sys.modules |= dict.fromkeys(["tensorflow", "sklearn"])
    os.environ["KERAS_TORCH_DEVICE"] = NAME
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for func in (aten.empty_strided.default, aten.empty.memory_format):

        def empty(*args, func=func, **kwargs):
            return computed(func, args, {**kwargs, "device": NAME})

        library.impl(func.__name__.removesuffix(".default"), empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    torch.Generator = Generator
    torch.inference_mode = torch.no_grad  # where the wrapper cannot be convolved
    Factories().__enter__()
    return library  # which ends what it has registered


def copy_from(source, target, non_blocking=False):
    with _disable_current_modes():
        bare(target).copy_(bare(source))
    return target


def is_refused(function):
    try:
        function()
    except (RuntimeError, TypeError):
        return True
    return False


def work():
    """Losses and images of small models, as lists: train, evaluate, sample with guidance."""
    import keras
    import numpy as np

    from keras_uvit import DiffusionModel, UNet, UViT

    rng = np.random.default_rng(0)
    data = {"image": rng.uniform(-1, 1, (4, 4, 4, 1)).astype("float32"), "label": np.arange(4) % 3}
    shape = dict(image_shape=(4, 4, 1), num_classes=3)
    uvit = dict(shape, patch_size=2, hidden_dim=16, num_heads=2, num_layers=3)
    later = dict(position="rotary", qk_norm=True, dtype="mixed_bfloat16")
    unet = dict(shape, base_dim=32, head_dim=32, multipliers=(1,), attention_levels=(0,))
    results = []
    for make, arguments, sampler in (
        (UViT, uvit, "ddpm"),
        (UViT, uvit | later, "dpm_solver_pp_2m"),
        (UNet, unet, "ddpm"),
    ):
        keras.utils.set_random_seed(0)
        model = DiffusionModel(make(**arguments), prediction="v")
        model.compile(optimizer=keras.optimizers.AdamW(1e-3))
        history = model.fit(data, batch_size=2, validation_data=data, verbose=0).history
        results += history["loss"] + history["val_loss"]
        asked = dict(labels=[0, 2], num_steps=2, guidance_scale=2.0, verbose=0)
        results += model.generate(**asked, sampler=sampler).ravel().tolist()
    return results


if __name__ == "__main__":
    import numpy as np

    library = start()
    there, here = torch.ones(2, device=NAME), torch.ones(2)
    ways = {
        "NumPy reads it": lambda: there.numpy(),
        "NumPy multiplies it": lambda: there * np.ones(2),
        "a tensor of the CPU": lambda: there * here,
    }
    refused = [name for name, way in ways.items() if is_refused(way)]
    print(json.dumps({"refused": refused, "ways": list(ways), "results": work()}))
