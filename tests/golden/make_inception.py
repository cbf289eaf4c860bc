"""Makes inception.npz: features of pytorch-fid 0.3.0 and torch-fidelity 0.4.0 for random weights.

    pip install torch==2.13.0 numpy scipy pillow tqdm
    pip install --no-deps torchvision==0.28.0 torch-fidelity==0.4.0 pytorch-fid==0.3.0
    python tests/golden/make_inception.py

Made with torch 2.13.0+cpu. Weights (87 MB) and images are not stored: they are functions of a seed,
and the test makes them again with `random_weights` and `random_images`. Stored are the answers, a
key each of `<package>_<height>x<width>_<feature>`.
"""

import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np

# The last is reduced, where antialiasing would show, and not square.
SIZES = ((32, 32), (48, 64), (256, 256), (299, 299), (512, 400))
COUNT = 2


def random_weights(shapes, seed=0):
    """{name: float32 array}, a function of names, shapes and seed; activations keep their size."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        a = rng.standard_normal(shape, "float32")
        if name.endswith("conv.weight"):
            a *= np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("running_var"):
            a = np.exp(0.2 * a)
        elif name.endswith("bn.weight"):
            a = 1 + 0.1 * a
        elif name == "fc.weight":
            a *= shape[1] ** -0.5
        else:  # biases, running means
            a *= 0.1
        tensors[name] = a.astype("float32")
    return tensors


def random_images(height, width, seed=0):
    """`(COUNT, height, width, 3)` uint8: coarse noise, each pixel repeated 8 times, and fine."""
    rng = np.random.default_rng([seed, height, width])
    coarse = rng.integers(0, 200, (COUNT, -(-height // 8), -(-width // 8), 3))
    coarse = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    return (coarse + rng.integers(0, 56, coarse.shape)).astype("uint8")


def main():
    import torch

    # torchvision's operators load only beside the torch build they were compiled for, and the
    # import fails without them. Both packages import it; neither uses an operator here.
    with mock.patch.object(torch.library, "register_fake", return_value=lambda f: f):
        import torchvision  # noqa: F401
    from pytorch_fid import inception as pytorch_fid
    from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity

    # Both packages download their weights when they are built; here they get ours.
    download = mock.patch.object(pytorch_fid, "load_state_dict_from_url")
    with download, mock.patch.object(torch.nn.Module, "load_state_dict"):
        inner = pytorch_fid.fid_inception_v3()
    shapes = {k: tuple(a.shape) for k, a in inner.state_dict().items() if "num_batches" not in k}
    state = {k: torch.from_numpy(a) for k, a in random_weights(shapes).items()}
    state |= {k: a for k, a in inner.state_dict().items() if "num_batches" in k}
    with mock.patch.object(pytorch_fid, "load_state_dict_from_url", return_value=state):
        fid = pytorch_fid.InceptionV3([3]).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state, path)
        names = ["2048", "logits", "logits_unbiased"]
        fidelity = torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", names, feature_extractor_weights_path=str(path)
        ).eval()
    seen = {}
    for name, block in (
        ("pytorch_fid", fid.blocks[2][6]),  # Mixed_6d
        ("torch_fidelity", fidelity.Mixed_6d),
    ):
        block.branch1x1.register_forward_hook(
            lambda module, given, out, name=name: seen.__setitem__(name, out)
        )
    answers = {}
    for height, width in SIZES:
        images = torch.from_numpy(random_images(height, width)).permute(0, 3, 1, 2)
        with torch.no_grad():
            pool = fid(images.float() / 255)[0][:, :, 0, 0]
            features = dict(zip(names, fidelity(images)))
        found = {("pytorch_fid", "pool"): pool}
        found |= {
            ("torch_fidelity", ours): features[theirs]
            for ours, theirs in zip(("pool", "logits", "logits_unbiased"), names)
        }
        found |= {
            (name, "spatial"): out[:, :7].permute(0, 2, 3, 1).flatten(1)
            for name, out in seen.items()
        }
        for (package, feature), a in found.items():
            answers[f"{package}_{height}x{width}_{feature}"] = a.numpy()
    np.savez_compressed(Path(__file__).parent / "inception.npz", **answers)
    for key, a in answers.items():
        print(f"{key:45}{a.shape!s:12} std {a.std():.3f}")


if __name__ == "__main__":
    main()
