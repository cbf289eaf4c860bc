"""What a user does first, with the installed wheel: README's lines under "Sample".

`make test-wheel` runs it in a clean environment and another folder, where only the wheel is.
"""

import re
import subprocess
import sys
from pathlib import Path

readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
sample = re.search(r"## Sample\n.*?```python\n(.*?)```", readme, re.S)[1]
exec(compile(sample, "README.md", "exec"))

import keras_uvit  # noqa: E402

place = Path(keras_uvit.__file__)
if not place.is_relative_to(sys.prefix):
    sys.exit(f"This is to test the installed wheel, and Python imported {place}.")
drawn = Path("digits.png")
if not drawn.read_bytes().startswith(b"\x89PNG"):
    sys.exit(f"{drawn.absolute()} is not a PNG file.")
command = Path(sys.executable).with_name("keras-uvit")
subprocess.run([command, "--version"], check=True)
print(f"The wheel in {place.parent} draws: {drawn.absolute()}")
