"""`python -m keras_uvit_cli` is `keras-uvit`."""

from keras_uvit_cli import main

main(prog_name="keras-uvit")
