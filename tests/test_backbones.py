from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from panoptic_ibs.backbones import TimmBackbone
from panoptic_ibs.backbones.deformable import DeformableBackbone
from panoptic_ibs.backbones.folding import FoldedConv, FoldedNorm, unfold
from panoptic_ibs.errors import CheckpointError, ConfigError

NAME = "resnet18"


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(NAME, pretrained=False)


def features_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval().forward_features(images)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "nested", "by order"])
def test_weights_from_a_file(kind: str, whole: torch.nn.Module, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in whole.state_dict().items()}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "nested":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    elif kind == "by order":
        torch.save({f"other_{i}": v for i, v in enumerate(state.values())}, path)
    else:
        torch.save(state, path)
    backbone = TimmBackbone(NAME, weights=path).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(images)[-1], features_of(whole, images))


def test_files_that_do_not_fit(whole: torch.nn.Module, tmp_path: Path) -> None:
    state = whole.state_dict()
    with pytest.raises(CheckpointError, match="no file"):
        TimmBackbone(NAME, weights=tmp_path / "nothing.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("layer3")}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"missing or misshapen, first 'layer3"):
        TimmBackbone(NAME, weights=tmp_path / "part.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="neither by name nor by order"):
        TimmBackbone(NAME, weights=tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not a file")
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        TimmBackbone(NAME, weights=tmp_path / "broken.pth")


def test_a_hostile_pickle_is_not_executed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (witness,))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="refused"):
        TimmBackbone(NAME, weights=tmp_path / "evil.pth")
    assert not witness.exists()


def test_download_that_fails_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options):
        if pretrained:
            raise OSError("no route to the hub")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"backbone\.weights=FILE"):
        TimmBackbone(NAME, pretrained=True)


