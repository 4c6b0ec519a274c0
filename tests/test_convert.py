"""Checkpoints of other programs: names, and above all that the converted network computes what the original does."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cli_helpers import run
from helpers import random_target
from panoptic_files import write_coco
from panoptic_ibs.construction import load
from panoptic_ibs.data.class_tables import published_classes
from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.importing import import_checkpoint
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.structures import Batch, ImageSize
from reference_panoptic_fcn import ReferencePanopticFCN

RGB_MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def convert(source: Path, out: Path, head: str, data: str, *more: str) -> PanopticModel:
    result = run("convert", f"source={source}", f"out={out}", f"head={head}", f"data={data}", *more)
    assert result.code == 0, result.err + result.out
    return load(out)


def outputs(model: PanopticModel, image: Tensor) -> Any:
    size = (image.shape[1], image.shape[2])
    batch = Batch(image[None], [], [ImageSize(size, size)], torch.tensor([-1]))
    with torch.no_grad():
        return model(batch)


def relative(mine: Tensor, reference: Tensor) -> float:
    return ((mine - reference).norm() / reference.norm()).item()


def picture(height: int, width: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=g)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (smooth * 255 + 20 * torch.randn(3, height, width, generator=g)).clamp(0, 255).to(torch.uint8)


# --- Mask2Former against transformers, the whole network at its published size ---------------------------


def hugging_face(kind: str, seed: int = 0) -> nn.Module:
    """transformers' Mask2Former with random weights, none of them at a neutral value."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install panoptic-ibs[dev]")
    torch.manual_seed(seed)
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if kind == "swin":
        sizes = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
        backbone = transformers.SwinConfig(**sizes, **stages)
    else:
        backbone = transformers.ResNetConfig(**stages)
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=19, train_num_points=300, use_auxiliary_loss=True,
        output_auxiliary_logits=True,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "running_var" in name:
            value.data.uniform_(0.7, 1.3)
        elif "running_mean" in name or name.endswith("bias"):
            value.data.normal_(std=0.05)
        elif value.ndim == 1 and "weight" in name and "empty" not in name:
            value.data.uniform_(0.8, 1.2)
        elif re.search("relative_position_bias_table|sampling_offsets|attention_weights", name):
            value.data.add_(0.05 * torch.randn_like(value))
    return model


