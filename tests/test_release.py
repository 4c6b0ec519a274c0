"""What stands in the way of a release is said; what is built is whole."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import panoptic_ibs

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    """``scripts/release.py``."""
    spec = importlib.util.spec_from_file_location("release", REPOSITORY / "scripts" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository that can be released."""
    root = tmp_path / "checkout"
    (root / "src" / "panoptic_ibs").mkdir(parents=True)
    (root / "conf").mkdir()
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "src/panoptic_ibs/__init__.py",
    ):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "conf" / "config.yaml").write_text("seed: 0\n")
    (root / ".gitignore").write_text("dist/\n")
    _git(root, "init", "--quiet")
    _commit(root)
    return root


def _git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def _commit(root: Path) -> None:
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", "all")


def test_this_version_has_its_entry(release: ModuleType, checkout: Path) -> None:
    assert release.version(REPOSITORY) == panoptic_ibs.__version__
    assert release.faults(checkout) == []


def test_what_stands_in_the_way(release: ModuleType, checkout: Path) -> None:
    _git(checkout, "tag", f"v{panoptic_ibs.__version__}")
    (checkout / "left.txt").write_text("")
    (tree, tag) = release.faults(checkout)
    assert "left.txt" in tree
    assert "is tagged already: raise __version__" in tag
    code = checkout / "src" / "panoptic_ibs" / "__init__.py"
    code.write_text(code.read_text().replace(f'"{panoptic_ibs.__version__}"', '"99.1.0"'))
    citation = yaml.safe_load((checkout / "CITATION.cff").read_text())
    (checkout / "CITATION.cff").write_text(yaml.safe_dump({"title": citation["title"], "version": "1"}))
    _commit(checkout)
    changes, lacks, number = release.faults(checkout)
    assert 'its first entry must be "## 99.1.0 - YYYY-MM-DD"' in changes
    assert lacks == "CITATION.cff lacks authors, cff-version, message."
    assert "names a version" in number
    code.write_text("")
    with pytest.raises(SystemExit, match="__version__"):
        release.faults(checkout)


def test_the_wheel_is_built_from_the_archive(release: ModuleType, checkout: Path) -> None:
    pytest.importorskip("hatchling")
    archive, wheel = release.build(checkout)
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "conf/config.yaml", "LICENSE"} <= names
    assert wheel.name == f"panoptic_ibs-{panoptic_ibs.__version__}-py3-none-any.whl"
    (checkout / "conf" / "lost.yaml").write_text("")
    _git(checkout, "add", "--all")
    settings = checkout / "pyproject.toml"
    settings.write_text(settings.read_text().replace("[tool.ruff]", 'exclude = ["lost.yaml"]\n[tool.ruff]', 1))
    with pytest.raises(SystemExit, match=r"lacks panoptic_ibs/conf/lost\.yaml"):
        release.build(checkout)
