"""Files of other programs: classes by name, and what cannot be converted refused by the name of what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli_helpers import run
from panoptic_files import write_coco
from panoptic_ibs.classes import ClassInfo
from panoptic_ibs.construction import load
from panoptic_ibs.errors import CheckpointError
from panoptic_ibs.importing import import_checkpoint
from panoptic_ibs.importing.class_order import folder_model, order_of
from panoptic_ibs.importing.programs import OTHERS, program_of
from reference_panoptic_fcn import ReferencePanopticFCN

NAMES = ("road", "sky", "person", "car")  # of tests/panoptic_files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    write_coco(root, "val2017", count=1, size=(64, 96))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of transformers of four classes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install panoptic-ibs[dev]")
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = transformers.ResNetConfig(depths=[1, 1, 1, 1], **stages)
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_queries=5, encoder_layers=1, decoder_layers=2, dim_feedforward=16,
        id2label=dict(enumerate(NAMES)), **small,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf")
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return path


def relabelled(folder: Path, target: Path, labels: Any) -> Path:
    """The same weights under another ``config.json``; ``...`` takes the names out."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = labels
    if labels is ...:
        del config["id2label"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def convert(source: Path, data: Path, out: Path, head: str = "mask2former", *more: str) -> Any:
    return run(
        "convert", f"source={source}", f"head={head}", "data=coco_panoptic", f"data.root={data}", f"out={out}", *more
    )


@pytest.mark.parametrize("given", ["folder", "file"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 0, 1), (2, 3, 1, 0)])
def test_rows_follow_the_names(order: tuple[int, ...], given: str, folder: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    labels = {str(i): NAMES[k].upper() for i, k in enumerate(order)}
    source = relabelled(folder, tmp_path / "model", labels)
    result = convert(source if given == "folder" else source / "model.safetensors", data, tmp_path / "out.ckpt")
    assert result.code == 0, result.err + result.out
    assert ("were moved by name" in result.out) == (list(order) != sorted(order))
    theirs = load_file(folder / "model.safetensors")
    head = load(tmp_path / "out.ckpt").head.query_decoder.classify  # type: ignore[union-attr]
    for mine, name in ((head.weight, "class_predictor.weight"), (head.bias, "class_predictor.bias")):
        for i, k in enumerate(order):  # the file's row i is the class that it names
            assert torch.equal(mine[k], theirs[name][i])
        assert torch.equal(mine[4], theirs[name][4])  # no object


@pytest.mark.parametrize("labels", [..., {str(i): f"LABEL_{i}" for i in range(4)}])
def test_without_names_the_order_is_said(labels: Any, folder: Path, data: Path, tmp_path: Path) -> None:
    result = convert(relabelled(folder, tmp_path / "model", labels), data, tmp_path / "out.ckpt")
    assert result.code == 0, result.err
    assert "names no classes" in result.out
    assert "0 road, 1 sky, 2 person, 3 car" in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "road", "1": "water", "2": "person", "3": "car"}, "1: 'water' there, 'sky' in the data set"),
        ({"0": "road", "1": "sky", "2": "person"}, "3: nothing there, 'car' in the data set"),
        ({"0": "road", "1": "sky", "2": "person", "4": "car"}, "from 0 on"),
        ({"0": "road", "1": "sky", "2": "sky", "3": "car"}, "two classes the name 'sky'"),
        ({"a": "road"}, "id2label"),
        (["road"], "id2label is .* expected: an object"),
        ({"0": 5}, r"id2label\.0 is 5; expected: text"),
    ],
)
def test_other_classes(labels: Any, message: str, folder: Path, data: Path, tmp_path: Path) -> None:
    result = convert(relabelled(folder, tmp_path / "model", labels), data, tmp_path / "out.ckpt")
    assert result.code == 2
    assert "config.json" in result.err
    assert "Traceback" not in result.err
    import re

    assert re.search(message, result.err), result.err
    assert not (tmp_path / "out.ckpt").exists()


def test_other_models_of_transformers(folder: Path, data: Path, tmp_path: Path) -> None:
    source = relabelled(folder, tmp_path / "model", {"0": "a"})
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "eomt", "architectures": ["EomtForUniversalSegmentation"]}
    (source / "config.json").write_text(json.dumps(config))
    result = convert(source, data, tmp_path / "out.ckpt")
    assert result.code == 2
    assert "is a EomtForUniversalSegmentation (transformers, model_type 'eomt'" in result.message
    (source / "config.json").write_text("{")
    assert "is not a valid JSON" in convert(source, data, tmp_path / "out.ckpt").message
    assert folder_model(folder).kind == "Mask2FormerForUniversalSegmentation"  # type: ignore[union-attr]


def test_positions_of_things_and_stuff() -> None:
    classes = [ClassInfo(n, i, n in ("person", "car"), (0, 0, 0)) for i, n in enumerate(NAMES)]
    order = order_of(("car", "sky", "person", "road"), classes, "x")
    assert (order.classes, order.things, order.stuff) == ([3, 1, 2, 0], [1, 0], [1, 0])
    assert not order.same
    assert order_of(NAMES, classes, "x").same
    assert order_of(("car", "person"), classes[2:], "x").classes == [1, 0]


