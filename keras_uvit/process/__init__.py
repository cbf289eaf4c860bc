from keras_uvit.process import predictions as predictions
from keras_uvit.process import samplers as samplers
from keras_uvit.process import schedules as schedules
from keras_uvit.process import weighting as weighting
