"""U-ViT diffusion transformers for Keras 3."""

from keras_uvit import process as process
from keras_uvit.networks import UViT as UViT
from keras_uvit.training import DiffusionModel as DiffusionModel
