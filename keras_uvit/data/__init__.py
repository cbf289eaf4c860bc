from keras_uvit.data.digits import digits as digits
from keras_uvit.data.images import image_folder as image_folder
