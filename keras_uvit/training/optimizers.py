"""The recipe's optimizer."""

import keras


def adamw(
    learning_rate=2e-4,
    beta_1=0.99,
    beta_2=0.999,
    weight_decay=0.03,
    warmup_steps=2500,
    decay_steps=None,
    gradient_accumulation_steps=None,
    clipnorm=None,
):
    """AdamW as in the published recipes: decay on every weight, linear warm-up from 0.

    Keras adds epsilon to sqrt(v), PyTorch to the bias-corrected sqrt(v / (1 - beta_2^k)); at step
    k Keras' 1e-8 acts like PyTorch's 1e-8 / sqrt(1 - beta_2^k): 1e-7 at the first step for beta_2
    = 0.99, equal later. Both are far below any gradient that matters, so 1e-8 it is.

    Args:
        learning_rate: float, after the warm-up.
        beta_1, beta_2: floats in [0, 1).
        weight_decay: float, decoupled: each step also subtracts learning_rate * weight_decay * w.
        warmup_steps: int. Optimizer step k (from 0) has learning_rate * min(k / warmup_steps, 1).
        decay_steps: int or None. Cosine decay to 0 over so many steps after the warm-up; None
            keeps the rate constant, as published.
        gradient_accumulation_steps: int or None. Batches per optimizer step; all counts of steps
            here are optimizer steps.
        clipnorm: float or None. Largest norm of each weight's gradient.

    Returns:
        `keras.optimizers.AdamW`.
    """
    n = gradient_accumulation_steps or 1  # Keras' schedules count batches
    schedule = learning_rate
    if warmup_steps or decay_steps:
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup_steps else learning_rate,
            (decay_steps or 1) * n,
            alpha=0.0 if decay_steps else 1.0,
            warmup_target=learning_rate if warmup_steps else None,
            warmup_steps=warmup_steps * n,
        )
    return keras.optimizers.AdamW(
        schedule,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=1e-8,
        weight_decay=weight_decay,
        gradient_accumulation_steps=gradient_accumulation_steps,
        clipnorm=clipnorm,
    )
