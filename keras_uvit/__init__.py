"""U-ViT diffusion transformers for Keras 3."""

try:
    import keras as keras
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Keras could not start its backend ({error}). Choose an installed one before the first "
        "import: KERAS_BACKEND=jax, tensorflow or torch."
    ) from error

from keras_uvit import convert as convert
from keras_uvit import data as data
from keras_uvit import distribution as distribution
from keras_uvit import evaluation as evaluation
from keras_uvit import latent as latent
from keras_uvit import presets as presets
from keras_uvit import process as process
from keras_uvit.networks import UNet as UNet
from keras_uvit.networks import UViT as UViT
from keras_uvit.training import DiffusionModel as DiffusionModel

__version__ = "0.1.0"
