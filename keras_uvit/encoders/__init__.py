"""Frozen encoders between what people see and what the network sees."""

from keras_uvit.encoders.adapters import CustomAutoencoder as CustomAutoencoder
from keras_uvit.encoders.autoencoder import AutoencoderKL as AutoencoderKL
from keras_uvit.encoders.scale import fitting_scale as fitting_scale
from keras_uvit.encoders.space_to_depth import SpaceToDepth as SpaceToDepth
from keras_uvit.encoders.text import CLIPText as CLIPText
