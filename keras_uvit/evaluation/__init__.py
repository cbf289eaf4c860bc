from keras_uvit.evaluation.callbacks import FIDCallback as FIDCallback
from keras_uvit.evaluation.callbacks import SampleGridCallback as SampleGridCallback
from keras_uvit.evaluation.cost import count_macs as count_macs
from keras_uvit.evaluation.cost import count_parameters as count_parameters
from keras_uvit.evaluation.files import image_grid as image_grid
from keras_uvit.evaluation.files import read_images as read_images
from keras_uvit.evaluation.files import write_npz as write_npz
from keras_uvit.evaluation.files import write_png as write_png
from keras_uvit.evaluation.files import write_pngs as write_pngs
from keras_uvit.evaluation.frechet import Reference as Reference
from keras_uvit.evaluation.frechet import frechet_distance as frechet_distance
from keras_uvit.evaluation.frechet import reference_statistics as reference_statistics

# from keras_uvit.evaluation.inception import InceptionFeatures as InceptionFeatures
from keras_uvit.evaluation.metrics import inception_score as inception_score
from keras_uvit.evaluation.metrics import precision_recall as precision_recall
from keras_uvit.evaluation.protocol import evaluate as evaluate
from keras_uvit.evaluation.protocol import fid as fid
from keras_uvit.evaluation.protocol import scores as scores
