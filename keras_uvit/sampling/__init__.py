"""From noise to images: options, conditions, guidance, pictures to start from, the loop."""

from keras_uvit.sampling.export import export_sampler as export_sampler
from keras_uvit.sampling.generate import Job as Job
from keras_uvit.sampling.generate import draw as draw
from keras_uvit.sampling.generate import prepare as prepare
from keras_uvit.sampling.generate import prepare_inversion as prepare_inversion
from keras_uvit.sampling.guidance import APG as APG
from keras_uvit.sampling.guidance import AutoGuidance as AutoGuidance
from keras_uvit.sampling.guidance import Guidance as Guidance
from keras_uvit.sampling.guidance import Rescale as Rescale
from keras_uvit.sampling.options import SamplingOptions as SamplingOptions
from keras_uvit.sampling.options import resolve as resolve