@pytest.fixture(scope="module", params=["resnet", "swin"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, PanopticModel]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = hugging_face(request.param)
    theirs.save_pretrained(folder / "model")
    return theirs, convert(folder / "model", folder / "out.ckpt", "mask2former", "cityscapes")


def test_the_whole_network_equals_transformers(pair: tuple[nn.Module, PanopticModel]) -> None:
    """R50 and Swin-T, all ten outputs. The map sizes are no multiples of Swin's window.

    Attention masks are steps at zero: rounding, which differs between processors and numbers of threads, may turn a
    logit of the order of 1e-6 over the step, on either side, and moves the outputs behind it by some 1e-4. The first
    output has no such step before it.
    """
    theirs, ours = pair
    image = picture(160, 224, seed=5)
    mean, std = torch.tensor(RGB_MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs((image.float() - mean)[None] / std)
    output = outputs(ours, image)
    last = {k: expected[k] for k in ("class_queries_logits", "masks_queries_logits")}
    layers = [*expected.auxiliary_logits, last]
    assert len(layers) == len(output.logits) == 10
    for i, layer in enumerate(layers):
        masks = torch.einsum("bqc,bchw->bqhw", output.embeddings[i], output.features)
        bound = 1e-3 if i else 1e-4
        assert relative(output.logits[i], layer["class_queries_logits"]) < bound, f"classes of output {i}"
        assert relative(masks, layer["masks_queries_logits"]) < bound, f"masks of output {i}"


def test_the_losses_equal_transformers(pair: tuple[nn.Module, PanopticModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sampled points fixed, on one crop with and one without a target."""
    theirs, ours = pair
    import transformers.models.mask2former.modeling_mask2former as reference

    import panoptic_ibs.heads.mask2former.losses as own

    targets = [random_target(ours.classes, (64, 96), segments=n, seed=n + 3) for n in (6, 1)]
    images = torch.stack([picture(64, 96, seed) for seed in (1, 2)])
    fixed = torch.rand(1, 12544, 2, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(reference.torch, "rand", lambda *shape, **_: fixed[:, : shape[1]].expand(shape[0], -1, -1))
    theirs.criterion.sample_points_using_uncertainty = lambda maps, *_: fixed.expand(maps.shape[0], -1, -1)
    theirs.criterion.matcher.num_points = theirs.criterion.num_points = 12544
    monkeypatch.setattr(own, "uncertain_points", lambda maps, *_: fixed.expand(len(maps), -1, -1))
    visible = [(t.areas > 1).nonzero().squeeze(1) for t in targets]
    masks = [torch.stack([(t.id_map == r + 1).float() for r in v]) for t, v in zip(targets, visible, strict=True)]
    labels = [t.class_ids[v] for t, v in zip(targets, visible, strict=True)]
    mean, std = torch.tensor(RGB_MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    sizes = [ImageSize((64, 96), (64, 96))] * 2
    with torch.no_grad():
        expected = theirs((images.float() - mean) / std, mask_labels=masks, class_labels=labels).loss
        losses, _ = ours.losses(Batch(images, targets, sizes, torch.tensor([-1, -1])))
    torch.testing.assert_close(sum(losses.values()), expected.squeeze(), rtol=1e-4, atol=1e-4)


# --- the reference programs' names -----------------------------------------------------------------------


def to_detectron2(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """transformers' names to those of the reference Mask2Former, written down from its modules."""
    result: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    pixel, query, layer = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor.", r"Q\.decoder\.layers\.(\d)\."
    cross, own, ffn = (rf"{query}transformer_{k}_layers.\1." for k in ("cross_attention", "self_attention", "ffn"))
    table = [
        (r"P\.encoder\.layers\.", pixel + "transformer.encoder.layers."),
        (r"P\.level_embed", pixel + "transformer.level_embed"),
        (r"P\.input_projections", pixel + "input_proj"),
        (r"P\.mask_projection", pixel + "mask_features"),
        (r"P\.(adapter_1|layer_1)\.0", pixel + r"\1"),
        (r"P\.(adapter_1|layer_1)\.1", pixel + r"\1.norm"),
        (r"Q\.queries_features", query + "query_feat"),
        (r"Q\.queries_embedder", query + "query_embed"),
        (r"Q\.level_embed", query + "level_embed"),
        (r"Q\.decoder\.layernorm", query + "decoder_norm"),
        (r"Q\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0", query + r"mask_embed.layers.\1"),
        (r"class_predictor", query + "class_embed"),
        (layer + r"cross_attn\.", cross + "multihead_attn."),
        (layer + r"cross_attn_layer_norm", cross + "norm"),
        (layer + r"self_attn_layer_norm", own + "norm"),
        (layer + r"self_attn\.out_proj", own + "self_attn.out_proj"),
        (layer + r"fc(\d)", ffn + r"linear\2"),
        (layer + r"final_layer_norm", ffn + "norm"),
    ]
    for name, value in state.items():
        short = name.replace("model.pixel_level_module.decoder", "P").replace("model.transformer_module", "Q")
        new = next((re.sub("^" + old, made, short) for old, made in table if re.match(old, short)), short)
        if new.startswith("sem_seg_head.pixel_decoder.transformer.encoder"):
            for theirs, reference in [("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2"),
                                      ("fc1", "linear1"), ("fc2", "linear2")]:  # fmt: skip
                new = new.replace(theirs, reference)
        if match := re.match(layer + r"self_attn\.([qkv])_proj\.(\w+)", new):
            key = f"{query}transformer_self_attention_layers.{match[1]}.self_attn.in_proj_{match[3]}"
            joined.setdefault(key, {})[match[2]] = value
            continue
        if "pixel_level_module.encoder" in new:
            new = backbone_name(new.split("pixel_level_module.encoder.")[1], kind)
            if match := re.match(r"(.*\.attn\.)(query|key|value)(\..*)", new):
                joined.setdefault(f"{match[1]}qkv{match[3]}", {})[match[2][0]] = value
                continue
        if new:
            result[new] = value
    for key, parts in joined.items():
        result[key] = torch.cat([parts[p] for p in "qkv"])
    return result


def backbone_name(name: str, kind: str) -> str:
    if kind == "resnet":
        name = name.replace("embedder.embedder", "stem.conv1")
        name = re.sub(r"encoder\.stages\.(\d)\.layers\.", lambda m: f"res{int(m[1]) + 2}.", name)
        name = re.sub(r"\.layer\.(\d)\.", lambda m: f".conv{int(m[1]) + 1}.", name)
        return "backbone." + name.replace(".convolution.", ".").replace(".normalization.", ".norm.")
    if "layernorm." in name and "layers" not in name:
        return ""  # the classifier's
    name = re.sub(r"hidden_states_norms\.stage(\d)", lambda m: f"norm{int(m[1]) - 1}", name)
    for theirs, reference in [
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.norm", "patch_embed.norm"),
        ("encoder.layers", "layers"), ("attention.self.relative", "attn.relative"), ("attention.self.", "attn."),
        ("attention.output.dense", "attn.proj"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
        ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    ]:  # fmt: skip
        name = name.replace(theirs, reference)
    return "backbone." + name


def test_mask2former_of_detectron2(pair: tuple[nn.Module, PanopticModel], tmp_path: Path) -> None:
    """The same weights under the reference program's names give the very same network."""
    from safetensors.torch import load_file

    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "model")
    kind, form = ("swin", "pth") if ours.backbone.name.startswith("swin") else ("resnet", "pkl")
    state = to_detectron2(load_file(tmp_path / "model" / "model.safetensors"), kind)
    if kind == "swin":
        state["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    if form == "pkl":  # the oldest layout: no pixel_decoder in the names, static_query
        state = {k.replace("pixel_decoder.", "").replace("query_feat", "static_query"): v for k, v in state.items()}
        arrays = {k: v.numpy() for k, v in state.items()}
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    else:
        torch.save({"model": state, "optimizer": {"lr": np.float64(1e-4)}, "iteration": 9}, tmp_path / "m.pth")
    converted = convert(tmp_path / f"m.{form}", tmp_path / "out.ckpt", "mask2former", "cityscapes")
    expected = ours.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in converted.state_dict().items())


@pytest.mark.parametrize(
    ("data", "form", "things", "stuff", "options"),
    [
        ("cityscapes", "pkl", 8, 19, {"deform": True}),  # all classes are predicted as stuff
        ("vistas", "pth", 37, 29, {"deform": False, "depths": (1, 2, 1, 1)}),  # things merged into one
        ("coco_panoptic", "pth", 80, 54, {"deform": True, "deform_features": True, "features": 64}),  # Panoptic FCN*
    ],
)
def test_panoptic_fcn_of_detectron2(
    data: str, form: str, things: int, stuff: int, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    reference = ReferencePanopticFCN(things, stuff, **options).eval()
    state = reference.state_dict()
    if form == "pkl":
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in state.items()}}))
    else:
        torch.save({"model": state, "iteration": 64999}, tmp_path / "m.pth")
    ours = convert(tmp_path / f"m.{form}", tmp_path / "out.ckpt", "panoptic_fcn", data)
    image = picture(88, 136, seed=3)  # odd: padded to 96 x 160
    with torch.no_grad():
        # The published configurations subtract this list from BGR images, in this order.
        expected = reference(image.flip(0), mean=RGB_MEAN)
    output = outputs(ours, image)
    found = {"centers": output.centers, "regions": output.regions, "kernels": output.kernels}
    found["features"] = [output.features]
    embed = ours.head.thing_generator
    found["things"] = [embed(k.movedim(1, -1)).movedim(-1, 1) for k in output.kernels]
    for name, maps in found.items():
        for level, (mine, theirs) in enumerate(zip(maps, expected[name], strict=True)):
            assert mine.shape == theirs.shape
            assert relative(mine, theirs) < 1e-4, f"{name} of level {level}"
    thresholds = {"cityscapes": (0.01, 0.97, 2048), "vistas": (0.2, 0.95, 2048), "coco_panoptic": (0.05, 0.9, 4096)}
    used = ours.head.inference
    assert (used.center_threshold, used.similarity, used.stuff_area) == thresholds[data]
    sizes = {"cityscapes": (1024, 2048), "vistas": (2048, 2048), "coco_panoptic": (800, 1333)}
    assert ours.test_size == sizes[data]
    assert ours.classes.names == published_classes(data).names  # type: ignore[union-attr]


# --- what can go wrong -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panoptic_fcn_state() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return ReferencePanopticFCN(8, 19, deform=False).state_dict()


def failing(
    tmp_path: Path, state: Any, *more: str, head: str = "panoptic_fcn", data: str = "cityscapes"
) -> tuple[str, str]:
    torch.save(state, tmp_path / "m.pth")
    out = tmp_path / "out.ckpt"
    result = run("convert", f"source={tmp_path / 'm.pth'}", f"out={out}", f"head={head}", f"data={data}", *more)
    assert result.code == 2, result.out
    assert not out.exists()
    return result.message, result.out


def test_every_name_is_accounted_for(panoptic_fcn_state: dict[str, Tensor], tmp_path: Path) -> None:
    state = dict(panoptic_fcn_state)
    del state["kernel_head.out_conv.bias"]
    state["kernel_head.out_conv.weight"] = torch.zeros(64, 64, 1, 1)
    state["extra.weight"] = torch.zeros(2)
    message, table = failing(tmp_path, state)
    assert "1 tensors are unused, 1 missing and 1 misshapen" in message
    flat = " ".join(table.split())
    assert "extra.weight" in flat
    assert "head.kernel_head.out.bias" in flat
    assert "(64, 64, 1, 1) in the file, (64, 64, 3, 3) here" in flat
    model = convert(tmp_path / "m.pth", tmp_path / "out.ckpt", "panoptic_fcn", "cityscapes", "allow_partial=true")
    assert isinstance(model, PanopticModel)


def test_an_instance_segmentation_checkpoint_is_recognised() -> None:
    from panoptic_ibs.importing.mask2former import options

    torch.manual_seed(0)
    weights = {
        "query_decoder.classify.weight": torch.zeros(9, 32),
        "query_decoder.query.weight": torch.zeros(7, 32),
        "pixel_decoder.layers.1.linear1.weight": torch.zeros(5, 32),
        "pixel_decoder.layers.0.linear1.weight": torch.zeros(5, 32),
        "query_decoder.layers.0.linear1.weight": torch.zeros(6, 32),
    }
    found = options(weights, num_classes=19, num_stuff=11)
    assert found == {
        "task": "instance", "queries": 7, "channels": 32, "encoder_depth": 2, "decoder_depth": 1, "encoder_hidden": 5,
        "decoder_hidden": 6,
    }  # fmt: skip
    assert options({**weights, "query_decoder.classify.weight": torch.zeros(20, 32)}, 19, 11)["task"] == "panoptic"
    with pytest.raises(CheckpointError, match="tells 8 classes apart; the data set has 65, of which 37 are things"):
        options(weights, num_classes=65, num_stuff=28)


def test_what_does_not_fit(panoptic_fcn_state: dict[str, Tensor], tmp_path: Path) -> None:
    assert "8 thing and 19 stuff channels" in failing(tmp_path, panoptic_fcn_state, data="vistas")[0]
    assert "Is head=mask2former right?" in failing(tmp_path, panoptic_fcn_state, head="mask2former")[0]
    assert "no checkpoint of Panoptic FCN" in failing(tmp_path, {"a": torch.zeros(1)})[0]
    assert "no published classes" in failing(tmp_path, panoptic_fcn_state, data="synthetic")[0]
    headless = {k: v for k, v in panoptic_fcn_state.items() if "bottom_up" not in k}
    assert "neither a ResNet nor a Swin" in failing(tmp_path, headless)[0]
    with pytest.raises(ConfigError, match="can be converted for"):
        import_checkpoint({}, "ciae", 19, 11)
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        import_checkpoint({"position_head.out_inst.weight": torch.zeros(8, 1, 3, 3)}, "panoptic_fcn", 19, 11)


def test_converted_checkpoints_go_everywhere(panoptic_fcn_state: dict[str, Tensor], tmp_path: Path) -> None:
    """predict takes it as ckpt_path; overrides are heeded; train says that init_from is the way."""
    from PIL import Image

    torch.save({"model": panoptic_fcn_state}, tmp_path / "m.pth")
    model = convert(
        tmp_path / "m.pth", tmp_path / "out.ckpt", "panoptic_fcn", "cityscapes",
        "+overrides.model.test_size=[96,192]", "+overrides.head.inference.center_threshold=0.5",
    )  # fmt: skip
    assert model.test_size == (96, 192)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "black.png")
    result = run(
        "predict", f"ckpt_path={tmp_path / 'out.ckpt'}", f"input={tmp_path / 'black.png'}", f"output={tmp_path / 'p'}",
        "device=cpu",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (tmp_path / "p" / "panoptic.json").is_file()


def test_classes_of_own_annotations_evaluation_and_fine_tuning(tmp_path: Path) -> None:
    """With data.root the classes are the data set's own; the result evaluates there, and training starts from it."""
    root = tmp_path / "set"
    for split in ("train2017", "val2017"):
        write_coco(root, split, count=2, size=(64, 96))
    torch.manual_seed(4)
    torch.save(ReferencePanopticFCN(2, 3, deform=False).state_dict(), tmp_path / "m.pth")
    data = (f"data.root={root}", "data.num_workers=0", f"paths.cache={tmp_path / 'cache'}")
    out = tmp_path / "out.ckpt"
    small = "+overrides.model.test_size=[64,96]"
    model = convert(tmp_path / "m.pth", out, "panoptic_fcn", "coco_panoptic", *data[:1], small)
    assert model.classes.names == ("road", "sky", "person", "car")
    result = run(
        "evaluate", f"ckpt_path={out}", "data=coco_panoptic", *data, f"run_dir={tmp_path / 'e'}", "trainer=cpu"
    )
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["num_images"] == 2
    train = (
        "data=coco_panoptic", *data, "trainer=cpu", "trainer.max_steps=1", "sampling.batch_size=2", "debug=fast",
        "data.presets.crop_size=[64,64]", "ibs=random", f"init_from={out}", f"run_dir={tmp_path / 'r'}",
        "head.channels=64", "head.feature_channels=32", "head.norm_groups=32", "head.deform=false",
    )  # fmt: skip
    wrong = run("train", *train, "backbone=resnet50", "backbone.pretrained=false")
    assert wrong.code == 2
    assert "backbone=resnet50_msra" in wrong.message
    right = run("train", *train, "backbone=resnet50_msra", "+backbone.options={layers:[1,1,1,1]}")
    assert right.code == 0, right.err
    assert re.search(r"missing +0", right.out)
    assert re.search(r"misshapen +0", right.out)