def test_levels_freezing_and_names() -> None:
    backbone = TimmBackbone(NAME, frozen_stages=2, freeze_norm=True)
    assert [tuple(lv) for lv in backbone.levels] == [(4, 64), (8, 128), (16, 256), (32, 512)]
    frozen = {n.split(".")[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert not [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    stem = {n.split(".")[1] for n, p in TimmBackbone(NAME, frozen_stages=1).named_parameters() if not p.requires_grad}
    assert stem == {"conv1", "bn1"}
    with pytest.raises(ConfigError, match="near names"):
        TimmBackbone("resnet_eighteen")
    with pytest.raises(ConfigError, match="frozen_stages"):
        TimmBackbone("hrnet_w18_small", frozen_stages=2)


@pytest.mark.parametrize(("stages", "blocks"), [(1, {"0"}), (2, {"0", "1"}), (4, {"0", "1", "2", "3", "4"})])
def test_stages_inside_another_module_are_frozen(stages: int, blocks: set[str]) -> None:
    """EfficientNet's stages lie in ``blocks``; stride 4 ends with block 1, stride 16 with block 4."""
    backbone = TimmBackbone("efficientnet_lite0", frozen_stages=stages)
    frozen = [n.split(".") for n, p in backbone.named_parameters() if not p.requires_grad]
    assert {n[2] for n in frozen if n[1] == "blocks"} == blocks
    assert {n[1] for n in frozen} == {"conv_stem", "bn1", "blocks"}
    trained = {n.split(".")[2] for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {str(i) for i in range(7)} - blocks


def test_channels_last_backbone_gives_channels_first() -> None:
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", options={"strict_img_size": False}).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in backbone(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]


def test_stride_in_the_first_convolution() -> None:
    """As in the MSRA weights: the 1 x 1 convolution of a block skips pixels, the 3 x 3 one sees the rest."""
    torch.manual_seed(0)
    options = {"options": {"layers": [1, 1, 1, 1]}}
    usual, msra = TimmBackbone("resnet50", **options).eval(), TimmBackbone("resnet50", stride_in_1x1=True, **options)
    for norm in (usual.model.layer1[0].bn3, usual.model.layer2[0].bn3):
        torch.nn.init.ones_(norm.weight)  # timm starts them at zero, which would hide the blocks
    msra.load_state_dict(usual.state_dict())
    block = msra.eval().model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    images = torch.randn(1, 3, 64, 64)
    mine, others = msra(images), usual(images)
    assert [m.shape for m in mine] == [o.shape for o in others]
    torch.testing.assert_close(mine[0], others[0])  # no stride in the first stage
    assert not torch.allclose(mine[1], others[1])
    with pytest.raises(ConfigError, match="no ResNet bottleneck"):
        TimmBackbone("resnet18", stride_in_1x1=True)


@pytest.mark.parametrize("size", [(64, 96), (224, 224)])
def test_swin_outputs(size: tuple[int, int]) -> None:
    """On maps that windows tile, padding first and shifting first are the same: timm's own features come out."""
    torch.manual_seed(0)
    tiny = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", output_norm=True, options=tiny).eval()
    images = torch.randn(1, 3, *size)
    features = backbone(images)
    for feature, level in zip(features, backbone.levels, strict=True):
        assert feature.shape == (1, level.channels, size[0] // level.stride, size[1] // level.stride)
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-4, rtol=0)  # normed
    if size == (224, 224):
        plain = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, strict_img_size=False, always_partition=True, **tiny
        ).eval()  # fmt: skip
        plain.load_state_dict(backbone.model.state_dict())
        for mine, theirs in zip(backbone.model(images), plain(images), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", ["detectron2", "caffe2"])
def test_imagenet_weights_of_detectron2(names: str, tmp_path: Path) -> None:
    """Pickles of arrays, in the names of ImageNetPretrained/torchvision and of the older ImageNetPretrained/MSRA."""
    torch.manual_seed(0)
    own = timm.create_model("resnet50", pretrained=False)
    state, renamed = own.state_dict(), {}
    for name, value in state.items():
        if "norm" in names or name.startswith("fc") or name.endswith("num_batches_tracked"):
            continue
        stage, _, rest = name.partition(".")
        if names == "detectron2":
            rest = re.sub(r"bn(\d)", r"conv\1.norm", rest).replace("downsample.0", "shortcut")
            rest = rest.replace("downsample.1", "shortcut.norm")
            new = f"res{int(stage[5:]) + 1}.{rest}" if stage.startswith("layer") else f"stem.conv1.{rest}"
            new = new.replace("stem.conv1.", "stem.conv1.norm.") if stage == "bn1" else new
        elif name.endswith(("running_mean", "running_var")):
            value.copy_(torch.zeros_like(value) if "mean" in name else torch.ones_like(value) - 1e-5)  # folded
            continue
        else:
            kind = "w" if value.ndim == 4 else "bn_s" if name.endswith("weight") else "bn_b"
            block, _, part = rest.partition(".")
            branch = "branch1" if "downsample" in part else "branch2" + " abc"[int(part[4 if "conv" in part else 2])] \
                if stage.startswith("layer") else ""  # fmt: skip
            new = f"res{int(stage[5:]) + 1}_{block}_{branch}_{kind}" if branch else ("conv1_w", "res_conv1_bn_s",
                "res_conv1_bn_b")[["w", "bn_s", "bn_b"].index(kind)]  # fmt: skip
        renamed[new] = value.numpy()
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"model": renamed, "matching_heuristics": True}))
    backbone = TimmBackbone("resnet50", weights=tmp_path / "R-50.pkl", freeze_norm=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)[-1], features_of(own, images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "deform"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_fixed_norms_are_folded_into_convolutions(name: str, deform: bool) -> None:
    """Same outputs, gradients and names as with the norms on their own; copies are independent."""
    options: Any = {"freeze_norm": True, "options": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16]}}
    torch.manual_seed(0)
    backbone = (DeformableBackbone if deform else TimmBackbone)(name, **options)
    g = torch.Generator().manual_seed(1)
    for key, value in backbone.state_dict().items():
        if "bn" in key or "downsample.1" in key:
            value.copy_(0.5 + torch.rand(value.shape, generator=g))
    plain = copy.deepcopy(backbone)
    folded = [m for m in plain.modules() if isinstance(m, FoldedConv)]
    assert len(folded) == {"resnet18": 13, "resnet50": 16 - 3 * deform}[name]
    for conv in folded:
        unfold(conv)
    assert not any(isinstance(m, FoldedConv | FoldedNorm) for m in plain.modules())
    assert any(isinstance(m, FoldedNorm) for m in backbone.modules())
    assert list(plain.state_dict()) == list(backbone.state_dict())
    image = torch.randn(2, 3, 64, 64, generator=g)
    results = []
    for network in (backbone, plain):
        outputs = network(image)
        sum((x**2).sum() for x in outputs).backward()
        results.append([*outputs, *(p.grad for p in network.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
