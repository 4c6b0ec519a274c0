"""Every option and every combination composes, and the published recipes hold the published values."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from cli_helpers import assert_sound, compose
from panoptic_ibs import commands, instantiation, settings
from panoptic_ibs.configuration import options, recipes
from panoptic_ibs.heads.base import Head

EXPERIMENTS = options.options("experiment")
APART = ("experiment", "launcher", "sweep", "sweep/components", "paths", "recipe", "refine")  # in tests of their own
GROUPS = [f"{group}={name}" for group in options.groups() if group not in APART for name in options.options(group)]
FROZEN = json.loads((Path(__file__).parent / "published_recipes.json").read_text())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_their_parts_exist(name: str) -> None:
    config = compose(f"experiment={name}", "data.root=DIR")
    assert_sound(config)
    recipe = instantiation.instantiate(config.optim)
    assert recipe.optimizer.func in (torch.optim.SGD, torch.optim.AdamW)
    ibs = instantiation.instantiate(config.ibs)
    assert (ibs is None) == (config.ibs.partners == "none")
    data = instantiation.make_data(config)
    from panoptic_ibs.task import check_supervision

    sampler = data.sampling.func  # type: ignore[union-attr]
    check_supervision(ibs, data.crops_per_device, getattr(sampler, "crops_per_item", 1) == 2)
    for callback in config.callbacks.values():
        instantiation.instantiate(callback)
    from helpers import class_table
    from panoptic_ibs.construction import build_model

    model = instantiation.model_config(config, data.eval_resize)
    model["backbone"]["pretrained"] = False
    if model["backbone"]["name"].startswith("res"):
        model["backbone"]["options"] = {"layers": [1, 1, 1, 1]}
    narrow = {"feature_channels": 8, "encoder_depth": 1, "decoder_depth": 2, "encoder_hidden": 8, "decoder_hidden": 8}
    model["head"].update({k: v for k, v in narrow.items() if k in model["head"]})
    model["head"]["channels"] = 32 if config.head.name == "mask2former" else 16
    assert isinstance(build_model(model, class_table()).head, Head)


CITY, VISTAS = (512, 1024), (1024, 1024)
PUBLISHED = {  # batch, crop, steps, learning rate, warm-up, IBS partners and weight
    "cityscapes_panoptic_fcn_crop": (32, CITY, 65000, 0.02, 1000, "none", None),
    "cityscapes_panoptic_fcn_crop_ibs": (32, CITY, 65000, 0.02, 1000, "paired", 4.0),
    "cityscapes_panoptic_fcn_full": (4, None, 100000, 0.0025, 1000, "none", None),
    "vistas_panoptic_fcn_crop": (32, VISTAS, 150000, 0.02, 2000, "none", None),
    "vistas_panoptic_fcn_crop_ibs": (32, VISTAS, 150000, 0.02, 2000, "paired", 15.0),
    "vistas_panoptic_fcn_full": (8, None, 150000, 0.005, 2000, "none", None),
    "coco_panoptic_fcn_full": (16, None, 90000, 0.01, 1000, "none", None),
    "cityscapes_mask2former_crop": (16, CITY, 90000, 1e-4, 0, "none", None),
    "cityscapes_mask2former_crop_ibs": (16, CITY, 90000, 1e-4, 0, "random", 50.0),
    "vistas_mask2former_crop": (16, VISTAS, 300000, 1e-4, 0, "none", None),
    "vistas_mask2former_crop_ibs": (16, VISTAS, 300000, 1e-4, 0, "random", 100.0),
    "vistas_mask2former_instance_ibs": (16, VISTAS, 300000, 1e-4, 0, "random", 100.0),
    "coco_mask2former_full": (16, (1024, 1024), 368750, 1e-4, 10, "none", None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name: str) -> None:
    c = compose(f"experiment={name}", "data.root=DIR")
    total = c.sampling.batch_size * c.trainer.devices
    crop = tuple(c.sampling.crop_size) if "crop_size" in c.sampling else None
    weight = None if c.ibs.partners == "none" else c.ibs.weight * c.ibs.scale
    found = (total, crop, c.trainer.max_steps, c.optim.lr, c.optim.warmup_steps, c.ibs.partners, weight)
    assert found == PUBLISHED[name]
    if "panoptic_fcn" in name and not name.startswith("coco"):
        assert (c.optim.power, c.optim.clip_value, c.optim.weight_decay) == (0.9, 5.0, 1e-4)
        assert c.optim.optimizer.momentum == 0.9


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if "mask2former" in n])
def test_published_mask2former_recipes(name: str) -> None:
    c = compose(f"experiment={name}", "data.root=DIR")
    assert (c.optim.clip_norm, c.optim.clip_value, c.optim.weight_decay) == (0.01, None, 0.05)
    assert (c.optim.backbone_lr_factor, list(c.optim.no_decay)) == (0.1, ["norm", "embedding"])
    assert c.backbone.frozen_stages == 0
    assert c.backbone.freeze_norm == (not name.startswith("cityscapes"))  # synchronised batch norms on Cityscapes
    assert c.trainer.precision == "16-mixed"
    assert c.head.score_threshold == (0.0 if name.startswith("vistas") else 0.8)
    assert list(c.optim.milestones) == ([327778, 355092] if name.startswith("coco") else [])
    if "ibs" in name:
        assert (c.sampling.name, c.ibs.points) == ("paired_crop", 12544)
    assert c.head.task == ("instance" if "instance" in name else "panoptic")
    if name in ("cityscapes_mask2former_crop", "vistas_mask2former_crop"):
        side = 1024 if name.startswith("city") else 2048
        assert list(c.data.presets.resize.choices) == [int(0.1 * k * side) for k in range(5, 21)]
        assert (c.data.presets.resize.longest, c.sampling.name) == (4 * side, "random_crop")
        assert c.data.transforms._target_.endswith("ColorJitter")


def test_full_image_recipes_resize_at_random() -> None:
    city = compose("experiment=cityscapes_panoptic_fcn_full", "data.root=DIR").sampling.resize
    assert (list(city.range), city.longest) == ([512, 2048], 4096)
    vistas = compose("experiment=vistas_panoptic_fcn_full", "data.root=DIR").sampling.resize
    assert list(vistas.choices) == list(range(1024, 2049, 128))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_option_composes(choice: str) -> None:
    config = compose(choice, "data.root=DIR")
    assert_sound(config)
    OmegaConf.resolve(config)
    group = choice.split("=")[0]
    if group in ("ibs", "optim", "backbone") and "pretrained: true" not in OmegaConf.to_yaml(config):
        instantiation.instantiate(config[group])


@pytest.mark.parametrize(
    ("component", "sampling", "partners"),
    [
        ("full_image", "full_image", "none"),
        ("crop", "instance_crop", "none"),
        ("crop_ibs", "instance_crop", "random"),
        ("crop_ibs_paired", "paired_crop", "paired"),
    ],
)
def test_sweep_components_are_table_3(component: str, sampling: str, partners: str) -> None:
    config = compose(f"sweep/components={component}")
    assert (config.sampling.name, config.ibs.partners) == (sampling, partners)
    assert component in options.tables()["sweep"]["ibs_components"]["axes"]["sweep/components"]


def test_model_config_is_plain_and_knows_the_test_size() -> None:
    config = compose("experiment=vistas_panoptic_fcn_crop", "data.root=DIR")
    model = instantiation.model_config(config, instantiation.make_data(config).eval_resize)
    assert model["test_size"] == [2048, 2048]
    assert "name" not in model["head"]
    assert json.loads(json.dumps(model)) == model
    assert "test_size" not in instantiation.model_config(compose("data=cityscapes", "recipe=none", "data.root=DIR"))


@pytest.mark.parametrize(
    ("typed", "devices"),
    [
        ([], 8),
        (["trainer=cpu"], 1),
        (["trainer=gpu"], 1),
        (["trainer=auto"], "auto"),
        (["trainer.accelerator=cpu"], 1),
        (["trainer=cpu", "trainer.devices=2"], 2),
        (["trainer=gpu", "trainer.devices=4"], 4),
    ],
)
def test_the_trainer_that_is_typed_means_what_it_says(typed: list[str], devices: int | str) -> None:
    """A recipe for eight devices does not start eight processes on a CPU."""
    assert compose("experiment=vistas_panoptic_fcn_crop", "data.root=.", *typed).trainer.devices == devices


# --- choices compose

CHOICES = {
    "cityscapes_panoptic_fcn_full": "data=cityscapes head=panoptic_fcn sampling=full_image ibs=none",
    "cityscapes_panoptic_fcn_crop": "data=cityscapes head=panoptic_fcn sampling=instance_crop ibs=none",
    "cityscapes_panoptic_fcn_crop_ibs": "data=cityscapes head=panoptic_fcn sampling=paired_crop ibs=paired",
    "cityscapes_mask2former_full": "data=cityscapes head=mask2former sampling=full_image ibs=none",
    "cityscapes_mask2former_crop": "data=cityscapes head=mask2former sampling=random_crop ibs=none",
    "cityscapes_mask2former_crop_ibs": "data=cityscapes head=mask2former sampling=paired_crop ibs=random",
    "cityscapes_ciae": "data=cityscapes head=ciae sampling=instance_crop ibs=none",
    "cityscapes_ciae_ibs": "data=cityscapes head=ciae sampling=paired_crop ibs=paired",
    "vistas_panoptic_fcn_full": "data=vistas head=panoptic_fcn sampling=full_image ibs=none",
    "vistas_panoptic_fcn_crop": "data=vistas head=panoptic_fcn sampling=instance_crop ibs=none",
    "vistas_panoptic_fcn_crop_ibs": "data=vistas head=panoptic_fcn sampling=paired_crop ibs=paired",
    "vistas_panoptic_fcn_crop_random_ibs": "data=vistas head=panoptic_fcn sampling=instance_crop ibs=random",
    "vistas_mask2former_full": "data=vistas head=mask2former sampling=full_image ibs=none",
    "vistas_mask2former_crop": "data=vistas head=mask2former sampling=random_crop ibs=none",
    "vistas_mask2former_crop_ibs": "data=vistas head=mask2former sampling=paired_crop ibs=random",
    "vistas_mask2former_instance": "data=vistas head=mask2former sampling=random_crop ibs=none head.task=instance",
    "vistas_mask2former_instance_ibs": "data=vistas head=mask2former sampling=paired_crop ibs=random "
    "head.task=instance",
    "coco_panoptic_fcn_full": "data=coco_panoptic head=panoptic_fcn sampling=full_image ibs=none",
    "coco_mask2former_full": "data=coco_panoptic head=mask2former sampling=random_crop ibs=none",
    "coco_mask2former_crop_ibs": "data=coco_panoptic head=mask2former sampling=paired_crop ibs=random",
    "coco_ciae_r50": "data=coco_panoptic head=ciae sampling=full_image ibs=none",
    "coco_ciae_r101": "data=coco_panoptic head=ciae sampling=full_image ibs=none backbone=resnet101",
    "coco_ciae_r101_dcn": "data=coco_panoptic head=ciae sampling=full_image ibs=none backbone=resnet101_dcn",
    "coco_ciae_x101_dcn": "data=coco_panoptic head=ciae sampling=full_image ibs=none backbone=resnext101_64x4d_dcn",
}
OURS = ("cityscapes_mask2former_full", "vistas_mask2former_full", "coco_mask2former_crop_ibs", "ciae_ibs")
ONLY_NAMED = ("coco_ciae_ablation", "coco_mask2former_crop")


def frozen_form(config: Any) -> dict[str, Any]:
    """The parts of a configuration that ``freeze_recipes.py`` kept, with IBS as its product."""
    parts = {
        part: config[part] for part in ("data", "sampling", "backbone", "head", "ibs", "optim", "trainer", "model")
    }
    plain = parts if isinstance(config, dict) else instantiation.plain(config)
    kept = {part: dict(plain[part]) for part in parts}
    for part, keys in (("data", ("sampling", "cache_dir", "root")), ("sampling", ("sampler",))):
        kept[part] = {k: v for k, v in kept[part].items() if k not in keys}
    kept["trainer"] = settings.alike({f"trainer.{k}": v for k, v in kept["trainer"].items()})  # of any version
    ibs = kept["ibs"]
    off = ibs["partners"] == "none"
    kept["ibs"] = (
        {"partners": "none"} if off else {**ibs, "weight": ibs["weight"] * ibs.get("scale", 1.0), "scale": None}
    )
    return kept


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_the_published_recipe(name: str) -> None:
    """Every value that decides training, against the configuration files of before."""
    config = compose(*CHOICES[name].split(), "data.root=DIR")
    assert frozen_form(config) == frozen_form(FROZEN[f"experiment={name}"])
    entry = options.tables()["experiment"][name]
    chosen = {**options.tables()["experiment"].get(entry.get("like"), {}).get("choose", {}), **entry.get("choose", {})}
    assert [f"{k}={v}" for k, v in chosen.items()] == [word for word in CHOICES[name].split() if "." not in word]
    ours = name in OURS or ("ciae" in name and "cityscapes" in name)
    assert (recipes.note(instantiation.plain(config)) is not None) == ours


@pytest.mark.parametrize("name", ONLY_NAMED)
def test_what_no_choice_says_keeps_its_name(name: str) -> None:
    found, frozen = (
        frozen_form(c) for c in (compose(f"experiment={name}", "data.root=DIR"), FROZEN[f"experiment={name}"])
    )
    for resize in (found["data"]["presets"]["full_resize"], found["sampling"]["resize"]):
        assert resize.pop("range", None) is None or name != "coco_ciae_ablation"
    for resize in (frozen["data"]["presets"]["full_resize"], frozen["sampling"]["resize"]):
        resize.pop("range", None)
    assert found == frozen


@pytest.mark.parametrize("command", [c for c in FROZEN if " " in c])
def test_small_recipes_are_those_of_before(command: str) -> None:
    small, head = (word.partition("=")[2] for word in command.split())
    data = {"demo": "synthetic", "nuclei": "nuclei sampling=random_crop ibs=random"}.get(small, small)
    config = compose(*f"data={data} head={head} data.root=DIR".split())
    assert frozen_form(config) == frozen_form(FROZEN[command])
    assert recipes.note(instantiation.plain(config)) is None


DATA = ("cityscapes", "vistas", "coco_panoptic", "synthetic", "lots", "nuclei")
HEADS = ("panoptic_fcn", "mask2former", "ciae")
SAMPLINGS = ("full_image", "random_crop", "instance_crop", "paired_crop")


@pytest.mark.parametrize(("data", "head"), list(itertools.product(DATA, HEADS)))
def test_every_combination_is_sound(data: str, head: str) -> None:
    """All samplings by Hydra; IBS, on which nothing else depends, is exchanged."""
    notes = set()
    for sampling in SAMPLINGS:
        config = compose(
            f"data={data}", f"head={head}", f"sampling={sampling}", "ibs=none", "data.root=DIR", "trainer=cpu"
        )
        assert (config.trainer.accelerator, config.trainer.devices, config.trainer.precision) == ("cpu", 1, "32-true")
        for partners in ("none", "random", *(["paired"] if sampling == "paired_crop" else [])):
            config.ibs = OmegaConf.load(commands.conf_dir() / "ibs" / f"{partners}.yaml")
            assert_sound(config)
            notes.add(recipes.note(instantiation.plain(config)))
    assert (None in notes) == (data not in ("cityscapes", "vistas") or head != "ciae")
    assert (notes == {None}) == (data in ("synthetic", "lots", "nuclei"))


def test_what_is_typed_wins_over_the_recipe() -> None:
    city = ("data=cityscapes", "head=panoptic_fcn", "data.root=DIR")
    assert compose(*city, "backbone=tiny").backbone.options.layers == [1, 1, 1, 1]
    assert compose(*city, "optim.lr=0.5", "trainer.max_steps=7").optim.lr == 0.5
    other = compose(*city, "optim=adamw", "trainer=gpu", "sampling.batch_size=2", "recipe.ibs.weight=2.5")
    alone = compose("recipe=none", "optim=adamw").optim
    assert other.optim == alone
    assert (other.trainer.devices, other.trainer.precision, other.trainer.max_steps) == (1, "bf16-mixed", 65000)
    assert (other.sampling.batch_size, other.ibs.weight * other.ibs.scale) == (2, 10.0)
    assert compose(*city, "head.segment_weight=2.0").ibs.scale == 2.0


def test_without_a_recipe_the_defaults_hold(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pebbles.yaml").write_text("defaults: [coco_panoptic]\nname: pebbles\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    config = compose("data=pebbles", "head=ciae", "data.root=DIR", search)
    none = compose("data=coco_panoptic", "recipe=none", "head=ciae", "data.root=DIR")
    assert (config.backbone, config.optim, config.trainer, config.head) == (
        none.backbone, none.optim, none.trainer, none.head,
    )  # fmt: skip
    assert recipes.note(instantiation.plain(config)) == (
        "there is no recipe for data=pebbles head=ciae: the defaults of the groups are used"
    )
    assert recipes.note(instantiation.plain(none)) is None
    weights = {h: compose("recipe=none", f"head={h}").ibs for h in HEADS}
    assert {h: ibs.weight * ibs.scale for h, ibs in weights.items()} == dict.fromkeys(HEADS, 3.0)  # as ever
    (tmp_path / "recipe").mkdir()
    own = "# @package _global_\ndefaults: [cityscapes_ciae]\nrecipe: {max_steps: 77}\n"
    (tmp_path / "recipe" / "pebbles_ciae.yaml").write_text(own)
    config = compose("data=pebbles", "head=ciae", "recipe=pebbles_ciae", "data.root=DIR", search)
    assert (config.trainer.max_steps, config.backbone.name) == (77, "resnet50")


def test_the_note_names_the_nearest() -> None:
    def note(*words: str) -> str | None:
        return recipes.note(instantiation.plain(compose("data.root=DIR", *words)))

    start = "no recipe is published for data=cityscapes head=panoptic_fcn"
    city = ("data=cityscapes", "head=panoptic_fcn")
    assert note(*city, "sampling=random_crop", "ibs=none") == (
        f"{start} sampling=random_crop ibs=none: the values of sampling=instance_crop ibs=none are used"
    )
    assert note(*city, "sampling=instance_crop", "ibs=random") == (
        f"{start} sampling=instance_crop ibs=random: the values of sampling=instance_crop ibs=none, for IBS those of "
        "sampling=paired_crop ibs=paired are used"
    )
    assert note("data=vistas", "sampling=instance_crop", "ibs=random") is None  # third row of Table 3


def test_a_data_set_of_ones_own_in_cocos_layout_is_not_coco() -> None:
    own = ["data=coco_panoptic", "data.root=DIR", "data.train=train", "data.val=val", "head=ciae"]
    assert recipes.with_own_data(own) == [*own, "recipe=own_data"]
    config, none = compose(*recipes.with_own_data(own)), compose(*own, "recipe=none")
    assert (config.backbone, config.optim, config.trainer, config.ibs) == (
        none.backbone, none.optim, none.trainer, none.ibs,
    )  # fmt: skip
    assert config.trainer.accelerator == "auto"
    assert "data.train=train is not COCO's" in str(recipes.note(instantiation.plain(config)))
    for more in ("recipe=small_ciae", "experiment=nuclei", "sweep=table2_ibs"):
        assert recipes.with_own_data([*own, more]) == [*own, more]
    for coco in (["data=coco_panoptic"], ["data=coco_panoptic", "data.train=train2017"], ["data.train=mine"]):
        assert recipes.with_own_data(coco) == coco
    assert recipes.with_own_data(["data=coco_panoptic", "data.train='train2017'"])[-1] != "recipe=own_data"


@pytest.mark.parametrize("refine", options.options("refine"))
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_refine_composes_where_there_is_a_checkpoint(command: str, refine: str) -> None:
    config = compose(f"refine={refine}", name=command)
    assert (refine in OmegaConf.to_yaml(config).lower().replace("densecrf", "dense_crf")) or refine == "none"


def test_few_files() -> None:
    files = list(commands.conf_dir().rglob("*.yaml"))
    assert len(files) <= 66  # half of what there was before choices composed
