"""On the PYTHONPATH of a child process: it starts in half the time.

Keras imports JAX under TensorFlow and PyTorch, TensorFlow to write a checkpoint, and scikit-learn
for its wrappers, wherever they are installed. Here they are as if they were not.
"""

import os
import sys

HEAVY = {"jax", "tensorflow", "sklearn"} - {os.environ["KERAS_BACKEND"]}
sys.modules |= dict.fromkeys(HEAVY)
