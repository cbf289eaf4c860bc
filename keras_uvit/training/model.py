"""A network, a noise schedule and a loss: a Keras model to `fit` and `generate` with."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_uvit import backend, checks, distribution, sampling
from keras_uvit.diffusion.flow_map import FlowMap
from keras_uvit.diffusion.loop import Steps
from keras_uvit.diffusion.objective import Objective
from keras_uvit.diffusion.schedules import VPLinear
from keras_uvit.encoders import compatibility, holder
from keras_uvit.inference import own_defaults
from keras_uvit.networks import quantizing
from keras_uvit.networks.network import check_copy, copy_of
from keras_uvit.pixels import PerChannel, listed
from keras_uvit.private import loss_mean
from keras_uvit.sampling.guidance import Guidance
from keras_uvit.training import arguments, batches, draws, fit, frozen, optimizers
from keras_uvit.training.batches import Batch
from keras_uvit.training.checkpoints import atomically
from keras_uvit.types import Array, Config, PathLike, Tensor

TRAIN, TEST, FLOW_MAP = 0, 1, 2  # streams of randomness
# Arguments that the config keeps as they are.
PLAIN = (
    "condition_dropout",
    "latent_scale",
    "latent_shift",
    "latent_encoder",
    "context_encoder",
    "ema_decay",
    "ema_warmup",
    "sampler",
    "num_steps",
    "guidance_scale",
    "max_skipped_steps",
    "planned_steps",
    "seed",
    "name",
)
OF_OBJECTIVE = ("prediction", "time_scale", "time_sampling", "loss_weighting")


@keras.saving.register_keras_serializable("keras_uvit")
@checks.refuses(arguments.METHODS)
class DiffusionModel(keras.Model):
    """Trains a network to denoise, and samples from it.

    Loss of one image: draw t, noise; x_t = alpha(t) x0 + sigma(t) noise; the mean over pixels of
    (network(x_t, time_scale t, condition) - target)^2, target by `prediction` (Ho et al. 2020,
    arXiv 2006.11239, Eq. 14, for "epsilon"), times a weight by `loss_weighting`. With probability
    `condition_dropout` the condition is replaced by "none", which classifier-free guidance needs
    (Ho and Salimans 2022, arXiv 2207.12598).

    Two sets of weights: `network`, which the optimizer moves, and `ema_network`, a moving average
    of it, which `generate` and `evaluate` use. The average moves on optimizer steps only.

    Randomness is a function of (seed, step): a model that is saved and loaded continues exactly as
    if it had not been stopped.

    Args:
        network: `UViT`, `UNet`, or any Keras model inside `networks.OwnNetwork`.
        schedule: see `diffusion.schedules`; default `VPLinear()`.
        prediction: "epsilon", "x0", "v" or "velocity": what the network predicts.
        time_scale: float. The network gets `time_scale * t`; `None` is the published value, 1000
            for `VPDiscrete` and 999 for the others.
        time_sampling: "uniform", "logit_normal" or "cosmap": how often training draws each t.
        loss_weighting: "uniform" or "min_snr": how much an error at t counts in training; for both
            see `diffusion.weighting`.
        flow_map: `diffusion.FlowMap`, for images in one to four steps; `None` trains each time by
            itself. It needs a network made with `takes_span=True`, `LinearPath()` and "velocity".
        condition_dropout: float in [0, 1]; `None` is 0.1 where the network knows "none", else 0.
        latent_scale: float, what latents are multiplied by (0.18215 for Stable Diffusion), or one
            for each channel; `None` for models of pixels.
        latent_shift: float, what is subtracted before, or one for each channel.
        latent_encoder: str, fingerprint of the encoder whose latents the model works on. `None`:
            that of the first cache it is fitted on, or of the `autoencoder` set, whichever is
            first. From then on, latents of a different encoder raise an error.
        context_encoder: str, the same of the text encoder whose contexts the model reads; "arrays"
            where it has learned contexts of unknown origin.
        ema_decay: float in [0, 1).
        ema_warmup: bool. Decay min(ema_decay, (1 + k) / (10 + k)) at optimizer step k: the
            published constant 0.9999 would leave 82 % of the random start in the average after
            2,000 steps.
        optimizer: dict of arguments of `training.adamw` that `compile()` uses. `None` chooses a
            learning rate for the network's width, which rises at the run's begin and falls to its
            end: `training.optimizers.default_arguments`.
        sampler, num_steps, guidance_scale: defaults of `generate`. For `sampler`, `None` is
            "flow_map" with a flow map, and else "dpm_solver_pp_2m".
        max_skipped_steps: int. `fit` stops after so many non-finite steps in a row.
        planned_steps: int, optimizer steps that `fit` makes where it is not told `epochs`; `None`
            is one epoch.
        seed: int >= 0.

    Call arguments: those of the network.

    Example:
        >>> from keras_uvit import UViT
        >>> net = UViT((8, 8, 1), hidden_dim=16, num_layers=3, num_heads=2, num_classes=10)
        >>> model = DiffusionModel(net)
        >>> model.compile()
    """

    def __init__(
        self,
        network: Any,
        schedule: Any = None,
        prediction: str = "epsilon",
        time_scale: float | None = None,
        time_sampling: str = "uniform",
        loss_weighting: str = "uniform",
        flow_map: FlowMap | None = None,
        condition_dropout: float | None = None,
        latent_scale: PerChannel | None = None,
        latent_shift: PerChannel = 0.0,
        latent_encoder: str | None = None,
        context_encoder: str | None = None,
        ema_decay: float = 0.9999,
        ema_warmup: bool = True,
        optimizer: dict[str, Any] | None = None,
        sampler: str | None = None,
        num_steps: int = 25,
        guidance_scale: float = 1.0,
        max_skipped_steps: int = 20,
        planned_steps: int | None = None,
        seed: int = 0,
        name: str = "diffusion_model",
    ):
        arguments.check_network(network)
        distribution.check_layouts(network)
        # autocast=False: mixed precision must not round the timestep.
        super().__init__(name=name, dtype=network.dtype_policy, autocast=False)
        self.network = network
        self.ema_network = copy_of(network, f"ema_{network.name}")
        self.encoders = holder.Encoders()
        self.objective = Objective(
            VPLinear() if schedule is None else schedule,
            prediction,
            time_scale,
            time_sampling,
            loss_weighting,
        )
        self.flow_map = flow_map
        has_null = network.null_label is not None or network.context_shape is not None
        if condition_dropout is None:
            condition_dropout = 0.1 if has_null else 0.0
        self.condition_dropout = condition_dropout
        self.latent_scale, self.latent_shift = latent_scale, latent_shift
        self.latent_encoder, self.context_encoder = latent_encoder, context_encoder
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self.optimizer_config = dict(optimizer or optimizers.default_arguments(network))
        self.sampler = sampler or ("dpm_solver_pp_2m" if flow_map is None else "flow_map")
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.max_skipped_steps, self.planned_steps = max_skipped_steps, planned_steps
        self.seed = seed
        arguments.check_model(self, has_null)

        self.ema_network.trainable = False
        self.copy_weights_to_ema()
        counter = dict(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.step = self.add_weight(name="step", **counter)  # batches, not optimizer steps
        self.ema_step = self.add_weight(name="ema_step", **counter)  # optimizer steps
        self.test_step_count = self.add_weight(name="test_step_count", **counter)
        self.skipped_steps = self.add_weight(name="skipped_steps", **counter)
        self.skipped_in_row = self.add_weight(name="skipped_in_row", **counter)
        self.global_batch = self.add_weight(name="global_batch", **counter)  # 0: not known
        if network.context_shape is not None:
            null = dict(initializer="zeros", trainable=False, name="null_context")
            self.null_context = self.add_weight(shape=network.context_shape, **null)
        self.random = keras.random.SeedGenerator(0)  # `self.seed` may be larger than Keras takes
        draws.begin(self.random, self.seed)
        self.norm_tracker = keras.metrics.Mean(name="grad_norm", dtype="float32")
        self.sampling_loops: dict[tuple, Any] = {}  # compiled, by `sampling.generate`
        self.warned_untrained = False
        self.built = True
        del self.quantize  # Keras' wrapper of the method below: its own checks would come first

    def set_encoders(self, *, autoencoder: Any = ..., text_encoder: Any = ...) -> None:
        """Sets the frozen parts of the model, which are no part of its file.

        An argument that is left out keeps what the model has; None removes it. If one of them does
        not fit, neither is set.

        Args:
            autoencoder: `encoders.AutoencoderKL`, or what has its `scale`, `fingerprint` and
                `decode`; `generate` turns latents into pixels with it.
            text_encoder: `encoders.CLIPText`, or what has its methods; `generate` turns prompts
                into contexts with it.

        Raises:
            TypeError: for something that is not such an encoder.
            ValueError: if the model has learned the latents or contexts of a different encoder.
        """
        parts = {"autoencoder": autoencoder, "text_encoder": text_encoder}
        given = {name: part for name, part in parts.items() if part is not ...}
        autoencoder, text_encoder = (given.get(name) for name in parts)
        if autoencoder is not None:
            compatibility.check_autoencoder(autoencoder)
            compatibility.check_latents(self, autoencoder, "The autoencoder")
        if text_encoder is not None:
            compatibility.check_text_encoder(text_encoder)
            compatibility.check_contexts(self, text_encoder, "The text encoder")
        self.encoders = dataclasses.replace(self.encoders, **given)
        if autoencoder is not None:
            compatibility.adopt_latents(self, autoencoder)
        if text_encoder is not None:
            compatibility.adopt_contexts(self, text_encoder)

    def freeze(self, *patterns: str) -> None:
        """Keeps layers of the network as they are; call it before `compile`.

        `model.network.trainable = True` undoes it. Files and checkpoints keep what is frozen.

        Args:
            *patterns: names of layers, as `model.network.summary()` shows them; `*` stands for any
                characters, as in `model.freeze("patch_embed", "in_block_*")`.

        Raises:
            ValueError: for a pattern that no layer matches. Then nothing is changed.
        """
        frozen.freeze_matching(self.network, patterns)

    def get_config(self) -> Config:
        serialize = keras.saving.serialize_keras_object
        return {
            "network": serialize(self.network),
            "schedule": serialize(self.objective.schedule),
            "flow_map": serialize(self.flow_map),
            "optimizer": dict(self.optimizer_config),
            **{key: getattr(self.objective, key) for key in OF_OBJECTIVE},
            **{key: listed(getattr(self, key)) for key in PLAIN},
            "frozen": frozen.frozen(self.network),
        }

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict | None = None) -> "DiffusionModel":
        parts: Config = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects)
            for key in ("network", "schedule", "flow_map")
            if key in config  # older files have no flow map
        }
        arguments = {**config, **parts}
        paths = arguments.pop("frozen", None)  # older files have none
        model = cls(**arguments)
        if paths is not None:
            frozen.freeze(model.network, paths)  # now: the optimizer is built for what is trained
        holder.warn_of_loading(model)
        return model

    def build(self, input_shape: Any = None) -> None:
        """Nothing to do: the networks are built when they are made."""

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing to do either; Keras on TensorFlow would begin an epoch of the data for it."""

    def call(self, inputs: dict[str, Tensor], training: bool = False) -> Tensor:
        return self.network(inputs, training=training)

    def compute_output_shape(self, input_shape: Any) -> tuple:
        return self.network.compute_output_shape(input_shape)

    @property
    def trainable(self) -> bool:
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Model.trainable.fset(self, value)
        self.ema_network.trainable = False  # Keras would set it for all layers

    def check_weights(self) -> None:
        """Raises unless each weight of the network has its place in the moving average.

        And unless the encoders are where Keras does not see them: as attributes it would train and
        save them with the model.
        """
        for name in vars(self.encoders):
            if hasattr(self, name):
                raise ValueError(
                    f"`model.{name} = ...` makes Keras train and save the encoder with the model. "
                    "Make or load the model again, and call "
                    f"`model.set_encoders({name}=...)` instead."
                )
        check_copy(self.network, self.ema_network)

    def copy_weights_to_ema(self) -> None:
        """Starts the moving average at the network's weights."""
        self.check_weights()
        for average, weight in zip(self.ema_network.weights, self.network.weights):
            average.assign(ops.copy(weight.value))  # a copy: JAX must not donate one buffer twice

    def quantize(self, mode: str = "int8") -> None:
        """Makes the kernels of both networks 8-bit integers, in place: for sampling, not training.

        The network and its moving average each keep their own numbers, a quarter of the bytes.
        The optimizer goes, and `fit`, `evaluate` and `compile` are refused from now on: keep the
        file of the model before. `save` and `keras.saving.load_model` work as before.

        Args:
            mode: "int8"; Keras' other modes are refused.

        Raises:
            ValueError: for another mode, or a network that cannot be quantized; nothing is changed.
        """
        self.check_weights()
        quantizing.check_mode(self.network, mode)
        for network in (self.network, self.ema_network):
            network.quantize(mode)
        no_optimizer: Any = None
        self.optimizer, self.compiled = no_optimizer, False
        self.sampling_loops.clear()

    # Training -------------------------------------------------------------------------------------

    def compile(
        self, optimizer: Any = None, jit_compile: bool | None = None, **kwargs: Any
    ) -> None:
        """As `keras.Model.compile`; without arguments the preset's AdamW, and XLA where there is.

        Args:
            optimizer: any Keras optimizer; `None` is `training.adamw(**model.optimizer_config)`.
            jit_compile: bool. `True` compiles the whole step by XLA on JAX and TensorFlow, and on
                PyTorch the blocks of a U-ViT, each kind once, by torch.compile. `None` is `True`
                where there is XLA; a saved model that was left so is what suits the backend that
                loads it.
            **kwargs: `steps_per_execution`, `run_eagerly`, `auto_scale_loss`. The loss is the
                model's own.
        """
        kwargs = arguments.checked("compile", kwargs)
        quantizing.check_whole(self.network, "Training")
        self.check_weights()
        backend.keep_memory()
        self._jit_compile_chosen = jit_compile
        jit_compile = backend.HAS_XLA if jit_compile is None else jit_compile
        with own_defaults(self.dtype_policy):  # float32 for the loss and the learning rate
            optimizer = optimizer or optimizers.adamw(**self.optimizer_config)
            optimizers.check_average(optimizer)
            super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)
        self.ema_network.trainable = False  # also where `trainable` was set on the whole model
        self.optimizer.build(self.trainable_variables)
        for network in (self.network, self.ema_network):
            backend.compile_blocks(network, self.jit_compile)

    def _should_torch_compile(self):
        """Keras would compile the whole step, a minute for a small network, beside the blocks."""
        return False

    def get_compile_config(self) -> Config:
        config = super().get_compile_config()
        if not config:
            return config
        undecayed = optimizers.without_decay(self)
        return {**config, "jit_compile": self._jit_compile_chosen, "without_decay": undecayed}

    def compile_from_config(self, config: Config) -> None:
        arguments = keras.saving.deserialize_keras_object(config)
        optimizers.exclude(self, arguments["optimizer"], arguments.pop("without_decay", ()))
        self.compile(**arguments)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int | None = None,
        verbose: str | int = "auto",
        callbacks: Any = None,
        resume: str | bool = "auto",
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """As `keras.Model.fit`, on dicts of arrays or any source of them; see `training.batches`.

        With a `training.Checkpoint` among the callbacks the run resumes from its newest checkpoint,
        at the same place in the data, up to `epochs` in all.

        Args:
            epochs: int, in all; `None` is what `planned_steps` take, or 1.
            resume: "auto" resumes if there is a checkpoint, `True` raises if there is none,
                `False` raises if there is one.
            verbose: "auto" shows loss, learning rate, gradient norm, images per second and the time
                left in a line that moves in a terminal or a notebook, and is written once per epoch
                elsewhere; 0, 1 and 2 are those of Keras.
            **kwargs: those of Keras, but `sample_weight` and `class_weight`, as the loss weighs all
                images equally; `batch_size` is that of all devices together.

        Raises:
            ValueError, TypeError: if the data do not fit the model, before anything is compiled.
            FloatingPointError: after `max_skipped_steps` non-finite steps in a row.
        """
        options = dict(kwargs, batch_size=batch_size, epochs=epochs, verbose=verbose)
        options = arguments.checked("fit", options)
        return fit.fit(self, super().fit, x, y, callbacks, resume, options)

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        """As `keras.Model.evaluate`, with the moving average; the same noise every time."""
        if not kwargs.get("_use_cached_eval_dataset"):  # else `fit` has checked it
            kwargs = arguments.checked("evaluate", {**kwargs, "batch_size": batch_size})
            batch_size = kwargs.pop("batch_size")
            self.check_weights()
            x = batches.check_source(self, x, y, batch_size)
        self._begin_test()
        if getattr(x, "shuffles_itself", False):
            x.epoch = x.epoch  # starts it again: each evaluation reads the same batches
        return super().evaluate(x, None, batch_size, **kwargs)

    def _begin_test(self):
        self.test_step_count.assign(0)
        draws.begin(self.random, self.seed)

    def predict(self, x: dict[str, Array], *args: Any, **kwargs: Any) -> np.ndarray:
        """As `keras.Model.predict`: what the network gives for a dict of its inputs.

        Images are drawn by `generate`.
        """
        x = batches.check_inputs(self.network, x)
        return super().predict(x, *args, **kwargs)

    def predict_on_batch(self, x: dict[str, Array]) -> np.ndarray:
        """As `keras.Model.predict_on_batch`; see `predict`."""
        x = batches.check_inputs(self.network, x)
        return super().predict_on_batch(x)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """One training step, as one of `fit`."""
        given = dict(sample_weight=sample_weight, class_weight=class_weight)
        arguments.checked("train_on_batch", given)
        self.check_weights()
        x = batches.check_source(self, x, y)
        batches.adopt(self, x)
        draws.begin(self.random, self.seed)
        return super().train_on_batch(x, return_dict=return_dict)

    def test_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """The loss of a batch by the moving average, as `evaluate` gives it for it alone."""
        arguments.checked("test_on_batch", {"sample_weight": sample_weight})
        self.check_weights()
        x = batches.check_source(self, x, y)
        self._begin_test()
        return super().test_on_batch(x, return_dict=return_dict)

    # One step: what `backend.train_step` and `test_step` call, see `backend.steps` ---------------

    def train_step(self, *args: Any) -> Any:
        return backend.train_step(self, *args)

    def test_step(self, *args: Any) -> Any:
        return backend.test_step(self, *args)

    def unpack(self, data: Any) -> Batch:
        return batches.as_dict(data)

    def loss_of(self, batch: Batch) -> Tensor:
        """Loss of a training batch; its random numbers are a function of (seed, step)."""
        draws.go_to(self.random, TRAIN, self.step)
        return self.mean_loss(batch, self.network, training=True)

    def test_loss_of(self, batch: Batch) -> Tensor:
        """Loss of a validation batch by the moving average; batch k always draws the same.

        Its times are uniform and its errors unweighted, so that models of one prediction and
        schedule can be compared.
        """
        draws.go_to(self.random, TEST, self.test_step_count)
        self.test_step_count.assign_add(1)
        return self.mean_loss(batch, self.ema_network, training=False)

    def mean_loss(self, batch: Batch, network: Any, training: bool) -> Tensor:
        """Mean loss of a batch, a float32 scalar; NaN where a label is out of range."""
        objective = self.objective if training else self.objective.for_validation()
        x0 = self.clean(batch)
        t, noise, dropped = self.draw(x0, objective)
        conditions = self.condition(batch, dropped if training else None)
        if training and self.flow_map is not None:
            mean = self.flow_map_loss(
                self.flow_map, network, batch, x0, t, noise, conditions, dropped
            )
        else:
            inputs = {**self.inputs(objective.add_noise(x0, t, noise), t), **conditions}
            output = ops.cast(network(inputs, training=training), "float32")
            mean = objective.loss(output, x0, t, noise)
        if "label" not in conditions:
            return mean
        # A lookup out of range is silent on some devices, and label K would read as "none";
        # NaN makes the step skipped and counted.
        label = ops.cast(batch["label"], "int32")
        valid = ops.all((label >= 0) & (label < network.num_classes))
        return ops.where(valid, mean, float("nan"))

    def flow_map_loss(
        self,
        flow_map: FlowMap,
        network: Any,
        batch: Batch,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        conditions: dict[str, Tensor],
        dropped: Tensor,
    ) -> Tensor:
        """The loss of a flow map for a batch whose times, noise and conditions were drawn."""
        draws.go_to(self.random, FLOW_MAP, self.step)
        count = ops.shape(x0)[0]
        t, span = flow_map.times(t, draws.normal(self.random, (count, 2)))
        # Without a condition there is nothing to guide.
        scale = ops.where(dropped, 1.0, flow_map.scales(draws.uniform(self.random, (count,))))
        none = self.condition(batch, ops.ones_like(t, dtype="bool"))

        def u(z, t, span, scale, rows, conditional=True):
            given = conditions if conditional else none
            inputs = self.inputs(z, t, span, scale)
            inputs.update({key: value[rows] for key, value in given.items()})
            return ops.cast(network(inputs, training=True), "float32")

        alpha = flow_map.alpha_at(self.step)
        return flow_map.loss(u, x0, noise, t, span, alpha, scale)

    def inputs(
        self, x: Tensor, t: Tensor, span: Tensor | None = None, scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The network's inputs without its conditions.

        Args:
            x: `(B, H, W, C)`, noisy images.
            t: `(B,)`, their times.
            span: `(B,)` t - r, for a network that takes it; `None` is 0.
            scale: `(B,)` guidance scale, for a network that takes it; `None` is 1.
        """
        t = ops.convert_to_tensor(t)
        inputs = {"image": ops.convert_to_tensor(x), "timestep": self.objective.time_scale * t}
        if self.network.takes_span:
            inputs["span"] = ops.zeros_like(t) if span is None else ops.convert_to_tensor(span)
        if self.network.takes_guidance:
            inputs["guidance"] = ops.zeros_like(t) if scale is None else ops.log(scale)
        return inputs

    def clean(self, batch: Batch) -> Tensor:
        """x0 `(B, H, W, C)` of a batch, float32; of moments a new posterior sample."""
        normal = functools.partial(draws.normal, self.random)
        return batches.clean(batch, self.latent_scale, normal, self.latent_shift)

    def condition(self, batch: Batch, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """The network's conditions, replaced by "none" where `dropped`, `(B,)` bool."""
        null = None if self.network.context_shape is None else self.null_context
        return batches.condition(batch, self.network, null, dropped)

    def draw(self, x0: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """Random t `(B,)`, noise like x0, and which conditions to drop, `(B,)` bool."""
        shape, count = ops.shape(x0), ops.shape(x0)[:1]
        t = objective.times(draws.uniform(self.random, count))
        noise = draws.normal(self.random, shape)
        return t, noise, draws.uniform(self.random, count) < self.condition_dropout

    def gradient_norm(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Euclidean norm of all gradients, float32, without the loss scale."""
        norm = backend.norm([g for g in gradients if g is not None])
        scale = getattr(self.optimizer, "dynamic_scale", None)
        return norm if scale is None else norm / ops.convert_to_tensor(scale)

    def after_step(self, ok: Tensor, before: Tensor) -> None:
        """Counters, and the average if the optimizer made a step (`before`: its count)."""
        skipped = ops.cast(ops.logical_not(ok), "int32")
        self.step.assign_add(1)
        self.skipped_steps.assign_add(skipped)
        self.skipped_in_row.assign((self.skipped_in_row + skipped) * skipped)
        stepped = ops.convert_to_tensor(self.optimizer.iterations) > before
        decay = ops.where(stepped, self.current_ema_decay(), 1.0)  # 1.0: leave it as it is
        self.ema_step.assign_add(ops.cast(stepped, "int32"))
        backend.blend(self.ema_network.weights, self.network.weights, decay)

    def current_ema_decay(self) -> Tensor:
        k = ops.cast(self.ema_step, "float32")
        ramp = (1.0 + k) / (10.0 + k) if self.ema_warmup else 1.0
        return ops.minimum(self.ema_decay, ramp)

    def report(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Logs of a training step; skipped steps do not enter the means."""
        ok = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
        means = {"loss": loss_mean(self), "grad_norm": self.norm_tracker}
        for tracker, value in zip(means.values(), (loss, norm)):
            tracker.update_state(ops.where(ok, value, 0.0), ops.cast(ok, "float32"))
        return {
            **{key: ops.where(t.count > 0, t.result(), float("nan")) for key, t in means.items()},
            "ema_decay": self.current_ema_decay(),
            # Cast, so that JAX makes new arrays: the counters' own are donated to the next step.
            "skipped_steps": ops.cast(self.skipped_steps, "float32"),
            "skipped_in_row": ops.cast(self.skipped_in_row, "float32"),
        }

    def test_report(self, batch: Batch, loss: Tensor) -> dict[str, Tensor]:
        mean = loss_mean(self)
        mean.update_state(loss, ops.shape(next(iter(batch.values())))[0])
        return {"loss": mean.result()}

    # Sampling and files ---------------------------------------------------------------------------

    def generate(
        self,
        num_images: int | None = None,
        labels: Array | None = None,
        prompts: str | Sequence[str] | Array | None = None,
        *,
        negative_prompts: str | Sequence[str] | Array | None = None,
        num_steps: int | None = None,
        sampler: str | Steps | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance: Guidance | None = None,
        image: Array | None = None,
        strength: float | None = None,
        mask: Array | None = None,
        resamples: int = 1,
        noise: Array | None = None,
        on_step: Callable[[int, float, np.ndarray], Any] | None = None,
        return_intermediates: bool = False,
        every: int = 1,
        seed: int = 0,
        first: int = 0,
        batch_size: int | None = None,
        use_ema: bool = True,
        decode: bool = True,
        verbose: int = 1,
        **unknown: Any,
    ) -> Any:
        """Draws images, from noise or from pictures.

        Image k depends on `seed` and k alone: not on `batch_size`, and, with a deterministic
        sampler, not on the backend (up to rounding). The whole loop is one compiled program on JAX
        and TensorFlow; another seed, guidance scale or sampler of as many evaluations compiles
        nothing.

        Args:
            num_images: int, for an unconditional model.
            labels: ints in [0, num_classes), one per image, for a class-conditional model.
            prompts: for a text model: one string per image, or contexts `(n, length, width)`, as
                the text encoder makes them.
            negative_prompts: what guidance leads away from, in place of the empty prompt: one
                string for all images, one per image, or their contexts.
            num_steps: int, what the sampler makes of it; `None` is the model's default.
            sampler: a name in `diffusion.samplers.SAMPLERS`, or `Steps`; `None` is the model's
                default.
            guidance_scale: float w, D_u + w (D_c - D_u); 1.0 is off, `None` the model's default. Or
                a function of the time t in (0, 1] that gives w.
            guidance_interval: (low, high) in [0, 1]: times at which guidance is on.
            guidance: how guidance combines two estimates, such as `sampling.guidance.APG()`; `None`
                is classifier-free guidance.
            image: pictures to start from, `(H, W, C)` for all images or `(n, H, W, C)`, uint8 or
                float in [-1, 1], of the model's size. Of latents the autoencoder's.
            strength: float in [0, 1]: noise is added to `image` up to the time t = strength, and
                sampling starts there (SDEdit: Meng et al. 2022, arXiv 2108.01073). 0 returns the
                pictures, of latents as the autoencoder decodes them; 1 does not look at them.
                `None` is 1 with a mask.
            mask: `(H, W)` or `(n, H, W)`, 1 where images are drawn, 0 where those of `image` are
                kept, which come back exactly (RePaint: Lugmayr et al. 2022, arXiv 2201.09865). Of
                latents, each that has a drawn pixel is drawn, and the kept pixels are pasted.
            resamples: int >= 1, how often each step is made with a mask, with noise in between,
                so that the drawn part fits to the kept one.
            noise: `(n, H, W, C)` float to start from, such as `invert` gives it, in place of the
                seed's; latents' shape for a model of latents.
            on_step: called as on_step(step, t, denoised) after each `every`-th row of the sampler
                and the last one, with the row's number from 0, its time and the estimate of the
                images x0, `(B, H, W, C)` float32 as the network sees them. A batch is drawn after
                the other, each from step 0.
            return_intermediates: bool. Return the images, and these estimates
                `(looks, n, H, W, C)`, decoded as the images are: a film for
                `evaluation.write_film`.
            every: int >= 1, rows of the sampler between two looks at the estimate.
            seed: int >= 0.
            first: int >= 0, index of the first image: several calls can share what one would draw.
            batch_size: int, images at a time; `None` is what is fast here, at most 64.
            use_ema: bool. Sample with the moving average of the weights.
            decode: bool. `False` returns float32 as the network sees it: pixels in [-1, 1], or
                latents times the scale factor.
            verbose: 0 or 1. Progress bar.

        Returns:
            `(n, H, W, C)` uint8 in [0, 255]; with `return_intermediates` a tuple.

        Raises:
            ValueError, TypeError: if the arguments are unknown or do not fit the model, before
                anything is compiled.
        """
        for name in unknown:
            known = inspect.signature(self.generate).parameters
            raise TypeError(f"generate has no argument {name!r}.{checks.nearest(name, known)}")
        job = sampling.prepare(
            self,
            num_images,
            labels,
            prompts,
            negative_prompts=negative_prompts,
            num_steps=num_steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance=guidance,
            image=image,
            strength=strength,
            mask=mask,
            resamples=resamples,
            noise=noise,
            on_step=on_step,
            return_intermediates=return_intermediates,
            every=every,
            seed=seed,
            first=first,
            batch_size=batch_size,
            use_ema=use_ema,
            decode=decode,
        )
        return sampling.draw(self, job, verbose)

    def invert(
        self,
        image: Array,
        labels: Array | None = None,
        prompts: str | Sequence[str] | Array | None = None,
        *,
        num_steps: int | None = None,
        sampler: str | Steps = "ddim",
        evaluations: int = 2,
        guidance_scale: float | Callable[[float], float] = 1.0,
        batch_size: int | None = None,
        use_ema: bool = True,
        verbose: int = 1,
    ) -> np.ndarray:
        """The noise from which `generate(noise=...)` draws given pictures.

        The sampler's steps backwards, by fixed-point iteration: `diffusion.tables.backwards`. Pass
        the same sampler, `num_steps`, conditions and guidance to `generate`.

        Args:
            image: `(H, W, C)` or `(n, H, W, C)`, uint8 or float in [-1, 1]: see `generate`.
            labels, prompts: as in `generate`, for models that take them.
            num_steps: int >= 2; `None` is the model's default.
            sampler: "ddim", "euler", or deterministic `Steps` of one evaluation a step.
            evaluations: 1, 2 or 3 of the network for each step: more are more exact.
            guidance_scale: as in `generate`, but 1.0, off, by default: inversion is less exact with
                guidance.
            batch_size, use_ema, verbose: as in `generate`.

        Returns:
            `(n, H, W, C)` float32, of about standard normal noise; latents' shape for a model of
            latents.

        Raises:
            ValueError, TypeError: as `generate`; for a sampler that adds noise or has a memory.
        """
        job = sampling.prepare_inversion(
            self,
            image,
            labels,
            prompts,
            num_steps=num_steps,
            sampler=sampler,
            evaluations=evaluations,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            use_ema=use_ema,
        )
        return sampling.draw(self, job, verbose)

    def export_sampler(
        self,
        path: PathLike,
        format: str,
        *,
        batch_size: int = 1,
        num_steps: int | None = None,
        sampler: str | Steps | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance: Guidance | None = None,
        use_ema: bool = True,
        decode: bool = True,
    ) -> None:
        """Writes the whole of `generate` as one program that runs without this package.

        Its inputs are "noise" `(batch_size, H, W, C)` float32, standard normal, and, where the
        model has them, "label" `(batch_size,)` int32 and "context" `(batch_size, length, width)`
        float32; its output is "images", uint8 in [0, 255]. Noise is an input, not a seed, because
        runtimes draw other numbers from equal seeds; `generate(noise=...)` draws the same images
        from it.

        Args:
            path: of the file, which is written beside and renamed. It ends in .onnx, .tflite or
                .stablehlo; a SavedModel is a new folder.
            format: "onnx" (PyTorch, TensorFlow), "tf_saved_model" (TensorFlow, JAX), "litert"
                (TensorFlow) or "stablehlo" (JAX).
            batch_size: int, images at a time, which the program is written for.
            num_steps, sampler, guidance_scale, guidance_interval, guidance, use_ema: as in
                `generate`; they are part of the program. The sampler must be deterministic.
            decode: bool. `False` gives float32 as the network sees it: pixels in [-1, 1], or
                latents times the scale factor.

        Raises:
            ValueError, TypeError: if an argument is unknown or does not fit the model.
            NotImplementedError: where this backend does not write the format; the message says
                which one does.
            ImportError: without `pip install "keras-uvit[export]"`, where the format needs it.
            FileExistsError: for a folder that is there already.
        """
        quantizing.check_whole(self.network, "An exported sampler")
        sampling.export_sampler(
            self,
            path,
            format,
            batch_size=batch_size,
            num_steps=num_steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance=guidance,
            use_ema=use_ema,
            decode=decode,
        )

    def save(self, filepath: PathLike, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save`, but written beside and renamed: a killed save loses nothing.

        One process of several can save what each of them has. The encoders are no
        part of the file, which a warning says: set them again after loading.

        Raises:
            ValueError: if weights are divided among processes, a layer was changed after the
                network was made, or the name ends in .h5, Keras' old format, which would not load.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(f"The name of a saved model ends in .keras. Received: {filepath}.")
        self.encoders.warn_of_saving()
        self._write(super().save, filepath, overwrite, **kwargs)

    def save_weights(self, filepath: PathLike, overwrite: bool = True, **kwargs: Any) -> None:
        """As `keras.Model.save_weights`, but written beside and renamed."""
        self._write(super().save_weights, filepath, overwrite, **kwargs)

    def _write(self, write, filepath, overwrite, **kwargs):
        self.check_weights()
        distribution.check_whole()
        with distribution.alone():  # Keras makes an optimizer to look at, in all processes
            atomically(write, filepath, overwrite, **kwargs)

    def save_to_preset(
        self,
        preset_dir: PathLike,
        *,
        include_encoders: bool = True,
        overwrite: bool = False,
        verbose: int = 1,
        **card: Any,
    ) -> None:
        """Writes the model as one folder, to share it: `presets.load(preset_dir)` reads it.

        The folder has the moving average of the weights, the configuration, the encoders or their
        fingerprints, checksums, and a README. It appears whole or not at all. Not in it is what a
        run needs to be resumed: raw weights and the optimizer's state are in checkpoints.

        Args:
            preset_dir: path of the folder; or "hf://user/name" to upload it to the Hugging Face
                Hub, see `presets.upload_preset`.
            include_encoders: bool. Write the autoencoder and the text encoder too. With `False`
                the folder has their names and fingerprints, and whoever loads it brings them.
            overwrite: bool. Replace a folder of a model that is there.
            verbose: 0 or 1. Print what was written and how large it is.
            **card: what the README says beside what the model knows: `data`, `license`, `fid` and
                `samples` of `presets.Card`.

        Raises:
            FileExistsError: if the folder exists, and `overwrite` is false; or it is more than the
                folder of a model.
            ImportError: without `pip install "keras-uvit[latent]"`, which has safetensors; if the
                network has a class that is not registered.
            TypeError: for an argument that is not known.
            ValueError: if an encoder of your own is to be included, the FID is of other weights, a
                layer holds code, or weights are divided among processes.
        """
        from keras_uvit.presets import Card, sharing  # presets stand on top of this package

        known = inspect.signature(Card).parameters
        for name in card.keys() - known.keys():
            nearest = checks.nearest(name, known)
            raise TypeError(f"save_to_preset has no argument {name!r}.{nearest}")
        sharing.save(self, preset_dir, Card(**card), include_encoders, overwrite, verbose)

    @classmethod
    def from_preset(
        cls, preset: PathLike, *, autoencoder: Any = None, text_encoder: Any = None
    ) -> "DiffusionModel":
        """The model of a folder that `save_to_preset` wrote, as `presets.load` reads it.

        Args:
            preset: path of the folder, or "hf://user/name".
            autoencoder, text_encoder: of `presets.load`, in place of those of the folder.

        Returns:
            `DiffusionModel`, not compiled. Its network and its average have the same weights.

        Raises:
            FileNotFoundError, ImportError, OSError, ValueError: see `presets.load`.
        """
        from keras_uvit.presets import loading  # presets stand on top of this package

        return loading.from_folder(preset, autoencoder, text_encoder)
