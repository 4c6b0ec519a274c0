"""What ``import panoptic_ibs`` offers: light, typed, and as the commands do; the page docs/python.md runs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image

import panoptic_ibs
from cli_helpers import run
from panoptic_ibs import processes, segments
from panoptic_ibs.api import RunError
from panoptic_ibs.classes import ClassInfo, ClassTable
from panoptic_ibs.errors import ConfigError, DataError, UserError

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
DATA = {"synthetic": {"num_train": 4, "num_val": 2, "size": [96, 192]}}
TINY: dict[str, Any] = {
    "debug": "fast", "head": {"channels": 16, "feature_channels": 16, "depth": 1}, "evaluation": {"baselines": False},
    "data.presets.crop_size": (64, 96), "callbacks": {"progress": None, "pictures": None}, "trainer.max_steps": 1,
    "optim.lr": 1e-3, "backbone": "tiny",
}  # fmt: skip
TYPED = (
    "debug=fast", "head.channels=16", "head.feature_channels=16", "head.depth=1", "evaluation.baselines=false",
    "data.presets.crop_size=[64,96]", "callbacks.progress=null", "callbacks.pictures=null", "trainer.max_steps=1",
    "optim.lr=1e-3", "backbone=tiny", "data.synthetic.num_train=4", "data.synthetic.num_val=2",
    "data.synthetic.size=[96,192]",
)  # fmt: skip
CLASSES = ClassTable([ClassInfo("road", 7, False, (128, 64, 128)), ClassInfo("car", 26, True, (0, 0, 142))])


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run from Python; its folder's name is one that Hydra's grammar would not take."""
    with contextlib.redirect_stdout(io.StringIO()):
        return panoptic_ibs.fit(data=DATA, run_dir=tmp_path_factory.mktemp("runs") / "2024_05, [1] 'x'", **TINY)


# --- names


def test_importing_is_light_and_every_name_is_there() -> None:
    code = (
        "import sys, panoptic_ibs; heavy = {'torch', 'hydra', 'numpy', 'lightning', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy; assert set(panoptic_ibs.__all__) <= set(dir(panoptic_ibs)); "
        "print([getattr(panoptic_ibs, n).__name__ for n in panoptic_ibs.__all__ if n != '__version__'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [
        "Head", "IntraBatchSupervision", "PanopticDataModule", "PanopticMetrics", "PanopticTask", "Prediction",
        "SegmentEmbeddings", "build_model", "fit", "load", "push", "score_files",
    ]  # fmt: skip
    assert done.stdout.strip() == str(names)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        panoptic_ibs.lod  # noqa: B018


def test_type_checkers_see_the_types() -> None:
    source = Path(panoptic_ibs.__file__)
    (block,) = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imported = {name.name: f"panoptic_ibs.{line.module}" for line in block.body for name in line.names}  # type: ignore[attr-defined]
    assert {*imported, "__version__"} == set(panoptic_ibs.__all__)
    for name, module in imported.items():
        assert getattr(importlib.import_module(module), name) is getattr(panoptic_ibs, name)
    assert (source.parent / "py.typed").is_file()
    assert typing.get_type_hints(panoptic_ibs.score_files)["return"] == dict[str, Any]


# --- fit


def test_fit_gives_the_numbers_of_the_command(fitted: Any, tmp_path: Path) -> None:
    result = run("train", *TYPED, f"run_dir={tmp_path / 'typed'}")
    assert result.code == 0, result.err
    theirs = json.loads((tmp_path / "typed" / "metrics.json").read_text())
    told = ("command", "config")
    assert {k: v for k, v in fitted.metrics.items() if k not in told} == {
        k: v for k, v in theirs.items() if k not in told
    }
    places = ("run_dir",)
    configs = [{k: v for k, v in m["config"].items() if k not in places} for m in (fitted.metrics, theirs)]
    assert configs[0] == configs[1]
    ours = torch.load(fitted.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    other = torch.load(tmp_path / "typed" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, other[name]) for name, value in ours.items())
    assert (fitted.run_dir / "report" / "index.html").is_file()
    assert "optim.lr=0.001" in fitted.metrics["command"]


