"""The commands end to end on a tiny synthetic set, and every mistake a user can make: one line, exit code 2."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import panoptic_ibs
from cli_helpers import TINY, run
from panoptic_ibs.checkpoints import read_checkpoint


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANOPTIC_IBS_CACHE", str(cache))


@pytest.fixture(scope="session")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, three to an epoch, that every test below reads."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANOPTIC_IBS_CACHE", str(cache))
        result = run("train", *TINY, *FOUR_STEPS, f"run_dir={folder}")
    assert result.code == 0, result.err
    assert result.out.strip().splitlines()[-1] == f"run folder: {folder}"
    return folder


FOUR_STEPS = ("trainer.max_steps=4", "sampling.epoch_length=6", "callbacks=ema")


@pytest.fixture
def last(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


def test_a_checkpoint_names_its_data_set(last: Path) -> None:
    assert read_checkpoint(last)["panoptic_ibs"]["data"]["name"] == "synthetic"


# --- help


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from panoptic_ibs import train, evaluate, predict; sys.argv = ['train', '--help']; "
        "assert train.main() == 0; assert not {'torch', 'lightning', 'timm', 'wandb', 'albumentations', 'matplotlib'} "
        "& set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("sampling=full_image", "ckpt_path", "trainer=", "run_dir"):
        assert word in done.stdout


# --- a run


def test_run_folder(trained: Path) -> None:
    for name in (
        ".hydra/config.yaml",
        "checkpoints/last.ckpt",
        "metrics.json",
        "metrics.csv",
        "baselines.json",
        "timing.json",
        "predictions/panoptic.json",
        "report/index.html",
    ):
        assert (trained / name).is_file(), name
    metrics = json.loads((trained / "metrics.json").read_text())
    plain = ["pq", "sq", "rq"]
    names = [*plain, *(f"{n}_{k}" for k in ("things", "stuff") for n in plain), "acc_things", "prec_things"]
    for name in names:
        assert 0 <= metrics[name] <= 1
    assert set(metrics["confusion"]) >= {"50"}
    assert set(metrics["per_class"]["car"]) >= {"pq", "sq", "rq", "tp", "fp", "fn", "iou"}
    assert (metrics["num_images"], metrics["step"], metrics["interrupted"]) == (2, 4, False)
    assert metrics["config"]["trainer"]["max_steps"] == 4
    assert metrics["versions"]["torch"] == torch.__version__.split("+")[0] or metrics["versions"]["torch"]
    assert set(json.loads((trained / "baselines.json").read_text())) == {"untrained network", "stuff only"}


def test_metrics_csv(trained: Path) -> None:
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["step", "epoch"]
    losses = [float(r["train/loss"]) for r in rows if r["train/loss"]]
    assert len(losses) == 4
    for row in rows:
        if row["train/loss"]:
            terms = [float(v) for k, v in row.items() if k.startswith("train/loss_") and v]
            assert sum(terms) == pytest.approx(float(row["train/loss"]), rel=1e-4)
    assert any(r.get("val/pq") for r in rows)
    assert {"train/loss_ibs", "train/lr", "val/pq_things", "val/pq_stuff", "val/confusion@50"} <= set(rows[0])


def test_predictions_are_coco_panoptic(trained: Path) -> None:
    content = json.loads((trained / "predictions" / "panoptic.json").read_text())
    assert {c["id"] for c in content["categories"]} >= {7, 24, 26}  # dataset ids, not contiguous ones
    assert len(content["annotations"]) == 2
    for annotation in content["annotations"]:
        png = np.array(Image.open(trained / "predictions" / "panoptic" / annotation["file_name"])).astype(int)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        assert ids.shape == (96, 192)
        listed = {s["id"]: s for s in annotation["segments_info"]}
        assert set(np.unique(ids)) - {0} == set(listed)
        for number, segment in listed.items():
            ys, xs = np.nonzero(ids == number)
            assert segment["area"] == len(ys)
            assert segment["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]


def test_checkpoint_alone_gives_the_model(last: Path) -> None:
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 4
    assert set(state["ema_state_dict"]) == {k for k in state["state_dict"] if k.startswith("model.")}
    model = panoptic_ibs.load(last)
    assert not model.training
    name = "model.head.kernel_head.out.weight"
    assert torch.equal(model.state_dict()[name.removeprefix("model.")], state["ema_state_dict"][name])
    assert not torch.equal(state["state_dict"][name], state["ema_state_dict"][name])
    [prediction] = model.predict(np.zeros((50, 70, 3), np.uint8))
    assert prediction.id_map.shape == (50, 70)


@pytest.mark.parametrize("step", [2, 3])  # within an epoch and at its end
def test_ctrl_c_then_resume_equals_a_straight_run(trained: Path, tmp_path: Path, step: int) -> None:
    press = ("+callbacks.press._target_=cli_helpers.PressCtrlC", f"+callbacks.press.step={step}")
    few = "evaluation.interrupted_images=1"
    first = run("train", *TINY, *FOUR_STEPS, f"run_dir={tmp_path / 'a'}", *press, few)
    assert first.code == 130, first.err
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert (metrics["step"], metrics["num_images"], metrics["interrupted"]) == (step, 1, True)
    assert (tmp_path / "a" / "report" / "index.html").is_file()
    ckpt = tmp_path / "a" / "checkpoints" / "last.ckpt"
    part = json.loads((tmp_path / "a" / "timing.json").read_text())
    said = first.out.partition("to go on where it stopped:\n")[2].splitlines()[0]
    command, *words = shlex.split(said.partition(" -m panoptic_ibs.")[2])
    assert (command, words[-2:]) == ("train", [f"ckpt_path={ckpt}", f"run_dir={tmp_path / 'a'}"])
    second = run("train", *(word for word in words if word not in press))  # the command as it is printed
    assert second.code == 0, second.err
    state, straight = torch.load(ckpt, weights_only=True), torch.load(trained / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 4
    for key in ("state_dict", "ema_state_dict"):
        for name, value in straight[key].items():
            torch.testing.assert_close(state[key][name], value, rtol=0, atol=0, msg=name)
    with (tmp_path / "a" / "metrics.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["train/loss"]]
    with (trained / "metrics.csv").open() as file:
        want = [r["train/loss"] for r in csv.DictReader(file) if r["train/loss"]]
    assert [r["train/loss"] for r in rows] == want  # the curve goes on
    both = [part, json.loads((tmp_path / "a" / "timing.json").read_text())]
    assert [t["train_seconds"] / t["seconds_per_step"] for t in both] == pytest.approx([step, 4])  # of all steps


def test_init_from_another_head_size_loads_what_fits(last: Path, tmp_path: Path) -> None:
    result = run("train", *TINY, "head.feature_channels=8", f"init_from={last}", f"run_dir={tmp_path}", *FEW)
    assert result.code == 0, result.err
    assert f"weights from {last}" in result.out
    assert "misshapen" in result.out
    assert "head.thing_generator.embed.weight (16, 16, 1, 1) in the file, (8, 16, 1, 1) here" in result.out


FEW = ("trainer.max_steps=1", "evaluation.baselines=false", "evaluation.limit=1")


def test_evaluate_gives_what_training_gave(trained: Path, last: Path, tmp_path: Path) -> None:
    result = run("evaluate", *DATA, f"ckpt_path={last}", f"run_dir={tmp_path}", "trainer=cpu")
    assert result.code == 0, result.err
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, trained))
    for name in ("pq", "sq", "rq", "acc_things", "prec_things", "confusion", "per_class", "num_images", "step"):
        assert ours[name] == theirs[name], name
    low, high = ours["confidence"]["intervals"]["pq_stuff"]
    assert low <= ours["pq_stuff"] <= high
    for name in ("predictions/panoptic.json", "report/index.html", ".hydra/config.yaml"):
        assert (tmp_path / name).is_file()
    page = tmp_path / "report" / "index.html"
    assert result.out.strip().splitlines()[-2:] == [f"report: {page}", f"run folder: {tmp_path}"]


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_options_of_a_checkpoint_can_be_changed(trained: Path, last: Path, tmp_path: Path, command: str) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), np.uint8)).save(picture)
    given = {
        "evaluate": [*DATA, f"run_dir={tmp_path / 'out'}", "trainer=cpu"],
        "predict": [f"input={picture}", f"output={tmp_path / 'out'}"],
    }[command]
    lower = "+overrides.head.inference={center_threshold: 0.0, instance_threshold: 0.0, min_score: 0.0}"
    result = run(command, *given, f"ckpt_path={last}", lower)
    assert result.code == 0, result.err
    if command == "evaluate":
        before, metrics = (json.loads((f / "metrics.json").read_text()) for f in (trained, tmp_path / "out"))
        things = [sum(m["per_class"][name]["fp"] for name in ("car", "person", "bicycle")) for m in (before, metrics)]
        assert things[1] > things[0]
        assert metrics["config"]["model"]["head"]["inference"]["center_threshold"] == 0.0
    wrong = run(command, *given, f"ckpt_path={last}", "+overrides.head.inference.no_such=1")
    assert wrong.code == 2
    assert "head.inference.no_such is no option of this model; it has: center_threshold" in wrong.err


DATA = ("data.synthetic.num_train=4", "data.synthetic.num_val=2", "data.synthetic.size=[96,192]", "data.num_workers=0")


def test_evaluate_predictions_gives_the_same(trained: Path, tmp_path: Path) -> None:
    file = trained / "predictions" / "panoptic.json"
    result = run("evaluate", *DATA, f"predictions={file}", f"run_dir={tmp_path}")
    assert result.code == 0, result.err
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, trained))
    for name in ("pq", "acc_things", "prec_things", "confusion", "per_class"):
        assert ours[name] == theirs[name], name
    assert (tmp_path / "report" / "index.html").is_file()


def test_perfect_predictions_score_one(cache: Path, trained: Path, tmp_path: Path) -> None:
    truth = next((cache / "synthetic").glob("96x192*")) / "gtFine" / "cityscapes_panoptic_val.json"
    content = json.loads(truth.read_text())
    for annotation in content["annotations"]:  # a crowd is no prediction; its pixels are of no segment
        segments = annotation["segments_info"]
        annotation["segments_info"] = [s for s in segments if not s["iscrowd"]]
    folder = tmp_path / "mine"
    folder.mkdir()
    for annotation in content["annotations"]:
        png = np.array(Image.open(truth.with_suffix("") / annotation["file_name"]))
        ids = png.astype(int) @ [1, 256, 65536]
        png[~np.isin(ids, [s["id"] for s in annotation["segments_info"]])] = 0
        Image.fromarray(png).save(folder / annotation["file_name"])
    (tmp_path / "mine.json").write_text(json.dumps(content))
    result = run("evaluate", *DATA, f"predictions={tmp_path / 'mine.json'}", f"run_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["pq"], metrics["acc_things"], metrics["prec_things"]) == (1, 1, 1)


@pytest.mark.parametrize("single", [True, False])
def test_predict(last: Path, tmp_path: Path, single: bool) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(rng.integers(0, 255, (40, 64, 3), np.uint8)).save(folder / name)
    out = tmp_path / "out"
    result = run("predict", f"ckpt_path={last}", f"input={folder / 'b.png' if single else folder}", f"output={out}")
    assert result.code == 0, result.err
    content = json.loads((out / "panoptic.json").read_text())
    names = ["b.png"] if single else ["a.jpg.png", "a.png.png", "b.png"]
    assert sorted(a["file_name"] for a in content["annotations"]) == names
    for kind in ("panoptic", "overlay"):
        assert sorted(p.name for p in (out / kind).iterdir()) == names
        assert Image.open(out / kind / names[0]).size == (64, 40)


def test_nothing_is_written_where_the_command_starts(last: Path, tmp_path: Path, monkeypatch: Any) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("predict", f"ckpt_path={last}", f"input={tmp_path / 'x.png'}", f"output={tmp_path / 'o'}").code == 0
    assert not list((tmp_path / "here").iterdir())


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ibs=paired", "sampling=random_crop"], "ibs=paired needs crop pairs: use sampling=paired_crop"),
        (["ibs=random", "sampling=random_crop", "sampling.batch_size=1"], "at least 2 crops a device.*ibs=none"),
        (["ibs=random", "ibs.num_targets=4"], "at least 5 crops a device"),
        (["sampling.batch_size=3"], "sampling.batch_size=3 is odd"),
        (["data=coco_panoptic"], "error: data.root is not set"),
        (["data=coco_panoptic", "data.root=nowhere"], "nowhere: no such folder"),
        (["head=nonsense"], "nonsense"),
        (["launcher=null"], "launcher=null: choose one of joblib, slurm, or ~launcher for none"),
        (["trainer.max_stepz=3"], "max_stepz"),
        (["head.stuff=some"], 'head.stuff is "some"; expected: all or merged'),
        (["+head.colour=red"], "head.colour.*no such option.*feature_channels"),
        (["+optim.momentun=1"], "momentun"),
        (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt: there is no such checkpoint"),
        (["init_from=nowhere.ckpt"], "nowhere.ckpt: there is no such checkpoint"),
        (["ckpt_path=a", "init_from=b"], "give one of them"),
        (["callbacks=ema", "callbacks.ema.decay=2"], "ema.decay"),
        (["backbone.name=resnet1000"], "resnet1000"),
    ],
)
def test_mistakes_in_training(arguments: list[str], message: str, tmp_path: Path) -> None:
    tiny = [a for a in TINY if "synthetic" not in a or "data=coco_panoptic" not in arguments]
    result = run("train", *tiny, *arguments, f"run_dir={tmp_path}")
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "checkpoints").exists()


def edited(last: Path, folder: Path, change: Any) -> Path:
    state = read_checkpoint(last)
    change(state)
    torch.save(state, folder / "edited.ckpt")
    return folder / "edited.ckpt"


def test_resume_of_another_head_or_class_count(last: Path, tmp_path: Path) -> None:
    other = edited(last, tmp_path, lambda s: s["panoptic_ibs"]["model"]["head"].update(_target_="x.Mask2Former"))
    result = run("train", *TINY, f"ckpt_path={other}", "trainer.max_steps=9", f"run_dir={tmp_path / 'r'}")
    assert result.code == 2
    assert "trained with head 'Mask2Former', this run has 'PanopticFCN'" in result.message
    fewer = edited(last, tmp_path, lambda s: s["panoptic_ibs"]["classes"].pop())
    result = run("train", *TINY, f"ckpt_path={fewer}", "trainer.max_steps=9", f"run_dir={tmp_path / 'r'}")
    assert result.code == 2
    assert "classes, this run's data set has" in result.message


def test_resume_of_a_finished_run(last: Path, tmp_path: Path) -> None:
    result = run("train", *TINY, *FOUR_STEPS, f"ckpt_path={last}", f"run_dir={tmp_path}")
    assert result.code == 2
    assert "at step 4" in result.message


def test_truncated_checkpoint(last: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(last.read_bytes()[:5000])
    for command, arguments in (
        ("train", [*TINY, "trainer.max_steps=9"]),
        ("evaluate", [*DATA]),
    ):
        result = run(command, *arguments, f"ckpt_path={broken}", f"run_dir={tmp_path / 'r'}")
        assert result.code == 2
        assert "broken.ckpt: cannot be read as tensors" in result.message
    (tmp_path / "in.png").touch()
    result = run("predict", f"ckpt_path={broken}", f"input={tmp_path / 'in.png'}", f"output={tmp_path / 'o'}")
    assert (result.code, "broken.ckpt" in result.message) == (2, True)


def test_mistakes_in_evaluation(trained: Path, last: Path, tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        result = run("evaluate", *DATA, f"run_dir={tmp_path / 'r'}", *arguments)
        assert result.code == 2, result.err
        return result.message

    assert "either ckpt_path=FILE" in fails()
    assert "either ckpt_path=FILE" in fails(f"ckpt_path={last}", "predictions=x.json")
    assert "x.json: the JSON of the predictions is missing" in fails("predictions=x.json")
    other = edited(last, tmp_path, lambda s: s["panoptic_ibs"]["classes"][0].update(name="zebra"))
    assert "zebra" in fails(f"ckpt_path={other}")
    source = trained / "predictions" / "panoptic.json"
    content = json.loads(source.read_text())
    (tmp_path / "p").symlink_to(source.with_suffix(""))
    file = tmp_path / "p.json"

    def with_change(change: Any) -> str:
        changed = json.loads(source.read_text())
        change(changed)
        file.write_text(json.dumps(changed))
        return fails(f"predictions={file}")

    name = content["annotations"][0]["image_id"]
    assert f"image {name}: no prediction" in with_change(lambda c: c["annotations"].pop(0))
    assert "p.json: no predictions in COCO panoptic format" in with_change(lambda c: c.pop("annotations"))
    assert "does not list" in with_change(lambda c: _widest(c)["segments_info"].clear())
    assert "category_id 999" in with_change(lambda c: _widest(c)["segments_info"][0].update(category_id=999))
    assert "nowhere.png" in with_change(lambda c: c["annotations"][0].update(file_name="nowhere.png"))


def _widest(content: dict[str, Any]) -> dict[str, Any]:
    return max(content["annotations"], key=lambda a: len(a["segments_info"]))


def test_mistakes_in_prediction(last: Path, tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        result = run("predict", *arguments)
        assert result.code == 2, result.err
        return result.message

    out = f"output={tmp_path / 'o'}"
    assert "ckpt_path is not set" in fails("input=x", out)
    assert "there is no such image or folder" in fails(f"ckpt_path={last}", f"input={tmp_path / 'x'}", out)
    (tmp_path / "empty").mkdir()
    assert "holds no image" in fails(f"ckpt_path={last}", f"input={tmp_path / 'empty'}", out)
    (tmp_path / "text.png").write_text("hello")
    assert "text.png: the image cannot be decoded" in fails(f"ckpt_path={last}", f"input={tmp_path / 'text.png'}", out)
    assert "device=quantum" in fails(f"ckpt_path={last}", f"input={tmp_path / 'text.png'}", out, "device=quantum")


def test_non_finite_loss_names_the_images(tmp_path: Path) -> None:
    result = run("train", *TINY, "+callbacks.poison._target_=cli_helpers.Poison", f"run_dir={tmp_path}")
    assert result.code == 2, result.err
    assert "The loss of step 1 is nan" in result.message
    assert "_leftImg8bit.png" in result.message
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
