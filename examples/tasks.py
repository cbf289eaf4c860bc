"""What `ablations.py` learns and measures: data with their recipe, scores of what is drawn."""

import dataclasses
from pathlib import Path

import digits
import keras
import numpy as np
import shapes as shapes_example

from keras_uvit import UViT, data, evaluation, presets
from keras_uvit.data import shapes
from keras_uvit.diffusion import schedules
from keras_uvit.encoders import AutoencoderKL

HELD_OUT = 2048  # images of which a loss is taken, at most


def make(options):
    """The task that `--data` names: one of `TASKS`, or a cache of latents."""
    if options.data not in TASKS and not Path(options.data).is_dir():
        raise SystemExit(
            f"--data is one of {list(TASKS)} or the folder of a cache. Received: {options.data!r}."
        )
    return TASKS.get(options.data, Cache)(options)


class Task:
    """Base: the preset's recipe, with the paper's choices for the network.

    `better` says which way each score is better: 1 up, -1 down. `unet` is the preset of the CNN of
    equal cost, where there is one.
    """

    preset = unet = None
    better = {"loss": -1}

    def __init__(self, options):
        self.options, self.row = options, presets.get(self.preset)
        self.iterations = options.iterations or self.row.iterations
        self.network = {**self.row.network, "position": "learned", "init": "published"}
        self.encoders = {}
        if options.inception and options.reference:
            self.inception = evaluation.InceptionFeatures(options.inception)
            self.reference = evaluation.Reference.load(options.reference)
            self.better = {**self.better, "FID": -1}

    def model(self, change, seed):
        """A `DiffusionModel` that differs from the base's by `change`."""
        own = dict(change.get("model", {}))
        if "schedule" in own:
            own["schedule"] = getattr(schedules, own["schedule"])()
        model = self.row.build(self._network(change), seed=seed, **own)
        model.set_encoders(**self.encoders)
        return model

    def _network(self, change):
        if "unet" in change:
            return presets.get(self.unet).new_network()
        own = {**self.network, **change.get("network", {})}
        heads = own["num_heads"]
        own["hidden_dim"] = round(own["hidden_dim"] * change.get("width", 1) / heads) * heads
        own["patch_size"] = round(own["patch_size"] * change.get("patch", 1))
        return UViT(**own)

    def loss(self, model):
        """Of pictures held out, by the averaged weights; comparable for one objective only."""
        logs = model.evaluate(self.held_out(), verbose=0, return_dict=True)
        return logs["loss"]

    def held_out(self):
        return in_memory(self.test, self.row.batch_size)

    def score(self, model, seed, num_steps):
        what = self.wanted(self.options.num_images)
        size = min(self.options.num_images, 500)
        options = dict(num_steps=int(num_steps), seed=seed, batch_size=size)
        images = model.generate(**what, **options, verbose=1)
        scores = self.measure(images, what)
        if "FID" in self.better:
            scores["FID"] = evaluation.fid(
                images, self.reference, self.inception, allow_few=True, verbose=1
            )
        return scores

    def wanted(self, count):
        """Arguments of `generate` for `count` images."""
        classes = self.network.get("num_classes")
        return {"num_images": count} if classes is None else {"labels": np.arange(count) % classes}

    def measure(self, images, what):
        return {}


class Digits(Task):
    preset, unet = "uvit_tiny_digits", "unet_tiny_digits"
    better = {"loss": -1, "agreement": 1, "distance": -1}

    def __init__(self, options):
        super().__init__(options)
        self.train, self.test = data.digits("train"), data.digits("test")

    def dataset(self, seed):
        return in_memory(self.train, self.row.batch_size, seed)

    def measure(self, images, what):
        found = digits.measure(images, what["labels"], self.train, self.test)
        return {"agreement": found["class_agreement"], "distance": found["frechet_distance"]}


class Shapes(Task):
    preset, unet = "uvit_tiny_shapes", "unet_tiny_shapes"
    better = {"loss": -1, "attributes": 1}

    def __init__(self, options):
        super().__init__(options)
        self.cache = Path(options.out) / "shapes-cache"
        source = shapes.source(256 if options.quick else shapes_example.PICTURES)
        text = shapes_example.text_encoder(source.captions, *self.network["context_shape"])
        self.encoders = {"text_encoder": text}
        data.write_images(source, self.cache, text_encoder=text)

    def dataset(self, seed):
        return data.image_shards(self.cache, self.row.batch_size, seed=seed)

    def loss(self, model):
        scenes = shapes.scenes(256, "test", seed=1)
        pictures = np.stack([shapes.draw(scene, k) for k, scene in enumerate(scenes)])
        contexts = self.encoders["text_encoder"]([str(scene) for scene in scenes])
        batch = {"image": pictures, "context": keras.ops.convert_to_numpy(contexts)}
        options = dict(batch_size=self.row.batch_size, verbose=0, return_dict=True)
        return model.evaluate(batch, **options)["loss"]

    def wanted(self, count):
        return {"prompts": [str(scene) for scene in shapes.scenes(count, "test", seed=0)]}

    def measure(self, images, what):
        return {"attributes": shapes.score(images, what["prompts"])["attributes"]}


class Cifar10(Task):
    preset = "uvit_small_cifar10"

    def dataset(self, seed):
        return data.tfds_images("cifar10", labels=None, batch_size=self.row.batch_size, seed=seed)

    def held_out(self):
        options = dict(labels=None, batch_size=self.row.batch_size, flip=False)
        return data.tfds_images("cifar10", split=f"test[:{HELD_OUT}]", **options)


class Cache(Task):
    """Latents that `keras-uvit encode` wrote, a network of U-ViT-S's size, U-ViT-L's recipe."""

    preset = "uvit_large_imagenet256"

    def __init__(self, options):
        super().__init__(options)
        small = presets.get("uvit_small_cifar10").network
        cache = self.dataset(0)
        scale = cache.scale or self.row.latent_scale  # where the cache does not say
        self.row = dataclasses.replace(self.row, latent_scale=scale)
        shape = cache.sample_shape
        self.network = {**small, "image_shape": (*shape[:2], shape[2] // 2)}
        self.network |= {"num_classes": cache.num_classes, "position": "learned"}
        if options.autoencoder:
            encoder = AutoencoderKL.from_file(options.autoencoder, scale=scale)
            self.encoders = {"autoencoder": encoder}
        elif "FID" in self.better:
            raise SystemExit("FID of latents needs --autoencoder, which makes pixels of them.")

    def dataset(self, seed):
        return data.LatentDataset(self.options.data, batch_size=256, seed=seed)

    def loss(self, model):
        """Of images that it was trained on: a cache holds nothing out."""
        dataset = self.dataset(0)
        steps = min(len(dataset), HELD_OUT // 256)
        return model.evaluate(dataset, steps=steps, verbose=0, return_dict=True)["loss"]

    def score(self, model, seed, num_steps):
        return super().score(model, seed, num_steps) if self.encoders else {}


TASKS = {"digits": Digits, "shapes": Shapes, "cifar10": Cifar10}


def in_memory(images, batch_size, seed=0):
    """Whole batches of arrays, in an order that is a function of (seed, epoch)."""
    source = data.sources.arrays(images, "digits")
    return data.images.in_memory(source, batch_size, flip=False, seed=seed, verbose=0)


if __name__ == "__main__":
    raise SystemExit("This file is a part of ablations.py: python examples/ablations.py --help")