def test_panoptic_fcn_on_annotations_in_another_order(data: Path, tmp_path: Path) -> None:
    """Its files name no classes; where the data set has the published ones, those say which row is which."""
    torch.manual_seed(0)
    state = ReferencePanopticFCN(80, 54, deform=False).state_dict()
    torch.save(state, tmp_path / "m.pth")
    from panoptic_ibs.data.class_tables import published_classes

    published = published_classes("coco_panoptic")
    assert published is not None
    swapped = published.to_coco()
    swapped[0], swapped[2] = swapped[2], swapped[0]  # car, bicycle, person
    swapped[130], swapped[132] = swapped[132], swapped[130]
    root = tmp_path / "set"
    write_coco(root, "val2017", count=1, size=(64, 96))
    file = root / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    content["categories"] = swapped
    for annotation in content["annotations"]:
        annotation["segments_info"] = [{**s, "category_id": 1} for s in annotation["segments_info"]]
    file.write_text(json.dumps(content))
    result = convert(tmp_path / "m.pth", root, tmp_path / "out.ckpt", "panoptic_fcn")
    assert result.code == 0, result.err + result.out
    assert "were moved by name" in result.out
    head = load(tmp_path / "out.ckpt").head.position_head  # type: ignore[union-attr]
    things, stuff = state["position_head.out_inst.weight"], state["position_head.out_sem.weight"]
    assert torch.equal(head.out_thing.weight, things[[2, 1, 0, *range(3, 80)]])
    assert torch.equal(head.out_stuff.weight, stuff[[*range(51), 53, 52, 51]])


SIGNS: dict[str, tuple[str, ...]] = {
    "OneFormer": ("task_mlp.layers.0.weight", "sem_seg_head.predictor.class_embed.weight"),
    "OneFormer (transformers)": ("model.task_encoder.task_mlp.layers.0.weight",),
    "kMaX": ("sem_seg_head.predictor._kmax_transformer_layers.0._ffn_conv1_bn.conv.weight",),
    "Mask DINO": ("sem_seg_head.predictor.label_enc.weight", "sem_seg_head.predictor.class_embed.weight"),
    "MaskFormer (detectron2)": (
        "sem_seg_head.predictor.class_embed.weight",
        "sem_seg_head.predictor.transformer.decoder.layers.0.linear1.weight",
    ),
    "MaskFormer (transformers)": ("class_predictor.weight", "model.pixel_level_module.decoder.fpn.stem.0.weight"),
    "EoMT (transformers)": ("class_predictor.weight", "upscale_block.block.0.conv1.weight"),
    "EoMT": ("network.q.weight", "network.class_head.weight"),
    "DETR": ("class_embed.weight", "bbox_embed.layers.0.weight", "transformer.encoder.layers.0.linear1.weight"),
    "DETR of panoptic": ("detr.class_embed.weight", "detr.bbox_embed.layers.0.weight"),
    "other proposals": ("proposal_generator.centernet_head.cls_logits.weight",),
    "Panoptic-DeepLab": ("ins_embed_head.decoder.res2.project_conv.weight",),
    "mmdetection": ("panoptic_head.cls_embed.weight",),
    "backbone.weights=FILE": ("conv1.weight", "layer1.0.conv1.weight", "fc.weight"),
}


@pytest.mark.parametrize("what", SIGNS)
@pytest.mark.parametrize("head", ["mask2former", "panoptic_fcn"])
def test_what_cannot_be_converted_is_named(what: str, head: str) -> None:
    state: dict[str, Tensor] = {name: torch.zeros(2, 2) for name in SIGNS[what]}
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(state, head, 19, 11)
    assert what in str(caught.value)
    assert "cannot be converted" in str(caught.value)


def test_no_sign_takes_what_is_converted() -> None:
    """Names of the programs that are converted belong to no other."""
    assert program_of(ReferencePanopticFCN(8, 19, deform=True).state_dict()) is None
    assert program_of(["sem_seg_head.predictor.class_embed.weight", "backbone.res2.0.conv1.weight"]) is None
    assert len({name for name, _ in OTHERS}) >= 18


def test_the_other_head_and_own_checkpoints(tmp_path: Path, data: Path) -> None:
    state = {"class_predictor.weight": torch.zeros(5, 4)}
    with pytest.raises(CheckpointError, match=r"of Mask2Former \(transformers\)\. Is head=panoptic_fcn right\?"):
        import_checkpoint(state, "panoptic_fcn", 4, 2)
    torch.save({"state_dict": {}, "panoptic_ibs": {}}, tmp_path / "own.ckpt")
    result = convert(tmp_path / "own.ckpt", data, tmp_path / "out.ckpt")
    assert "is a checkpoint of this package already" in result.message
    torch.save({"class_predictor.weight": torch.full((5, 4), torch.nan)}, tmp_path / "nan.pth")
    assert "NaN or infinity" in convert(tmp_path / "nan.pth", data, tmp_path / "out.ckpt").message