def test_fit_leaves_no_trace(tmp_path: Path) -> None:
    before = (list(sys.argv), warnings.formatwarning, list(warnings.filters), HydraConfig.instance().cfg)
    with pytest.raises(UserError, match=r"2024_05 \(1\)"):
        panoptic_ibs.fit(
            "cityscapes", run_dir=tmp_path / "run", trainer="cpu", **{"data.root": tmp_path / "2024_05 (1)"}
        )
    assert (list(sys.argv), warnings.formatwarning, list(warnings.filters), HydraConfig.instance().cfg) == before
    assert not GlobalHydra.instance().is_initialized()


def test_a_run_gives_its_model(fitted: Any) -> None:
    assert fitted.run_dir.name == "2024_05, [1] 'x'"
    pixels = np.zeros((64, 96, 3), np.uint8)
    (prediction,) = fitted.model.predict(pixels)
    assert isinstance(prediction, panoptic_ibs.Prediction)
    assert prediction.classes == fitted.model.classes
    (fitted.run_dir / "checkpoints" / "last.ckpt").rename(fitted.run_dir / "kept.ckpt")
    try:
        with pytest.raises(UserError, match=r"last\.ckpt: the run has no checkpoint"):
            _ = type(fitted)(fitted.run_dir).model
    finally:
        (fitted.run_dir / "kept.ckpt").rename(fitted.run_dir / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainr": {"max_steps": 1}}, "fit(trainr=...): there is no such name; did you mean trainer?"),
        ({"xyz": 1}, "fit(xyz=...): there is no such name; there are backbone, callbacks, ckpt_path"),
        ({"trainer": {"max_step": 1}}, "did you mean trainer.max_steps?"),
        ({"head": "panoptic_fnc"}, "head=panoptic_fnc: there is no such option; choose one of cascade_upsnet"),
        ({"head": {"channels": "16"}}, 'head.channels is "16"; expected: a whole number'),
        ({"seed": float("nan")}, "fit(seed=...) is nan; give a finite number"),
        ({"optim.lr": object}, "fit(optim.lr=...) is <class 'object'>; give a finite number"),
        ({"sweep": "table2_ibs"}, "fit(sweep=...): one run alone; sweeps are started on the command line."),
        ({"data": 5}, "fit(data=...) is 5; give an option's name, or a mapping of keys."),
        ({"~head": "x"}, "fit(~head=...): there is no such name; did you mean head?"),
        (
            {"weigh": "uncertainty", "weigh.groups": {"a": ["nothing"]}},
            "weigh.groups.a: the head has no loss term nothing",
        ),
        ({"hydra": {"mode": "MULTIRUN"}}, "fit(hydra=...): one run alone"),
        ({"packages": "nowhere_at_all"}, "packages=nowhere_at_all: the package cannot be imported"),
        ({"ibs": "random", "sampling": "random_crop", "sampling.batch_size": 1}, "needs at least 2 crops a device"),
    ],
)
def test_what_fit_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"data": DATA, "run_dir": tmp_path / "run", "debug": "fast", **arguments}
    with pytest.raises(UserError) as caught:
        panoptic_ibs.fit(**arguments)
    assert message in str(caught.value)


def test_several_devices_are_started_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(processes, "supervise", lambda module, arguments, *_: seen.append((module, arguments)) or 2)
    several = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    with pytest.raises(RunError, match="training ended with status 2; its message stands above"):
        panoptic_ibs.fit(data=DATA, run_dir=tmp_path / "it's", **{**TINY, "trainer": several})
    ((module, arguments),) = seen
    assert module == "panoptic_ibs.train"
    assert "trainer.devices=2" in arguments
    assert f"run_dir='{tmp_path}/it\\'s'" in arguments


def test_a_script_without_a_guard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Put the call under if __name__ == '__main__':"):
        exec("import panoptic_ibs\npanoptic_ibs.fit()", {"__name__": "__mp_main__"})


# --- predictions


