"""Frozen encoders between what people see and what the network sees."""

from keras_uvit.latent.autoencoder import AutoencoderKL as AutoencoderKL
from keras_uvit.latent.scale import fitting_scale as fitting_scale
from keras_uvit.latent.space_to_depth import SpaceToDepth as SpaceToDepth
from keras_uvit.latent.text import CLIPText as CLIPText
