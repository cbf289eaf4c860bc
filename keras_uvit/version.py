"""The version, in a file of its own: `keras-uvit --version` reads it without starting Keras."""

__version__ = "0.1.0"
