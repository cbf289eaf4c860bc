from keras_uvit.evaluation.cost import count_macs as count_macs
from keras_uvit.evaluation.cost import count_parameters as count_parameters
from keras_uvit.evaluation.fid import frechet_distance as frechet_distance
