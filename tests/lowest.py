"""Prints pip constraints that pin every package to the lowest version pyproject.toml allows.

    python tests/lowest.py > constraints.txt

`make test-lowest` installs exactly these. PyTorch is left out: the Makefile's TORCH says which of
its builds is installed.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))[
    "project"
]
bounds = dict.fromkeys(project["dependencies"])
for requirements in project["optional-dependencies"].values():
    bounds.update(dict.fromkeys(requirements))
for bound in bounds:
    match = re.fullmatch(r"([\w-]+)>=([\d.]+)(,.*)?", bound)
    if match and match[1] != "torch":
        print(f"{match[1]}=={match[2]}")
        if match[1] == "tensorflow":
            print(f"tensorflow-cpu=={match[2]}")
