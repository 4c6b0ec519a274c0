"""Sweeps: every file composes, names stay, members are skipped, resumed or refused; with runs that only pretend."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from cli_helpers import assert_sound
from panoptic_ibs import commands, instantiation, runs, sweeps
from panoptic_ibs import settings as settings_of
from panoptic_ibs.configuration import options, resolvers
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.task import check_supervision

CONF = commands.conf_dir()
SWEEPS = options.options("sweep")
PLUGINS = {p.__name__ for p in Plugins.instance().discover()}


def needs(plugin: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(plugin not in PLUGINS, reason=f"{plugin} is not installed: pip install '.[sweeps]'")


def compose(*overrides: str, swept: tuple[str, ...] = ()) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    resolvers.register_resolvers(swept)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", list(overrides), return_hydra_config=True)


def axes(sweep: str) -> dict[str, list[str]]:
    """The values along each axis of a sweep."""
    parser, found = OverridesParser.create(), {}
    for key, values in options.tables()["sweep"][sweep]["axes"].items():
        override = parser.parse_override(f"{key}={values}")
        found[key] = [str(v) for v in override.sweep_string_iterator()]
    return found


# --- what the files say


@pytest.mark.parametrize("sweep", [s for s in SWEEPS if s != "tune_ibs" and not s.startswith("ciae")])
def test_sweeps_compose_and_fit_together(sweep: str) -> None:
    last = []
    for axis, values in axes(sweep).items():
        assert len(set(values)) == len(values) > 1
        last.append(f"{axis}={values[-1]}")
        if axis in options.groups():
            assert not set(values) - set(options.options(axis))
    config = compose(f"sweep={sweep}", "data.root=DIR", *last)
    assert_sound(config)
    assert config.sweep_name == sweep.replace("/", "_")
    assert config.run_dir == f"runs/{config.sweep_name}"  # the same command finds the same folder
    assert config.hydra.mode.name == "MULTIRUN"
    ibs, data = instantiation.instantiate(config.ibs), instantiation.make_data(config)
    sampler = data.sampling.func  # type: ignore[union-attr]
    check_supervision(ibs, data.crops_per_device, getattr(sampler, "crops_per_item", 1) == 2)
    instantiation.model_config(config)  # head and backbone know all their options
    backbone = {"published": "resnet50", "nuclei": "tf_efficientnet_lite0"}
    assert config.backbone.name == backbone.get(sweep.split("/")[0], "resnet18")


CONDITIONS = {
    "full_image": ("full_image", "none"),
    "random_crop": ("random_crop", "none"),
    "random_crop_ibs": ("random_crop", "random"),
    "paired_crop": ("paired_crop", "none"),
    "paired_crop_ibs": ("paired_crop", "paired"),
    "crop": ("instance_crop", "none"),
    "crop_ibs": ("instance_crop", "random"),
    "crop_ibs_paired": ("paired_crop", "paired"),
    "paired_crop_ibs_random": ("paired_crop", "random"),
}


def test_tables_hold_the_settings_of_the_papers() -> None:
    components, heads = "sweep/components", ["panoptic_fcn", "mask2former"]
    assert axes("table1_full_vs_crop") == {components: ["full_image", "crop"]}
    assert axes("table2_ibs") == {"head": heads, components: ["crop", "crop_ibs_paired"]}
    assert axes("ibs_components") == {components: ["full_image", "crop", "crop_ibs", "crop_ibs_paired"]}
    assert axes("table4_instance") == {components: ["crop", "crop_ibs_paired"]}
    assert axes("figure5_confusion") == {components: ["full_image", "crop", "crop_ibs_paired"]}
    sets = ("cityscapes", "vistas")
    published = [f"{data}_{head}_{how}" for data in sets for head in heads for how in ("crop", "crop_ibs")]
    assert axes("published/table2_ibs") == {"experiment": published}
    assert axes("embedded_benchmark") == {"seed": ["0", "1", "2"], components: list(CONDITIONS)[:5]}
    assert axes("nuclei") == {"seed": list("01234"), components: list(CONDITIONS)[:5]}


def test_crops_of_a_head_reach_both_samplers() -> None:
    config = compose("experiment=nuclei", "head=ciae", "data.root=DIR")
    paired = compose("sweep=nuclei", "head=ciae", "data.root=DIR", "sweep/components=paired_crop_ibs")
    assert config.sampling.crop_size == paired.sampling.crop_size == [128, 128]
    assert (paired.ibs.weight, paired.ibs.scale) == (1.0, 1.0)


FORMER = json.loads((Path(__file__).parent / "former_runs.json").read_text())


@pytest.mark.parametrize("command", FORMER)
def test_members_of_before_are_found_and_are_of_the_same_configuration(command: str, tmp_path: Path) -> None:
    """Folders and configurations of members as version b6190ad composed them."""
    former, words = FORMER[command]["config"], command.split()
    config = compose(*words)
    assert config.hydra.sweep.subdir == FORMER[command]["folder"]
    (tmp_path / runs.MEMBER_FILE).write_text(json.dumps(former))
    ours: Any = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    ours._set_parent(None)
    settings: Any = OmegaConf.to_container(ours, resolve=True)
    sweeps.check_same(tmp_path, settings)
    former.pop("weigh")  # of an earlier version still
    assert not settings_of.differences(settings_of.decisive(former), settings_of.decisive(settings))
    for key, value in (("weight", 2.5), ("scale", 7.0)):
        if settings["ibs"]["partners"] != "none":
            with pytest.raises(ConfigError, match=r"ibs\.weight: [0-9.]+ there, [0-9.]+ here"):
                sweeps.check_same(tmp_path, {**settings, "ibs": {**settings["ibs"], key: value}})
    with pytest.raises(ConfigError, match=r"weigh._target_: panoptic_ibs\.weighing\.Fixed there"):
        sweeps.check_same(tmp_path, {**settings, "weigh": {"_target_": "panoptic_ibs.weighing.Uncertainty"}})


@pytest.mark.parametrize("component", CONDITIONS)
def test_components(component: str) -> None:
    config = compose("sweep=embedded_benchmark", f"sweep/components={component}")
    assert (config.sampling.name, config.ibs.partners) == CONDITIONS[component]
    crops, crop, image = 8, (128, 256), (256, 512)
    if component == "full_image":  # as many pixels a step, and the same scales
        assert config.sampling.batch_size * image[0] * image[1] == crops * crop[0] * crop[1]
        assert config.sampling.resize == config.data.presets.resize
        assert tuple(config.data.synthetic.size) == image
    else:
        assert (config.sampling.batch_size, tuple(config.sampling.crop_size)) == (crops, crop)
    protocol = CONF.parent / "docs" / "protocol.md"
    if component in axes("embedded_benchmark")["sweep/components"] and protocol.is_file():
        assert f"`{component}`" in protocol.read_text(encoding="utf-8")


def test_a_step_of_full_images_has_the_pixels_of_a_step_of_crops() -> None:
    words = ("sweep=embedded_benchmark", "head=mask2former")
    full, crop = (compose(*words, f"sweep/components={c}").sampling.batch_size for c in ("full_image", "random_crop"))
    assert 4 * full == crop == 4


def test_roots_of_several_data_sets() -> None:
    words = ("sweep=published/table3_components", "roots.vistas=V")
    assert compose(*words, "experiment=vistas_panoptic_fcn_crop_random_ibs").data.root == "V"


# --- names


def name(*overrides: str, swept: tuple[str, ...] = ()) -> str:
    return str(compose(*overrides, swept=swept).hydra.sweep.subdir)


def test_names_are_readable_and_depend_on_no_other_member() -> None:
    table = ("sweep=table2_ibs", "head=mask2former", "sweep/components=crop_ibs_paired")
    assert name(*table) == "mask2former_crop_ibs_paired_seed0"
    assert name(*table, "seed=0", swept=("seed",)) == name(*table)  # another seed renames nothing
    assert name(*table, "trainer.max_steps=9") == name(*table)  # what all members share is not in the name
    assert name("sweep=ibs_weight", "ibs.weight=3.0", "seed=4") == "panoptic_fcn_ibs.weight-3.0_seed4"
    swept = ("sampling.crop_size", "backbone")
    both = name("head=ciae", "backbone=tiny", "sampling.crop_size=[64,96]", swept=swept)
    assert both == "ciae_tiny_sampling.crop_size-_64_96_seed0"
    published = ("sweep=published/table2_ibs", "experiment=cityscapes_panoptic_fcn_crop_ibs", "seed=1")
    assert name(*published) == "cityscapes_panoptic_fcn_crop_ibs_seed1"
    assert len(name("run_dir=" + "x" * 300, swept=("run_dir",))) <= 160


def test_swept_keys() -> None:
    words = ["-m", "seed=0,1", "head=ciae", "sweep/components=choice(a,b)", "sampling.crop_size=[64,96]", "a==b"]
    assert sweeps.swept_keys(words) == ["seed", "sweep/components"]
    assert sweeps.swept_keys(["optim.lr=tag(log, interval(0.1, 1))", "+x=range(3)"]) == ["optim.lr", "x"]


# --- members, with a run that only pretends


class Pretend:
    """Counts its runs; each leaves its results unless told to crash, or but metrics.json if it is killed then."""

    def __init__(self, status: int = 0, killed: bool = False) -> None:
        self.seen: list[Any] = []
        self.status, self.killed = status, killed

    def __call__(self, config: Any) -> int:
        self.seen.append(config.ckpt_path)
        if not self.status:
            metrics = {"interrupted": False, "pq_things": 0.25, "confusion": {"50": 0.125}}
            (Path(config.run_dir) / "metrics.json").write_text(json.dumps(metrics))
            if not self.killed:
                (Path(config.run_dir) / "timing.json").touch()
                (Path(config.run_dir) / "report").mkdir(exist_ok=True)
                (Path(config.run_dir) / "report" / "index.html").touch()
        return self.status


def settings(folder: Path, **more: Any) -> Any:
    keys = {"run_dir": str(folder), "ckpt_path": None, "init_from": None, "objective": None, "seed": 0, **more}
    return OmegaConf.create({**keys, "paths": {"cache": "/c"}, "data": {"root": "/c/set", "num_workers": 1}})


def checkpoint(folder: Path) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def test_a_finished_member_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend = Pretend()
    for objective, want in ((None, 0), ("pq_things", 0.25), ("confusion@50", 0.125)):
        assert sweeps.run_member(settings(tmp_path, objective=objective), tmp_path, pretend, []) == want
    assert pretend.seen == [None]
    assert capsys.readouterr().out.count("finished already, skipped") == 2
    with pytest.raises(ConfigError, match="objective=speed"):
        sweeps.run_member(settings(tmp_path, objective="speed"), tmp_path, pretend, [])


def test_a_member_killed_before_its_report_is_not_finished(tmp_path: Path) -> None:
    killed, pretend = Pretend(killed=True), Pretend()
    sweeps.run_member(settings(tmp_path), tmp_path, killed, [])
    sweeps.run_member(settings(tmp_path), tmp_path, pretend, [])
    sweeps.run_member(settings(tmp_path), tmp_path, pretend, [])
    assert (len(killed.seen), len(pretend.seen)) == (1, 1)
    assert runs.owed(tmp_path) == []
    assert runs.owed(tmp_path, baselines=True) == ["baselines.json"]


@pytest.mark.parametrize("left", ["crash", "interrupted", "half a file"])
def test_an_unfinished_member_is_resumed(tmp_path: Path, left: str) -> None:
    crash, pretend = Pretend(status=1), Pretend()
    assert sweeps.run_member(settings(tmp_path), tmp_path, crash, []) == 1
    assert sweeps.run_member(settings(tmp_path), tmp_path, crash, []) == 1  # no checkpoint yet: from the start
    last = checkpoint(tmp_path)
    if left != "crash":
        text = json.dumps({"interrupted": True}) if left == "interrupted" else '{"pq": 0.'
        (tmp_path / "metrics.json").write_text(text)
    config = settings(tmp_path, init_from="weights.pth")
    with pytest.raises(ConfigError, match=r"init_from: weights.pth here|init_from: None there, weights.pth here"):
        sweeps.run_member(config, tmp_path, pretend, [])
    assert sweeps.run_member(settings(tmp_path), tmp_path, pretend, []) == 0
    assert (crash.seen, pretend.seen) == ([None, None], [str(last)])


def test_a_resumed_member_does_not_start_from_weights_again(tmp_path: Path) -> None:
    last, config = checkpoint(tmp_path), settings(tmp_path, init_from="weights.pth")
    sweeps.run_member(config, tmp_path, Pretend(), [])
    assert (config.ckpt_path, config.init_from) == (str(last), None)


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    pretend = Pretend()
    sweeps.run_member(settings(tmp_path), tmp_path, pretend, [])
    moved = settings(tmp_path / "elsewhere", sweep_name="new")
    moved.paths.cache, moved.data.root, moved.data.num_workers = "/other", "/other/set", 7
    sweeps.check_same(tmp_path, OmegaConf.to_container(moved))  # type: ignore[arg-type]
    for change, text in (({"seed": 1}, "seed: 0 there, 1 here"), ({"new": 2}, "new: nothing there, 2 here")):
        with pytest.raises(ConfigError, match=text):
            sweeps.run_member(settings(tmp_path, **change), tmp_path, pretend, [])
    other = settings(tmp_path)
    other.data.root = "/c/other"
    with pytest.raises(ConfigError, match=r"data\.root: <0>/set there, <0>/other here"):
        sweeps.run_member(other, tmp_path, pretend, [])
    assert len(pretend.seen) == 1


def test_a_member_is_run_by_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend, inner = Pretend(), Pretend()

    def meanwhile(config: Any) -> int:
        assert sweeps.run_member(settings(tmp_path), tmp_path, inner, []) == 0
        return pretend(config)

    assert sweeps.run_member(settings(tmp_path), tmp_path, meanwhile, []) == 0
    assert (len(pretend.seen), len(inner.seen)) == (1, 0)
    assert "another process is at work on it" in capsys.readouterr().out


def test_further_processes_run_the_member_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, seen = checkpoint(tmp_path), []
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def launch(config: Any) -> int:
        assert sweeps.child_arguments() is None  # this is the first
        os.environ["LOCAL_RANK"] = "1"  # Lightning sets it for those it starts
        seen.extend(sweeps.child_arguments() or [])
        return 0

    sweeps.run_member(settings(tmp_path), tmp_path, launch, ["sweep=table1_full_vs_crop", "seed=2"])
    assert "LOCAL_RANK" not in os.environ  # the next member starts as this one did
    assert seen[:3] == ["sweep=table1_full_vs_crop", "seed=2", "init_from=null"]
    config = compose(*seen)
    assert (config.hydra.mode.name, config.hydra.run.dir) == ("RUN", str(tmp_path))
    assert (config.ckpt_path, config.seed) == (str(last), 2)


def test_a_worker_of_joblib_starts_processes_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda method, force: chosen.append(method))
    sweeps.own_start_method()
    assert chosen == []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "loky")
    sweeps.own_start_method()
    assert chosen == multiprocessing.get_all_start_methods()[:1]
