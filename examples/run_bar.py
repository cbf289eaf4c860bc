"""A progress bar over a whole run, for examples whose epochs are too short to have one each."""

import keras

from keras_uvit import progress


class RunBar(keras.callbacks.Callback):
    """Counts optimizer steps, from where the run resumes."""

    def on_train_begin(self, logs=None):
        steps = self.params["epochs"] * self.params["steps"]
        self._bar = progress.bar(steps, 1, "step")
        self._done = int(keras.ops.convert_to_numpy(self.model.step))

    def on_train_batch_end(self, batch, logs=None):
        self._done += 1
        self._bar.update(self._done)


if __name__ == "__main__":
    raise SystemExit("This file is a part of ablations.py and cka.py.")
