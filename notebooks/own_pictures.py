"""
Title: Your own pictures
Description: A folder of pictures, with a folder for each class, becomes a model that draws more.
"""

"""
## A folder

Put your own pictures into a folder, with one sub-folder for each class or without classes. Here we
draw some to have any: discs and squares in random colours.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from keras_uvit import data, evaluation, presets

STEPS = 600  # None trains as long as suits the data: some minutes

random = np.random.default_rng(0)
for k in range(400):
    kind = ("discs", "squares")[k % 2]
    picture = Image.new("RGB", (16, 16), "white")
    left, top, size = *random.integers(1, 5, 2), random.integers(8, 11)
    draw = ImageDraw.Draw(picture)
    shape = draw.ellipse if kind == "discs" else draw.rectangle
    shape([left, top, left + size, top + size], fill=tuple(random.integers(0, 200, 3)))
    Path("my_pictures", kind).mkdir(parents=True, exist_ok=True)
    picture.save(f"my_pictures/{kind}/{k}.png")


def show(images, title):
    plt.figure(figsize=(6, 2.2))
    plt.imshow(evaluation.image_grid(images, columns=8, zoom=2))
    plt.title(title)
    plt.axis("off")
    plt.show()


"""
## Reading it

Pictures of any format and size are read, and resized to `image_size`.
"""

pictures = data.image_folder("my_pictures", image_size=16)
print(f"{pictures.num_samples} pictures, {pictures.num_classes} classes")

"""
## A model that suits the data

`for_data` looks at the size and the number of the pictures and at this machine. It says what it
has chosen, and each choice can be overridden.
"""

model = presets.for_data(pictures, steps=STEPS)
model.fit(pictures, verbose=0)

"""
## Drawing
"""

labels = [0] * 8 + [1] * 8
show(model.generate(labels=labels, seed=0, verbose=0), "Discs, and squares")

"""
The colours are right, and the outlines are still rough: 600 steps are few. With `STEPS = None` the
run is as long as suits the data and the machine.

## Keeping it

The file is read on every backend, and `keras-uvit app pictures.keras` is a page in the browser that
draws with it. `keras_uvit.evaluation.report(model, pictures, "report")` says how good the pictures
are, and whether they are copies. `keras_uvit.training.Checkpoint` keeps a longer run.
"""

model.save("pictures.keras")
print(f"{Path('pictures.keras').stat().st_size / 1e6:.1f} MB")
