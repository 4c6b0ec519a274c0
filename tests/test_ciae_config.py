"""CIAE's recipes and sweeps against the paper's settings and the axes of its tables."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

from cli_helpers import compose
from panoptic_ibs.configuration import options
from panoptic_ibs.instantiation import model_config

AXES = {
    "consistent_stuff": {"head.consistent_stuff": [False, True]},  # Table III
    "oracle": {"head.inference.oracle": [False, True]},  # Table V
    "coordconv_box_embedding": {"head.coord_conv": [False, True], "head.box_embedding": [False, True]},  # Table VI
    "momentum": {"head.memory.momentum": [0.0, 0.99, 0.999, 0.9999, 0.99999]},  # Table VII
    "box_filter": {"head.loss.box_filter": [None, 2.0, 1.5, 1.2, 1.0]},  # Table VIII
    "margin": {"head.loss.margin": [0.3, 0.2, 0.15, 0.1, 0.0]},  # Table IX
    "dimension": {"head.dimension": [48, 32, 24, 16]},  # Table X
}
TABLE_4 = {  # categories of the embedding, of the detector, source, weight of L_CAE
    "ciae_embedding_separate": ("separate", "separate", "embedding", 1.0),
    "ciae_detector_separate": ("separate", "separate", "detector", 1.0),
    "ciae_embedding_only": ("separate", "merged", "embedding", 1.0),
    "ciae_detector_merged": ("merged", "separate", "detector", 1.0),
    "ciae_no_category": ("merged", "separate", "detector", 0.0),
}


def sweep_parameters(name: str) -> dict[str, list[str]]:
    entry = options.tables()["sweep"][f"ciae_{name}"]
    assert entry["choose"] == {"experiment": "lots", "head": "ciae"}
    return {key: str(values).split(",") for key, values in entry["axes"].items()}


@pytest.mark.parametrize("name", AXES)
def test_sweeps_have_the_axes_of_the_tables(name: str) -> None:
    parameters = sweep_parameters(name)
    assert set(parameters) == set(AXES[name])
    for key, values in parameters.items():
        assert [yaml.safe_load(v) for v in values] == AXES[name][key]
    config = compose("head=ciae", *(f"{key}={values[0]}" for key, values in parameters.items()))
    for key, values in AXES[name].items():
        assert OmegaConf.select(config, key) == values[0]
    model_config(config)  # every option is one of the head's


def test_category_sweep_is_table_4() -> None:
    (components,) = sweep_parameters("category_source").values()
    assert components == list(TABLE_4)
    for component, (embedding, detector, source, weight) in TABLE_4.items():
        head = compose("head=ciae", f"sweep/components={component}").head
        assert (head.thing_categories, head.detector_classes) == (embedding, detector)
        assert (head.category_source, head.loss.category_weight) == (source, weight)


def test_forms_of_ibs_are_a_sweep_of_the_benchmarks_sizes() -> None:
    forms = {"paired_crop": ("none", False), "paired_crop_ibs": ("paired", False), "ciae_other_crops": ("none", True)}
    parameters = sweep_parameters("ibs")
    assert parameters == {"seed": ["0", "1", "2"], "sweep/components": list(forms)}
    for component, (partners, other_crops) in forms.items():
        config = compose("sweep=ciae_ibs", f"sweep/components={component}")
        assert (config.sampling.name, config.ibs.partners) == ("paired_crop", partners)
        assert config.head.loss.other_crops is other_crops
    for sizes, sweep in (([], "embedded_lots"), (["experiment=demo"], "embedded_benchmark")):
        config = compose("sweep=ciae_ibs", "sweep/components=paired_crop", *sizes)
        benchmark = compose(f"sweep={sweep}", "head=ciae", "sweep/components=paired_crop")
        assert (config.data, config.trainer) == (benchmark.data, benchmark.trainer)


def test_published_settings() -> None:
    """Section V-C and Table I."""
    for name, steps, milestones in (
        ("coco_ciae_ablation", 90_000, [60_000, 80_000]),
        ("coco_ciae_r50", 180_000, [120_000, 160_000]),
    ):
        c = compose(f"experiment={name}", "data.root=DIR")
        assert c.sampling.batch_size * c.trainer.devices == 16
        assert (c.trainer.max_steps, c.optim.lr, c.optim.weight_decay) == (steps, 0.01, 1e-4)
        assert list(c.optim.milestones) == milestones
        assert c.optim.optimizer.momentum == 0.9
        assert (c.head.dimension, c.head.loss.margin, c.head.loss.top_k, c.head.inference.stuff_area) == (
            32, 0.15, 5, 4096,
        )  # fmt: skip
        assert (c.head.loss.instance_weight, c.head.loss.thing_factor, c.head.loss.box_filter) == (2.0, 5.0, 1.5)
    assert list(c.sampling.resize.range) == [640, 800]
    for name, backbone in (("r101_dcn", "resnet101"), ("x101_dcn", "resnext101_64x4d")):
        c = compose(f"experiment=coco_ciae_{name}", "data.root=DIR")
        assert (c.backbone.name, c.backbone.deform_stages, c.trainer.max_steps) == (backbone, 3, 180_000)
    ibs = compose("experiment=cityscapes_ciae_ibs", "data.root=DIR")
    assert (ibs.ibs.partners, ibs.sampling.name) == ("paired", "paired_crop")
    assert compose("experiment=demo_ciae").head == compose("experiment=demo", "head=ciae").head
