"""Models by name, and models that suit a data set."""

from keras_uvit.presets.card import Card as Card
from keras_uvit.presets.loading import get as get
from keras_uvit.presets.loading import load as load
from keras_uvit.presets.loading import names as names
from keras_uvit.presets.own_data import for_data as for_data
from keras_uvit.presets.preset import FAST as FAST
from keras_uvit.presets.preset import Preset as Preset
from keras_uvit.presets.sharing import upload_preset as upload_preset
from keras_uvit.presets.table import PRESETS as PRESETS
