from keras_uvit.sampling.generate import Job as Job
from keras_uvit.sampling.generate import draw as draw
from keras_uvit.sampling.generate import prepare as prepare
from keras_uvit.sampling.options import SamplingOptions as SamplingOptions
from keras_uvit.sampling.options import resolve as resolve
