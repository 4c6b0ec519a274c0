"""Every experiment, group and sweep composes, and the published recipes hold the published values."""

from __future__ import annotations

import json

import pytest
import torch

from cli_helpers import assert_sound, compose
from panoptic_ibs import cli
from panoptic_ibs.heads.base import Head

CONF = cli.conf_dir()
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
GROUPS = [
    f"{folder.name}={file.stem}"
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("experiment", "launcher", "sweep", "paths")
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_their_parts_exist(name: str) -> None:
    config = compose(f"experiment={name}", "data.root=DIR")
    assert_sound(config)
    recipe = cli.instantiate(config.optim)
    assert recipe.optimizer.func in (torch.optim.SGD, torch.optim.AdamW)
    ibs = cli.instantiate(config.ibs)
    assert (ibs is None) == (config.ibs.partners == "none")
    data = cli.make_data(config)
    from panoptic_ibs.task import check_supervision

    sampler = data.sampling.func  # type: ignore[union-attr]
    check_supervision(ibs, data.crops_per_device, getattr(sampler, "crops_per_item", 1) == 2)
    for callback in config.callbacks.values():
        cli.instantiate(callback)
    from helpers import class_table
    from panoptic_ibs.model import build_model

    model = cli.model_config(config, data.eval_resize)
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
    weight = None if c.ibs.partners == "none" else c.ibs.weight
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
    from omegaconf import OmegaConf

    config = compose(choice, "data.root=DIR")
    if not choice.startswith("experiment_head="):  # those need their head
        assert_sound(config)
    OmegaConf.resolve(config)
    group = choice.split("=")[0]
    if group in ("ibs", "optim", "backbone") and "pretrained: true" not in OmegaConf.to_yaml(config):
        cli.instantiate(config[group])


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
    assert component in (CONF / "sweep" / "ibs_components.yaml").read_text()


def test_model_config_is_plain_and_knows_the_test_size() -> None:
    config = compose("experiment=vistas_panoptic_fcn_crop", "data.root=DIR")
    model = cli.model_config(config, cli.make_data(config).eval_resize)
    assert model["test_size"] == [2048, 2048]
    assert "name" not in model["head"]
    assert json.loads(json.dumps(model)) == model
    assert "test_size" not in cli.model_config(compose("data=cityscapes", "data.root=DIR"))


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
