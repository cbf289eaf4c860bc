"""What the site adds to docs/: pages from elsewhere in the repository, and links there.

Links are written so that they work where the files lie, as on GitHub: `../benchmarks/README.md`.
Here they become links to a page of the site, or to the repository.
"""

import re
import sys
from pathlib import Path

import click
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/keras-uvit/keras-uvit/blob/main"
# Files outside docs/ that are pages of the site.
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved(source)))
    files.append(File.generated(config, "reference/command_line.md", content=_command_line()))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by:
        return markdown
    return _linked(markdown, Path("docs") / page.file.src_uri, page.file.src_uri.count("/"))


def _moved(source):
    return _linked((ROOT / source).read_text(encoding="utf-8"), Path(source), 0)


def _linked(markdown, source, depth):
    """The text of a file of the repository, with links as they are on the site."""

    def link(match):
        begin, target, end = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (ROOT / source.parent / target).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            target = "../" * depth + PAGES[path]
        elif path.startswith("docs/"):
            target = "../" * depth + path.removeprefix("docs/")
        else:
            target = f"{REPOSITORY}/{path}"
        return f"{begin}{target}{end}"

    return LINK.sub(link, markdown)


def _command_line():
    """The help of each command, as `keras-uvit COMMAND --help` prints it."""
    sys.path.insert(0, str(ROOT))
    from keras_uvit_cli import main  # imports click, but neither Keras nor keras_uvit

    parts = [
        "# Command line\n",
        "`keras-uvit` is installed with the package. What follows is the help of each command.\n",
    ]
    width = {"terminal_width": 98, "max_content_width": 98}
    whole = click.Context(main, info_name="keras-uvit", **main.context_settings, **width)
    contexts = [click.Context(part, whole, name, **width) for name, part in main.commands.items()]
    for context in [whole, *contexts]:
        help_text = context.command.get_help(context)
        parts.append(f"## {context.command_path}\n\n```text\n{help_text}\n```\n")
    return "\n".join(parts)