@pytest.fixture
def prediction() -> Any:
    id_map = torch.tensor([[1, 1, 2], [1, 0, 2]], dtype=torch.uint8)
    found = (id_map, torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    return panoptic_ibs.Prediction(*found, image_id="a/b", classes=CLASSES)


SEGMENTS = [
    {"id": 1, "category_id": 7, "area": 3, "bbox": [0, 0, 2, 2], "iscrowd": 0, "score": 1.0},
    {"id": 2, "category_id": 26, "area": 2, "bbox": [2, 0, 1, 2], "iscrowd": 0, "score": 0.5},
]


def test_a_prediction_in_coco_format(prediction: Any, tmp_path: Path) -> None:
    entry = prediction.to_coco()
    assert (entry["image_id"], entry["segments_info"]) == ("a/b", SEGMENTS)
    path = prediction.save(tmp_path)
    written = json.loads(path.read_text())
    assert written["annotations"] == [entry]
    assert written["categories"] == CLASSES.to_coco()
    png = np.asarray(Image.open(tmp_path / "panoptic" / entry["file_name"]))
    assert png[..., 0].tolist() == prediction.id_map.tolist()
    assert not list(tmp_path.glob(".partial*"))


def test_saving_keeps_the_other_images(prediction: Any, tmp_path: Path) -> None:
    prediction.save(tmp_path)
    prediction.save(tmp_path, name="second")
    prediction.class_ids = torch.tensor([1, 1])
    path = prediction.save(tmp_path)
    first, second = json.loads(path.read_text())["annotations"]
    assert [s["category_id"] for s in first["segments_info"]] == [26, 26]
    assert second == {"image_id": "second", "file_name": "second.png", "segments_info": SEGMENTS}
    assert len(list((tmp_path / "panoptic").iterdir())) == 2
    prediction.classes = ClassTable([*CLASSES.classes, ClassInfo("tree", 1, False, (0, 1, 0))])
    before = path.read_bytes()
    for content in (before, b"{}", b"[", b'{"info": {"program": "other"}}'):
        path.write_bytes(content)
        with pytest.raises(DataError, match="other classes, or is damaged"):
            prediction.save(tmp_path)
        assert path.read_bytes() == content
        assert not list(tmp_path.glob(".partial*"))


def test_a_prediction_draws_itself(prediction: Any) -> None:
    drawn = prediction.plot()
    assert drawn.size == (3, 2)
    assert drawn.getpixel((0, 0)) != drawn.getpixel((2, 0))
    image = np.full((2, 3, 3), 250, np.uint8)
    on_image = prediction.plot(image)
    assert np.asarray(on_image).mean() > np.asarray(drawn).mean()
    assert on_image.tobytes() == prediction.plot(Image.fromarray(image)).tobytes()
    with pytest.raises(ValueError, match="uint8"):
        prediction.plot(image.astype(float))
    with pytest.raises(ValueError, match=r"."):
        prediction.plot(image[:1])


def test_a_prediction_without_what_it_needs(prediction: Any, tmp_path: Path) -> None:
    prediction.image_id = ""
    with pytest.raises(DataError, match="no image_id"):
        prediction.save(tmp_path / "p")
    prediction.classes = None
    for call in (prediction.to_coco, prediction.plot, lambda: prediction.save(tmp_path / "p")):
        with pytest.raises(DataError, match=r"no class table: set prediction\.classes"):
            call()
    assert not (tmp_path / "p").exists()


def test_a_models_prediction_is_the_heads() -> None:
    found = segments.Prediction(torch.zeros(2, 2), torch.zeros(0).long(), torch.zeros(0), "x")
    made = panoptic_ibs.Prediction.of(found, CLASSES)
    assert made.id_map is found.id_map
    assert made.cpu().classes is CLASSES


# --- score_files


def test_score_files_gives_the_numbers_of_the_command(fitted: Any, tmp_path: Path) -> None:
    root = Path(fitted.metrics["config"]["data"]["root"])
    predictions = fitted.run_dir / "predictions"
    before = sorted(p for p in tmp_path.rglob("*"))
    options: dict[str, Any] = {"data": "cityscapes", "root": root, "bootstrap": 20}
    metrics = panoptic_ibs.score_files(predictions, **options)
    assert metrics["pq"] == fitted.metrics["pq"]
    assert sorted(p for p in tmp_path.rglob("*")) == before
    arguments = ("data=cityscapes", f"data.root={root}", "evaluation.bootstrap=20", f"run_dir={tmp_path / 'typed'}")
    result = run("evaluate", f"predictions={predictions}", *arguments)
    assert result.code == 0, result.err
    theirs = json.loads((tmp_path / "typed" / "metrics.json").read_text())
    written = panoptic_ibs.score_files(predictions, run_dir=tmp_path / "ours", gallery=1, **options)
    assert json.loads((tmp_path / "ours" / "metrics.json").read_text())["pq"] == metrics["pq"]
    assert (tmp_path / "ours" / "report" / "index.html").is_file()
    for found in (metrics, written):
        assert json.loads(json.dumps(found)) == {key: theirs[key] for key in found}
    both = panoptic_ibs.score_files([predictions, str(predictions)], **options)
    assert [m["pq"] for m in both.values()] == [metrics["pq"]] * 2
    assert "comparison" in next(iter(both.values()))


def test_what_score_files_refuses(fitted: Any, tmp_path: Path) -> None:
    root = fitted.metrics["config"]["data"]["root"]
    for arguments, message in (
        ({"predictions": tmp_path / "none.json", "root": root}, "none.json"),
        ({"predictions": [], "root": root}, "score_files(predictions=[]): give a file or folder, or a list of them."),
        ({"predictions": [5], "root": root}, "score_files(predictions=[5]): give a file or folder"),
        (
            {"predictions": "x", "botstrap": 3},
            "score_files(botstrap=...): there is no such name; did you mean bootstrap?",
        ),
        ({"predictions": "x", "bootstrap": -1}, "evaluation.bootstrap is -1; expected: a whole number >= 0"),
        ({"predictions": "x", "data": "coco"}, "data=coco: there is no such option; choose one of"),
        ({"predictions": "x", "data": "coco_panoptic"}, "data.root is not set"),
    ):
        with pytest.raises(UserError) as caught:
            panoptic_ibs.score_files(**{"data": "cityscapes", **arguments})
        assert message in str(caught.value)


def test_score_files_tells_what_is_left_out(fitted: Any, tmp_path: Path) -> None:
    content = json.loads((fitted.run_dir / "predictions" / "panoptic.json").read_text())
    content["annotations"] = content["annotations"][:1]
    (tmp_path / "half.json").write_text(json.dumps(content))
    (tmp_path / "half").symlink_to(fitted.run_dir / "predictions" / "panoptic")
    root = fitted.metrics["config"]["data"]["root"]
    metrics = panoptic_ibs.score_files(tmp_path / "half.json", "cityscapes", root, bootstrap=0)
    assert metrics["complete"] is False
    assert metrics["num_images"] == 1
    assert len(metrics["faults"]) == 1


# --- the page


def test_the_page_runs(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 6
    small = {**TINY, "data": "lots", "data.synthetic": DATA["synthetic"]}
    typed = '"data=lots", "data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.presets.crop_size=[64,96]"'
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            code = block.replace("run = panoptic_ibs.fit(", "given = small\nrun = panoptic_ibs.fit(")
            names |= {"small": small}
            exec(compile(code.replace('"data=lots"', typed), str(PAGE), "exec"), names)
    assert names["run"].run_dir == tmp_path / "runs" / "from_python"
    assert names["loss"].isfinite()
    assert (tmp_path / "predictions" / "panoptic" / "first.png").is_file()
    (given,) = re.findall(r"^given = (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    with pytest.raises(ConfigError, match="no_such_name"):  # what the page gives is known, this alone is not
        panoptic_ibs.fit(**{**eval(given), "no_such_name": 1})


def test_text_is_quoted_only_where_the_command_line_needs_it() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    from panoptic_ibs.api import _text

    assert [_text("k", t) for t in ("lots", "/a/b.c", "it's", "null", "1e5")] == [
        "lots", "/a/b.c", r"'it\'s'", "'null'", "'1e5'"
    ]  # fmt: skip
    for text in ("lots", "/a/b.c", "a-b_c", "None", "TRUE", "inf", "1e5", "", "a b", "it's", "a,b", "${x}", "e5"):
        found = OverridesParser.create().parse_override(f"k={_text('k', text)}").value()
        assert (found.text.replace("\\'", "'") if isinstance(found, QuotedString) else found) == text
