"""Makes the notebooks of their sources, and runs them.

    python notebooks/make.py [NAME ...]            writes and runs all, or those that are named
    python notebooks/make.py --small --out FOLDER  runs them in a minute, to see that they run

A source is a script in the format of keras-io: strings of their own are text, the first one is a
header, and all between them is code. So the script runs as it is, too. What stands in SMALLER is
another number with --small.
"""

import argparse
import ast
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SOURCES = {
    "first_steps": ROOT / "guides" / "train_a_diffusion_transformer.py",
    "own_pictures": ROOT / "notebooks" / "own_pictures.py",
    "text_to_image": ROOT / "notebooks" / "text_to_image.py",
}
INSTALL = """\
# On Colab, and wherever the package is not installed yet. A wheel serves as well as the repository.
import importlib.util

if importlib.util.find_spec("keras_uvit") is None:
    %pip install -q "keras-uvit[jax,data,demo,text] @ git+https://github.com/keras-uvit/keras-uvit"
"""
SMALLER = [(r"EPOCHS = \d+", "EPOCHS = 1"), (r"STEPS = \d+", "STEPS = 5"),
           (r"hidden_dim=\d+", "hidden_dim=16")]  # fmt: skip
MOST_BYTES = 1_000_000  # of a notebook with its pictures


def main():
    options = parse()
    for name in options.names or SOURCES:
        text = SOURCES[name].read_text(encoding="utf-8")
        for large, small in SMALLER if options.small else []:
            text = re.sub(large, small, text)
        notebook = executed(made(text))
        path = Path(options.out) / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise SystemExit(
                f"{path} has {size} bytes, more than {MOST_BYTES}: draw fewer pictures."
            )
        print(f"{path}: {size / 1000:.0f} kB")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*SOURCES, []], metavar="NAME")
    parser.add_argument("--small", action="store_true", help="few steps, narrow networks")
    parser.add_argument("--out", default=ROOT / "notebooks", help="folder to write into")
    return parser.parse_args()


def made(text):
    """The notebook of a source, without outputs."""
    cells = list(cells_of(text))
    (_, header), *rest = cells
    title, what = (
        re.search(rf"^{key}: (.*)$", header, re.M)[1] for key in ("Title", "Description")
    )
    new = nbformat.v4
    notebook = new.new_notebook(metadata={"language_info": {"name": "python"}})
    notebook.cells = [new.new_markdown_cell(f"# {title}\n\n{what}"), new.new_code_cell(INSTALL)]
    for kind, content in rest:
        make = new.new_markdown_cell if kind == "text" else new.new_code_cell
        notebook.cells.append(make(content))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # not a random one, which would differ each time
    return notebook


def cells_of(text):
    """(kind, content) of each cell: "text" for a string that is a statement, else "code"."""
    lines, done = text.splitlines(), 0
    for node in ast.parse(text).body:
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            code = "\n".join(lines[done : node.lineno - 1]).strip()
            if code:
                yield "code", code
            yield "text", node.value.value.strip()
            done = node.end_lineno
    code = "\n".join(lines[done:]).strip()
    if code:
        yield "code", code


def executed(notebook):
    """The notebook with its outputs; a cell that fails raises."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of day
        if cell.cell_type == "code":
            # What the backends say of the machine's devices is no part of the lesson.
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    main()
