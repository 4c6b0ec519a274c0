"""The notebooks run from end to end, on the smallest networks, and are committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from panoptic_ibs.coco_writer import PanopticWriter
from panoptic_ibs.data.dataset import make_target
from panoptic_ibs.interactive import data_module, override, run
from panoptic_ibs.segments import Prediction

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("start", "embeddings", "browse_errors", "own_data")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the notebooks are not in this installation")


def executed(content: dict[str, Any]) -> list[str]:
    """Names of the cells that hold an output or an execution count."""
    return [c["id"] for c in content["cells"] if c.get("outputs") or c.get("execution_count") is not None]


def test_there_are_four() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stripped(name: str) -> None:
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert executed(content) == []
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]  # and the test can fail
    code[0]["execution_count"] = 1
    code[1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    assert executed(content) == [code[0]["id"], code[1]["id"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working directory for all, away from the repository: the second notebook finds the runs of the first."""
    return tmp_path_factory.mktemp("elsewhere")


def execute(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, parameters: str = "") -> tuple[Any, int]:
    """Run a notebook in quick mode; the variable RESULTS at its end, and the number of figures it drew."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs the notebooks: pip install '.[notebooks]'")
    nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebooks: pip install '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="ipykernel runs the notebooks' cells: pip install '.[notebooks]'")
    monkeypatch.setenv("PANOPTIC_IBS_QUICK", "1")
    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(place / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(place / "ipython"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(parameters))
    dump = "import json; json.dump(RESULTS, open('results.json', 'w'))"
    notebook.cells.append(nbformat.v4.new_code_cell(dump))
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(place)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    return json.loads((place / "results.json").read_text()), figures


@pytest.mark.slow
def test_embeddings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, figures = execute("embeddings", place, monkeypatch, "PAIRS = 2")
    assert set(results) == {"without IBS", "with IBS"}
    assert results["without IBS"] != results["with IBS"]
    for row in results.values():
        assert row["things"] > 0
        assert row["IBS loss"] > 0
        assert 0 < row["own mask"] < 1
        assert 0 < row["other crops"] < 1
    assert figures == 3  # similarity, principal components, nearest instances


@pytest.fixture
def run_without_ibs(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the notebook on embeddings leaves, or would leave if it did not run before."""
    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(place / "cache"))
    runs = place / "runs" / "notebooks_quick"
    if not (runs / "panoptic_fcn_paired_seed0" / "metrics.json").is_file():
        run("train", "-m", "experiment=lots", "debug=notebooks", "ibs=none,paired", override("run_dir", runs))
    return runs / "panoptic_fcn_none_seed0"


@pytest.mark.slow
def test_browse_errors(place: Path, run_without_ibs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known errors take the place of the run's: all things of an image are in one prediction."""
    reader = data_module("experiment=lots", "debug=notebooks").reader("val")
    writer = PanopticWriter(run_without_ibs / "predictions", reader.classes, reader.integer_ids)
    confused = predicted = 0
    for index in range(len(reader)):
        target = make_target(reader.read_id_map(index), reader, index, min_pixels=0)
        is_thing = torch.cat([torch.tensor([False]), target.is_thing])[target.id_map.long()]
        classes = torch.tensor([reader.classes.thing_ids[0]])
        writer.add(Prediction(is_thing.short(), classes, torch.ones(1), target.image_id))
        predicted += bool(is_thing.any())
        confused += int((target.is_thing & ~target.is_crowd).sum()) > 1
    writer.close()
    assert confused
    results, figures = execute("browse_errors", place, monkeypatch)
    assert results["num_images"] == len(reader)
    assert results["confusion"]["25"] == pytest.approx(confused / predicted)
    assert figures == 1


@pytest.mark.slow
def test_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, figures = execute("start", tmp_path, monkeypatch)
    assert results["images"] == 2
    assert figures == 1
    assert (tmp_path / "runs" / "start" / "metrics.json").is_file()


@pytest.mark.slow
def test_own_data(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, figures = execute("own_data", place, monkeypatch)
    assert set(results["per_class"]) == {"sand", "grass", "pebble", "stick"}
    assert results["num_images"] == 2
    assert figures == 1
