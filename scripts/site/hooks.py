"""What the site needs beside its pages: generated parts, and pages of the files that the pages link to.

The pages in ``docs`` are read on GitHub as well. So they link to source files as GitHub has them (``../src/...``), and
what is generated stands there as a comment: ``<!-- keys -->`` is every configuration key, ``<!-- api NAME -->`` the
docstrings of a module or class.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import keys  # beside this file; MkDocs looks there while it loads a hook
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]*)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".cff": "yaml"}
LONGEST = 60_000  # characters of a file that is shown


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every file and folder outside of ``docs`` that a page links to."""
    wanted: set[str] = set()
    for page in [f for f in files if f.src_uri.endswith(".md")]:
        for link in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            wanted |= {target} if (target := outside(page.src_uri, link)) is not None else set()
    for target in sorted(wanted):
        if (ROOT / target).exists():  # else MkDocs tells of the link
            files.append(File.generated(config, place(target), content=shown(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in what is generated, and lead links out of ``docs`` to the pages made of their files."""
    source = page.file.src_uri
    if source.startswith("source/"):
        return markdown

    def leads(match: re.Match[str]) -> str:
        target = outside(source, match[1])
        return match[1] if target is None else posixpath.relpath(place(target), posixpath.dirname(source))

    markdown = LINK.sub(leads, markdown)
    if "<!-- keys -->" in markdown:
        markdown = markdown.replace("<!-- keys -->", keys.page())
    return re.sub(r"<!-- api (\S+) -->", r"::: \1", markdown)


def outside(source: str, link: str) -> str | None:
    """Where a page's link leads, from the repository's root; None inside of ``docs``."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link))
    return None if target == "docs" or target.startswith("docs/") else target


def place(target: str) -> str:
    """The page of a file or folder."""
    return f"source/{target}.md"


def shown(target: str) -> str:
    """A file's text, or a folder's files with the first line of each docstring."""
    path = ROOT / target
    head = f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n"
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return head + "\n".join(f"- `{p.relative_to(path).as_posix()}`{_first_line(p)}" for p in names) + "\n"
    if path.suffix == ".ipynb":
        return f"{head}A notebook: open `{target}` of the repository in Jupyter.\n"
    text = path.read_text(encoding="utf-8")[:LONGEST]
    if path.suffix == ".md":
        here = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)  # its links are those of its own folder
        return head.partition("# ")[0] + here
    return f"{head}~~~~{LANGUAGES.get(path.suffix, 'text')}\n{text}\n~~~~\n"


def _first_line(path: Path) -> str:
    match = re.match(r'r?"""(.*?)(?:"""|\n)', path.read_text(encoding="utf-8")) if path.suffix == ".py" else None
    return f": {match[1]}" if match and match[1] else ""
