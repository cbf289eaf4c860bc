"""Are the answers still those of the published program, on this device and in each precision?

    python benchmarks/parity.py                    (JAX and PyTorch side by side: a minute)
    python benchmarks/parity.py --backends torch

The questions and answers are the tests' (tests/golden): three networks, and eight training steps.
`error` is the largest difference from the recorded answer, by the largest recorded number. Three
precisions are asked for; a case fails if its error is above `tolerance`:

    float32      products in full float32
    default      float32 as the backend computes it by itself: JAX on a GPU rounds factors to
                 TensorFloat-32, 10 bits. Reported, without a tolerance
    bfloat16     the policy "mixed_bfloat16", as training on a GPU uses it
"""

import argparse
import json
import os
import subprocess
import sys

import side_by_side

COLUMNS = ["backend", "device", "case", "precision", "error", "tolerance", "passed"]
PRECISIONS = {"float32": "float32", "default": "float32", "bfloat16": "mixed_bfloat16"}
# Of networks. float32: sums of a hundred terms in another order, five blocks deep. bfloat16: on a
# CPU both backends are 0.7 to 1.1 % away, after some twenty roundings of 0.2 to 0.4 %.
NETWORK = {"float32": 1e-5, "default": None, "bfloat16": 2e-2}
# Of training: rounding grows through Adam, whose first updates divide by tiny numbers. bfloat16: on
# a CPU the losses were up to 0.09 % away, the weights up to 0.43 %.
LOSSES = {"float32": 1e-4, "default": None, "bfloat16": 5e-3}
WEIGHTS = {"float32": 1e-4, "default": None, "bfloat16": 2e-2}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["jax", "torch"])
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        sys.exit(answer())
    command = [sys.executable, __file__, "--answer"]
    processes = [
        subprocess.Popen(command, env=dict(os.environ, KERAS_BACKEND=backend))
        for backend in options.backends
    ]  # nothing is timed, so they may share the device
    sys.exit(max(process.wait() != 0 for process in processes))


def answer():
    """One backend's side; returns whether a case failed."""
    rows = []
    for precision in PRECISIONS:
        set_products(precision)
        for case, tolerance, error in errors(precision):
            rows.append(row_of(case, precision, error, tolerance))
            print(json.dumps(rows[-1]), flush=True)
    print(side_by_side.table(rows, COLUMNS), flush=True)
    return any(row["passed"] is False for row in rows)


def row_of(case, precision, error, tolerance):
    import keras

    return {
        "backend": keras.config.backend(),
        "device": device(),
        "case": case,
        "precision": precision,
        "error": float(f"{error:.3g}"),
        "tolerance": tolerance,
        # Not `error > tolerance`: NaN is above nothing.
        "passed": None if tolerance is None else bool(error <= tolerance),
        "commit": side_by_side.COMMIT,
    }


def errors(precision):
    """Yields (case, tolerance, error)."""
    sys.path.insert(0, str(side_by_side.ROOT / "tests"))
    import published

    from keras_uvit import backend, convert

    dtype = PRECISIONS[precision]
    for name in published.CASES:
        network = published.network_of(name, dtype=dtype)
        convert.load_torch_weights(network, published.GOLDEN / f"{name}.pth")
        answers = published.answer_of(name, backend.compiled(network))
        yield name, NETWORK[precision], distance(*answers)
    model, ours, theirs = published.train(dtype=dtype)
    yield "training losses", LOSSES[precision], distance(ours, theirs)
    ours, theirs = published.trained_weights(model.network, "end")
    yield "trained weights", WEIGHTS[precision], distance(ours, theirs)


def distance(ours, theirs):
    import numpy as np

    return np.abs(np.asarray(ours, "float64") - theirs).max() / np.abs(theirs).max()


def device():
    """What computes, as the backend names it."""
    import keras

    if keras.config.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    if keras.config.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    return tf.config.list_logical_devices()[-1].device_type


def set_products(precision):
    """Full float32 products for "float32", the backend's own choice for the others."""
    import keras

    exact = precision == "float32"
    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest" if exact else None)
    elif keras.config.backend() == "torch":
        import torch

        # PyTorch's defaults: TensorFloat-32 for convolutions only.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = not exact
    else:
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(not exact)


if __name__ == "__main__":
    main()
