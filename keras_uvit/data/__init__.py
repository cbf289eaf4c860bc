from keras_uvit.data import sources as sources
from keras_uvit.data.digits import digits as digits
from keras_uvit.data.images import image_folder as image_folder
