"""What a preset is: a network, how it was trained, how it is sampled."""

import dataclasses
from typing import Any

import keras

from keras_uvit.diffusion import FlowMap
from keras_uvit.networks import UViT
from keras_uvit.training import DiffusionModel

# As good as 50 guided steps where it was measured, on the shipped models: benchmarks/README.md.
FAST = dict(sampler="dpm_solver_pp_2m", num_steps=12, guidance_interval=(0.0, 0.8))
# Fields of a preset that are arguments of `DiffusionModel` of the same name.
OF_MODEL = (
    "schedule",
    "prediction",
    "time_scale",
    "time_sampling",
    "flow_map",
    "loss_weighting",
    "condition_dropout",
    "latent_scale",
    "ema_decay",
    "sampler",
    "num_steps",
    "guidance_scale",
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and how it was trained and sampled.

    `reported_*` is the paper's; `our_*` was measured by this project, or is None.
    """

    paper_name: str
    network: dict  # arguments of `architecture`
    schedule: object
    optimizer: dict  # arguments of training.adamw
    batch_size: int
    iterations: int
    sampler: str
    num_steps: int
    params: int
    gmacs: float  # multiply-accumulates of one forward pass, 1e9
    architecture: type = UViT
    prediction: str = "epsilon"
    time_scale: float | None = None
    flow_map: FlowMap | None = None
    time_sampling: str = "uniform"
    loss_weighting: str = "uniform"
    condition_dropout: float = 0.0
    guidance_scale: float = 1.0
    latent_scale: float | None = None
    autoencoder: str | None = None  # file name of the published autoencoder
    text_encoder: str | None = None  # preset of keras-hub, or folder in keras_uvit/weights
    ema_decay: float = 0.9999
    reported_cost: tuple = (None, None)  # millions of parameters, GMACs, as printed
    reported_fid: float | None = None
    our_fid: float | None = None
    weights: str | None = None  # file shipped in keras_uvit/weights
    context_encoder: str | None = None  # fingerprint of the text encoder that they have learned

    def new_network(self, **changes: Any) -> Any:
        """The network of the preset, with other arguments where there are `changes`."""
        return self.architecture(**{**self.network, **changes})

    def build(
        self,
        network: dict[str, Any] | keras.Model | None = None,
        optimizer: dict[str, Any] | None = None,
        **changes: Any,
    ) -> DiffusionModel:
        """A `DiffusionModel` of the preset, with fresh weights, not compiled.

        Args:
            network: dict of arguments of the network to change, or a network to take instead.
            optimizer: dict of arguments of `training.adamw` to change.
            **changes: arguments of `DiffusionModel` to change.
        """
        is_made = isinstance(network, keras.Model)
        net: Any = network if is_made else self.new_network(**network or {})
        own = {key: getattr(self, key) for key in OF_MODEL}
        if net.null_label is None and net.context_shape is None:
            own["condition_dropout"] = 0.0  # there is no "none" to learn
        optimizer = {**self.optimizer, **(optimizer or {})}
        return DiffusionModel(net, optimizer=optimizer, **{**own, **changes})
