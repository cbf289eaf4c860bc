from keras_uvit.networks.uvit import UViT as UViT
