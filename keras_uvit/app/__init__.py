"""A page in the browser to draw with models: `keras-uvit app`. It needs the extra `app`."""

from keras_uvit.app.web import page as page
from keras_uvit.app.web import serve as serve
