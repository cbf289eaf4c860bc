from keras_uvit.networks.own import OwnNetwork as OwnNetwork
from keras_uvit.networks.transferring import transfer as transfer
from keras_uvit.networks.unet import UNet as UNet
from keras_uvit.networks.uvit import UViT as UViT
