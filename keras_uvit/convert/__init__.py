"""Foreign checkpoints to Keras weights; the only place that knows foreign names and layouts."""

from pathlib import Path

from keras_uvit.convert import uvit
from keras_uvit.convert.files import read_tensors


def load_torch_weights(network, path):
    """Loads a published U-ViT checkpoint (`.pth`, or `.safetensors` with the same names).

    Strict: every array of the file is used once and every weight of the network is set, or nothing
    is changed. Pickled code is never run.

    Args:
        network: `UViT` in the published form (the defaults; `output_conv`, `qkv_bias`, `time_mlp`
            and conditions as the checkpoint has them), or a `DiffusionModel`, whose moving average
            is set too.
        path: the file.

    Raises:
        FileNotFoundError, ImportError: see `read_tensors`.
        ValueError: if the file is damaged or foreign, or names and shapes do not match; the
            message lists missing, extra and wrong-shaped keys.
    """
    model = network if hasattr(network, "ema_network") else None
    target = model.network if model is not None else network
    tensors = read_tensors(path)
    entries = list(uvit.entries(target))
    names = {name for name, _, _ in entries}
    problems = [f"missing: {sorted(names - set(tensors))}"] if names - set(tensors) else []
    if set(tensors) - names:
        problems.append(f"extra: {sorted(set(tensors) - names)}")
    new = []
    for name, variable, turn in entries:
        if name not in tensors:
            continue
        try:
            value = turn(tensors[name])
        except ValueError:  # another number of axes
            value = tensors[name]
        if tuple(value.shape) != tuple(variable.shape):
            problems.append(
                f"wrong shape: {name} is {tensors[name].shape}, which becomes "
                f"{tuple(value.shape)}; the network has {tuple(variable.shape)}"
                + _label_hint(name, value, variable)
            )
        new.append((variable, value))
    if problems:
        raise ValueError(
            f"{Path(path).name} does not fit this network. " + "; ".join(problems) + "."
        )
    for variable, value in new:
        variable.assign(value)
    if model is not None:
        model.copy_weights_to_ema()


def _label_hint(name, value, variable):
    if name != "label_emb.weight" or abs(len(value) - variable.shape[0]) != 1:
        return ""
    return " (published tables count the 'no label' row: check num_classes and null_label)"
