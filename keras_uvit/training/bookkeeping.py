"""What surrounds the gradient of a step: its norm, the moving average, counters, logs."""

import itertools

from keras import ops

from keras_uvit import backend


def check_pairs(model):
    """Raises unless each weight of the network has its place in the moving average."""
    networks = (model.network, model.ema_network)
    kinds = ([(w.name, tuple(w.shape), w.dtype) for w in network.weights] for network in networks)
    for k, (weight, average) in enumerate(itertools.zip_longest(*kinds)):
        if weight != average:
            raise ValueError(
                f"Weight {k} of the network is {weight}, and of its moving average {average}: a "
                "layer was changed after it was made, such as by enable_lora, quantize or "
                "add_weight. This is not supported: use the network as its config makes it."
            )


def gradient_norm(model, gradients):
    """Euclidean norm of all gradients, float32, without the loss scale."""
    norm = backend.norm([g for g in gradients if g is not None])
    scale = getattr(model.optimizer, "dynamic_scale", None)
    return norm if scale is None else norm / ops.convert_to_tensor(scale)


def after_step(model, ok, before):
    """Counters, and the moving average if the optimizer made a step (`before`: its count)."""
    skipped = ops.cast(ops.logical_not(ok), "int32")
    model.step.assign_add(1)
    model.skipped_steps.assign_add(skipped)
    model.skipped_in_row.assign((model.skipped_in_row + skipped) * skipped)
    stepped = ops.convert_to_tensor(model.optimizer.iterations) > before
    decay = ops.where(stepped, model.current_ema_decay(), 1.0)  # 1.0: leave it as it is
    model.ema_step.assign_add(ops.cast(stepped, "int32"))
    backend.blend(model.ema_network.weights, model.network.weights, decay)


def current_ema_decay(model):
    k = ops.cast(model.ema_step, "float32")
    ramp = (1.0 + k) / (10.0 + k) if model.ema_warmup else 1.0
    return ops.minimum(model.ema_decay, ramp)


def report(model, loss, norm):
    """Logs of a training step; skipped steps do not enter the means."""
    ok = ops.logical_and(ops.isfinite(norm), ops.isfinite(loss))
    for tracker, value in ((model._loss_tracker, loss), (model.norm_tracker, norm)):
        tracker.update_state(ops.where(ok, value, 0.0), ops.cast(ok, "float32"))
    return {
        "loss": _mean(model._loss_tracker),
        "grad_norm": _mean(model.norm_tracker),
        "ema_decay": model.current_ema_decay(),
        # Cast, so that JAX makes new arrays: the counters' own are donated to the next step.
        "skipped_steps": ops.cast(model.skipped_steps, "float32"),
        "skipped_in_row": ops.cast(model.skipped_in_row, "float32"),
    }


def _mean(tracker):
    return ops.where(tracker.count > 0, tracker.result(), float("nan"))


def test_report(model, batch, loss):
    model._loss_tracker.update_state(loss, ops.shape(next(iter(batch.values())))[0])
    return {"loss": model._loss_tracker.result()}
