"""
Title: Text to image
Description: A small model draws two shapes from a sentence, and its pictures are read back.
"""

"""
## A model that ships with the package

It has learned pictures of two shapes with captions such as "a small red circle left of a large blue
square". Its text encoder ships too, so nothing is downloaded.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

import matplotlib.pyplot as plt

from keras_uvit import data, evaluation, presets, training
from keras_uvit.data import shapes

STEPS = 20

model = presets.load("uvit_tiny_shapes", weights="pretrained")


def show(images, prompts):
    plt.figure(figsize=(7, 3))
    plt.imshow(evaluation.captioned_grid(images, prompts, zoom=4))
    plt.axis("off")
    plt.show()


"""
## Drawing
"""

prompts = [
    "a small red circle left of a large blue square",
    "a large yellow triangle above a small green circle",
    "a large green square above a large red triangle",
]
images = model.generate(prompts=prompts, seed=0, verbose=0)
show(images, prompts)

"""
## Is it what was asked for?

The shapes are so simple that a program can read them back from the pixels.
"""

for prompt, image in zip(prompts, images):
    print(f"asked: {prompt}\nread:  {shapes.read_back(image)}\n")

"""
Captions of the "test" split name pairs of things that no training picture has shown together.
"""

held_out = [str(scene) for scene in shapes.scenes(30, "test")]
drawn = model.generate(prompts=held_out, seed=0, verbose=0)
print(shapes.score(drawn, held_out))

"""
## Changing a picture

`image=` starts from a picture instead of noise. `strength` says how much noise it gets at first.
"""

others = [prompt.replace("red", "yellow").replace("blue", "green") for prompt in prompts]
show(model.generate(prompts=others, image=images, strength=0.7, seed=0, verbose=0), others)

"""
## Training

Captioned pictures are written into a cache once, each with what the text encoder makes of its
captions. Here they are new shapes, for some steps only: a whole training takes half an hour on a
CPU. `keras_uvit.data.captioned.captioned_folder` reads pictures of your own, with a line for each
in `captions.jsonl`.
"""

source = shapes.source(200, seed=1)
data.write_images(source, "shapes_cache", text_encoder=model.encoders.text_encoder)
samples = data.image_shards("shapes_cache", batch_size=16)
model.compile(training.adamw(learning_rate=1e-4, warmup_steps=0))
history = model.fit(samples, steps_per_epoch=STEPS, epochs=1, verbose=0)
print(f"loss {history.history['loss'][-1]:.4f}")
