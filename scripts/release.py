"""Check that a release can be made, and build it: ``make release``.

python scripts/release.py check    a clean tree, a new version, its entry in CHANGELOG.md, a sound CITATION.cff
python scripts/release.py build    dist/: the source archive, and the wheel built from it; what they hold is compared
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r'^__version__ = "(\d+\.\d+\.\d+)"$', re.MULTILINE)


def version(root: Path) -> str:
    """The version, from the one place where it stands.

    Raises:
        SystemExit: it is none of three numbers.
    """
    file = root / "src" / "panoptic_ibs" / "__init__.py"
    found = VERSION.search(file.read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f'{file}: give __version__ = "MAJOR.MINOR.PATCH".')
    return found[1]


def faults(root: Path) -> list[str]:
    """What stands in the way of a release of this checkout; empty if nothing does."""
    number, found = version(root), []
    if changed := _git(root, "status", "--porcelain"):
        found.append(f"The tree is not clean; commit or remove:\n{changed}")
    if _git(root, "tag", "--list", f"v{number}"):
        found.append(f"v{number} is tagged already: raise __version__ in src/panoptic_ibs/__init__.py.")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (.*)$", changes, re.MULTILINE)
    if first is None or not re.fullmatch(rf"{re.escape(number)} - \d{{4}}-\d\d-\d\d", first[1]):
        found.append(f'CHANGELOG.md: its first entry must be "## {number} - YYYY-MM-DD", with what has changed.')
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    if missing := {"cff-version", "message", "title", "authors"} - set(citation):
        found.append(f"CITATION.cff lacks {', '.join(sorted(missing))}.")
    if "version" in citation:
        found.append("CITATION.cff names a version; it stands in src/panoptic_ibs/__init__.py alone.")
    return found


def build(root: Path) -> list[Path]:
    """Build the source archive, and the wheel from the archive, so that it is shown to be whole.

    Raises:
        SystemExit: the wheel lacks a file of the package or of the configurations.
    """
    number, dist = version(root), root / "dist"
    _hatchling(root, "sdist", dist)
    archive = dist / f"panoptic_ibs-{number}.tar.gz"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        _hatchling(Path(folder) / f"panoptic_ibs-{number}", "wheel", dist)
    wheel = dist / f"panoptic_ibs-{number}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = _git(root, "ls-files", "src/panoptic_ibs", "conf").splitlines()
    wanted = {f"panoptic_ibs/{n}" if n.startswith("conf/") else n.removeprefix("src/") for n in tracked}
    if lost := sorted(wanted - inside):
        raise SystemExit(f"{wheel}: lacks {', '.join(lost)}.")
    return [archive, wheel]


def _hatchling(folder: Path, target: str, dist: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(dist)]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def main(words: list[str]) -> int:
    """Entry point; returns the exit status."""
    if words == ["check"]:
        if found := faults(ROOT):
            print("\n".join(found), file=sys.stderr)
            return 1
        print(f"{version(ROOT)} can be released: the tree is clean, CHANGELOG.md has its entry.")
        return 0
    if words == ["build"]:
        print(*build(ROOT), sep="\n")
        print(f"Publish them, then: git tag v{version(ROOT)}")
        return 0
    print((__doc__ or "").strip())
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
