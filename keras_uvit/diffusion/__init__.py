from keras_uvit.diffusion import flow_map as flow_map
from keras_uvit.diffusion import predictions as predictions
from keras_uvit.diffusion import samplers as samplers
from keras_uvit.diffusion import schedules as schedules
from keras_uvit.diffusion import tables as tables
from keras_uvit.diffusion import weighting as weighting
from keras_uvit.diffusion.flow_map import FlowMap as FlowMap
