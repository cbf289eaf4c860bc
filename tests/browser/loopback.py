"""Runs `keras-uvit` where nothing but this machine can be reached, and notes what was tried.

    python loopback.py TRIED WORDS...

TRIED is a file that gets a line for each connection or look-up that was refused.
"""

import socket
import sys
from pathlib import Path

tried, *words = sys.argv[1:]
HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)


def refusing(function, host_of):
    def call(*arguments, **options):
        if host_of(arguments) not in HERE:
            with Path(tried).open("a", encoding="utf-8") as file:
                file.write(f"{host_of(arguments)}\n")
            raise OSError(f"{host_of(arguments)} is not this machine")
        return function(*arguments, **options)

    return call


def connected(arguments):
    """The host of an address; addresses of other kinds than IP are files of this machine."""
    address = arguments[1]
    return address[0] if isinstance(address, tuple) else "localhost"


socket.getaddrinfo = refusing(socket.getaddrinfo, lambda arguments: arguments[0])
socket.socket.connect = refusing(socket.socket.connect, connected)

from keras_uvit_cli import main  # noqa: E402

main(words, prog_name="keras-uvit")
