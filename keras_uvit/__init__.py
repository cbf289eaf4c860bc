"""U-ViT diffusion transformers for Keras 3."""

try:
    import keras as keras
except (ImportError, ValueError) as error:  # Keras raises ValueError for an unknown name
    raise ImportError(
        f"Keras could not start its backend ({error}). Choose an installed one before Keras "
        "is imported: KERAS_BACKEND=jax, tensorflow or torch.\n"
        'To install one: pip install "keras-uvit[jax]", or [tensorflow] or [torch]. For PyTorch '
        "on a CPU first: pip install torch --index-url https://download.pytorch.org/whl/cpu"
    ) from error

from keras_uvit import app as app
from keras_uvit import convert as convert
from keras_uvit import data as data
from keras_uvit import diffusion as diffusion
from keras_uvit import distribution as distribution
from keras_uvit import encoders as encoders
from keras_uvit import evaluation as evaluation
from keras_uvit import presets as presets
from keras_uvit.networks import UNet as UNet
from keras_uvit.networks import UViT as UViT
from keras_uvit.training import DiffusionModel as DiffusionModel
from keras_uvit.version import __version__ as __version__
