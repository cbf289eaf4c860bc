"""On the PYTHONPATH of a child process: it starts in half the time.

Keras imports JAX under TensorFlow and PyTorch, TensorFlow to write a checkpoint, scikit-learn for
its wrappers, and matplotlib for its galleries, wherever they are installed. Here they are as if
they were not.
"""

import os
import sys

HEAVY = {"jax", "tensorflow", "sklearn", "matplotlib"} - {os.environ["KERAS_BACKEND"]}
sys.modules |= dict.fromkeys(HEAVY)
