"""Makes folder/ and folder.npz: a model's folder of one backend, and what the model drew there.

KERAS_BACKEND=jax PYTHONPATH=tests python tests/golden/make_folder.py
"""

from pathlib import Path

import numpy as np
from tiny import randomize, uvit

from keras_uvit import DiffusionModel
from keras_uvit.encoders import SpaceToDepth

HERE = Path(__file__).parent

model = DiffusionModel(
    uvit(image_shape=(4, 4, 4), num_classes=3),
    prediction="x0",
    latent_scale=(0.5, 1.0, 1.5, 2.0),
    latent_shift=(0.1, 0.0, -0.1, 0.2),
    sampler="dpm_solver_pp_2m",
    num_steps=4,
    guidance_scale=1.5,
    name="folder",
)
model.set_encoders(autoencoder=SpaceToDepth(2, scale=model.latent_scale, shift=model.latent_shift))
randomize(model.ema_network, scale=0.15)
model.ema_step.assign(7)
model.save_to_preset(HERE / "folder", data="none: random weights", license="apache-2.0")
what = dict(labels=range(3), seed=5)
latents = model.generate(**what, decode=False)
np.savez(HERE / "folder.npz", images=model.generate(**what), latents=latents)
