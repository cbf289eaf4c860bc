"""A page in the browser to draw with models: `keras-uvit app`. It needs the extra `app`."""

from keras_uvit.app.page import page as page
from keras_uvit.app.page import serve as serve
