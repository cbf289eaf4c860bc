"""Callbacks that `DiffusionModel.fit` adds by itself."""

import keras


class StopOnNonFinite(keras.callbacks.Callback):
    """Stops `fit` after too many steps in a row whose loss or gradient was not finite.

    `fit` raises `error` once Keras has brought the weights back from the device: an exception in
    the middle of an epoch would lose them on JAX.

    Args:
        watched: the `DiffusionModel`; its `max_skipped_steps` is the limit. (Keras' own
            `self.model` synchronizes JAX' state at every use, and this runs in another thread.)
    """

    async_safe = True  # reads the logs only, so JAX need not wait for each step

    def __init__(self, watched):
        super().__init__()
        self.watched = watched
        self.error = None

    def on_train_batch_end(self, batch, logs=None):
        limit = self.watched.max_skipped_steps
        if self.error is None and logs and logs["skipped_in_row"] >= limit:
            self.error = (
                f"Training stopped: {int(logs['skipped_in_row'])} steps in a row had a loss or "
                f"gradient that was not finite ({int(logs['skipped_steps'])} in all). The weights "
                "are those of the last good step. Look for NaN or infinity in the data, labels "
                "out of range, a learning rate that is too high, or float16 overflow (use "
                "mixed_bfloat16); `max_skipped_steps` of DiffusionModel sets the limit."
            )
            self.watched.stop_training = True
