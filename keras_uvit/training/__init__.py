from keras_uvit.training.adapting import adapt as adapt
from keras_uvit.training.callbacks import Checkpoint as Checkpoint
from keras_uvit.training.checkpoints import load_checkpoint as load_checkpoint
from keras_uvit.training.model import DiffusionModel as DiffusionModel
from keras_uvit.training.optimizers import adamw as adamw
from keras_uvit.training.runs import train as train
