from keras_uvit.data.digits import digits as digits
