"""The published program's recorded answers (golden/README.md), and ours to the same questions."""

import json
from pathlib import Path

import numpy as np
from keras import ops

from keras_uvit import DiffusionModel, UViT, convert
from keras_uvit.diffusion.schedules import VPDiscrete

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    name: case
    for name, case in json.loads((GOLDEN / "cases.json").read_text()).items()
    if name.startswith("uvit")
}
TRAINED = dict(
    image_shape=(8, 8, 3), patch_size=2, hidden_dim=32, num_layers=3, num_heads=2,
    num_classes=6, null_label=False,
)  # fmt: skip


def network_of(name, **changes):
    """The network of a golden case, from its constructor arguments in the published names."""
    case = CASES[name]
    text = "clip_dim" in case
    arguments = {
        "image_shape": (case["img_size"], case["img_size"], case.get("in_chans", 3)),
        "patch_size": case["patch_size"],
        "hidden_dim": case["embed_dim"],
        "num_layers": case["depth"] + 1,
        "num_heads": case["num_heads"],
        "num_classes": case.get("num_classes"),
        "null_label": False,
        "context_shape": (case["num_clip_token"], case["clip_dim"]) if text else None,
        "output_conv": case.get("conv", True),
    }
    return UViT(**{**arguments, **changes})


def answer_of(name, call):
    """What `call` makes of the recorded inputs, channels first, and the recorded output."""
    data = np.load(GOLDEN / f"{name}.npz")
    inputs = {"image": data["x_nchw"].transpose(0, 2, 3, 1), "timestep": data["t"]}
    inputs |= {key: data[key] for key in ("label", "context") if key in data}
    output = ops.convert_to_numpy(call(inputs))
    return output.transpose(0, 3, 1, 2), data["out_nchw"]


class Replay(DiffusionModel):
    """Draws what was recorded instead of random numbers; everything else is the real step."""

    def draw(self, x0, objective):
        t = ops.take(ops.convert_to_tensor(self.recorded["n"] / 1000.0, "float32"), self.step, 0)
        noise = ops.take(ops.convert_to_tensor(self.recorded["noise"]), self.step, axis=0)
        return t, noise, ops.zeros_like(t, dtype="bool")


def train(**changes):
    """Eight optimizer steps from the recorded weights and draws.

    Returns:
        The model, its loss before each step, and the recorded losses.
    """
    data = np.load(GOLDEN / "training.npz")
    recipe = dict(learning_rate=2e-3, beta_1=0.99, beta_2=0.99, weight_decay=0.03, warmup_steps=4)
    model = Replay(
        UViT(**TRAINED, **changes), VPDiscrete(), latent_scale=1.0, ema_decay=0.9,
        ema_warmup=False, optimizer=recipe,
    )  # fmt: skip
    convert.load_torch_weights(model, GOLDEN / "training_start.pth")
    images = data["x0_nchw"].transpose(0, 1, 3, 4, 2)
    model.recorded = {"n": data["n"], "noise": data["eps_nchw"].transpose(0, 1, 3, 4, 2)}
    model.compile()
    batches = ({"latent": x, "label": y} for x, y in zip(images, data["label"]))
    history = model.fit(batches, steps_per_epoch=1, epochs=8, verbose=0)
    return model, np.array(history.history["loss"]), data["loss"]


def trained_weights(network, kind):
    """All weights in a row: a network's, and the recorded ones; `kind` is "end" or "ema"."""
    expected = UViT(**TRAINED)
    convert.load_torch_weights(expected, GOLDEN / f"training_{kind}.pth")
    return [np.concatenate([w.ravel() for w in n.get_weights()]) for n in (network, expected)]
