"""
Title: Train a diffusion transformer
Author: the keras_uvit authors
Date created: 2026/12/01
Last modified: 2026/12/01
Description: A U-ViT learns to draw handwritten digits, on JAX, TensorFlow or PyTorch.
Accelerator: None
"""

"""
## Introduction

A diffusion model learns to remove noise from images. To draw, it begins with nothing but noise and
removes it, little by little. [U-ViT](https://arxiv.org/abs/2209.12152) is a vision transformer that
does this: time, class and the patches of the noisy image are all tokens, and long skips join its
shallow blocks with its deep ones, as in a U-Net.

In this guide we train a small one on the 1,797 handwritten digits that come with scikit-learn. We
draw digits of each class with it, measure how many of them can be read, complete a half of one, and
save the model. All of it takes about four minutes on a CPU with JAX.
"""

"""
## Setup

`keras_uvit` is a Keras 3 package. The same code runs on each backend.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.svm import SVC

from keras_uvit import DiffusionModel, UViT, data, evaluation, training
from keras_uvit.diffusion.schedules import VPCosine

EPOCHS = 60
BATCH_SIZE = 64

keras.utils.set_random_seed(0)

"""
## The data

Images are `uint8` in [0, 255] with their channels last, and labels are integers. The model brings
them to [-1, 1] itself.
"""

train, test = data.digits("train"), data.digits("test")
print({name: (array.shape, array.dtype) for name, array in train.items()})


def show(images, title):
    plt.figure(figsize=(6, 2.5))
    plt.imshow(evaluation.image_grid(images, columns=10), cmap="gray", vmin=0, vmax=255)
    plt.title(title)
    plt.axis("off")
    plt.show()


show(train["image"][:20], "Real digits")

"""
## The network

An 8x8 image in patches of 2x2 is 16 tokens. Two more tokens tell the network the time and the
class. It is an ordinary functional Keras model: `network.summary()` shows each block and each long
skip.
"""

network = UViT(
    image_shape=(8, 8, 1),
    patch_size=2,
    hidden_dim=80,
    num_layers=5,
    num_heads=4,
    num_classes=10,
    position="sinusoidal",
    init="balanced",  # the published initial weights suit networks ten times as wide
)
print(f"{network.count_params():,} weights")

"""
## The diffusion model

At time t an image is `alpha(t) * image + sigma(t) * noise`: the image itself at t = 0, and noise
alone at t = 1. Let us look at one digit on its way.
"""

model = DiffusionModel(
    network, VPCosine(), prediction="v", ema_decay=0.999, guidance_scale=1.2, seed=0
)
schedule = model.objective.schedule
times = np.linspace(0.0, 1.0, 10)
noise = np.random.default_rng(0).standard_normal((8, 8, 1))
digit = train["image"][0] / 127.5 - 1.0
noisy = np.stack([schedule.alpha(t) * digit + schedule.sigma(t) * noise for t in times])
show(np.clip((noisy + 1.0) * 127.5, 0, 255).astype("uint8"), "A digit from t = 0 to t = 1")

"""
The network sees such an image and its time, and predicts `v = alpha(t) * noise - sigma(t) * image`,
from which both the noise and the image follow. The loss is the mean squared error of the
prediction, at a time that is drawn for each image. For one image in ten the class is replaced by
"no class", so that the model also learns to draw without one: guidance needs that below.

## Training

The learning rate rises for a thirtieth of the run, and then falls to zero by its end.
"""

optimizer = training.adamw(
    learning_rate=2e-3, beta_1=0.9, beta_2=0.99, warmup_steps=1 / 30, decay_steps="run"
)
model.compile(optimizer)
history = model.fit(train, epochs=EPOCHS, batch_size=BATCH_SIZE, verbose=0)

plt.figure(figsize=(6, 3))
plt.plot(history.history["loss"])
plt.xlabel("epoch")
plt.ylabel("mean squared error")
plt.yscale("log")
plt.show()

"""
The loss falls quickly, and then slowly for long. The images go on getting better all the while:
look at samples rather than at the loss.

## Drawing

`generate` begins with noise and takes 25 steps of DPM-Solver++ by default. It draws with a moving
average of the weights, which is better than the weights of the last step.
"""

labels = np.arange(20) % 10
images = model.generate(labels=labels, seed=0, verbose=0)
show(images, "Drawn digits")

"""
Guidance leads the drawing away from what the model would draw without a class. A scale of 1 turns
it off. A larger one makes digits that are more typical, and more alike.
"""

for scale in (1.0, 4.0):
    images = model.generate(labels=labels, guidance_scale=scale, seed=0, verbose=0)
    show(images, f"Guidance {scale}")

"""
## Measuring

A classifier that has learned from real digits reads the drawn ones. How often does it see the class
that we asked for? Real test digits show how good the classifier itself is.
"""


def flat(images):
    return images.reshape(len(images), -1) / 255.0


classifier = SVC(C=10).fit(flat(train["image"]), train["label"])
labels = np.arange(200) % 10
images = model.generate(labels=labels, seed=1, verbose=0)
print(f"Real test digits: {classifier.score(flat(test['image']), test['label']):.3f}")
print(f"Drawn digits:     {classifier.score(flat(images), labels):.3f}")

"""
## Completing a picture

The mask is 1 where the model draws. The rest of the picture is kept as it is.
"""

mask = np.zeros((8, 8))
mask[4:] = 1
scans, classes = test["image"][:10], test["label"][:10]
completed = model.generate(labels=classes, image=scans, mask=mask, resamples=4, verbose=0)
show(np.concatenate([scans, completed]), "Real digits, and their lower halves drawn again")

"""
## Saving

The file has the network, its moving average and the optimizer. It is read on every backend.
"""

model.save("digits.keras")
again = keras.saving.load_model("digits.keras")
first, second = (m.generate(labels=[7], seed=0, verbose=0) for m in (model, again))
print(f"The loaded model draws the same digit: {(first == second).all()}")

"""
## What comes next

* `keras_uvit.presets.for_data` chooses the network and the length of the run for your own pictures.
* `keras_uvit.training.Checkpoint` keeps a run that may be stopped at any moment.
* A model of latents draws larger images, and a text encoder makes it read prompts.
* `keras-uvit app` is a page in the browser on which you draw with your model.
"""
