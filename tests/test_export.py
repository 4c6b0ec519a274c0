"""Exported networks beside the network they came from: PyTorch's file, and ONNX's in onnxruntime."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_helpers import compose, run
from helpers import class_table
from panoptic_ibs import extras, instantiation
from panoptic_ibs.construction import build_model
from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.export import export_network
from panoptic_ibs.exporting import named_tensors
from panoptic_ibs.heads.panoptic_fcn import PanopticFCN
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.structures import Batch, ImageSize

SIZE = (64, 96)
HEADS = {
    "panoptic_fcn": ("head.channels=8", "head.feature_channels=8", "head.depth=1", "model.channel_order=bgr"),
    "mask2former": ("head.channels=32", "head.queries=4", "head.encoder_depth=1", "head.decoder_depth=1",
                    "head.encoder_hidden=16", "head.decoder_hidden=16"),
    "ciae": ("head.channels=8", "head.embedding_channels=8"),
    "panoptic_fpn": (),
}  # fmt: skip
needs_onnx = pytest.mark.skipif(
    bool(extras.missing("onnx", "onnxscript", "onnxruntime")), reason='needs pip install "panoptic-ibs[export]"'
)


def network(head: str) -> PanopticModel:
    torch.manual_seed(0)
    config = compose("recipe=none", "backbone=tiny", f"head={head}", *HEADS[head])
    model = build_model(instantiation.model_config(config), class_table()).eval()
    for parameter in model.parameters():  # biases and norms that are not those of the start
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def pictures(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (1, 3, *SIZE), generator=generator, dtype=torch.uint8) for _ in range(count)]


def raw(model: PanopticModel, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's own way from a batch to the head's output."""
    with torch.inference_mode():
        output = model(Batch(image, [], [ImageSize(SIZE, SIZE)], torch.tensor([-1])))
        exported = model.head.exported(output)
    found: dict[str, torch.Tensor] = {}
    assert exported is output or {f.name for f in dataclasses.fields(output)} <= exported.keys()
    for name, value in (exported if isinstance(exported, dict) else vars(exported)).items():
        if isinstance(value, list):
            found |= {f"{name}.{i}": item for i, item in enumerate(value)}
        elif value is not None:
            found[name] = value
    return found


def alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("head", ["mask2former", "ciae"])
def test_pytorchs_file_computes_the_raw_outputs(head: str, tmp_path: Path) -> None:
    model = network(head)
    out = tmp_path / "deep" / "network.pt2"
    assert export_network(model, out, "torch", SIZE) < 1e-4  # type: ignore[operator]
    about = {"panoptic_ibs": ""}
    program = torch.export.load(out, extra_files=about).module()
    for image in pictures(2):
        alike(program(image), raw(model, image))
    told = json.loads(about["panoptic_ibs"])
    assert told["classes"] == model.classes.to_list()
    assert told["input"]["shape"] == [1, 3, *SIZE]


def test_panoptic_fcn_exports_the_embeddings_of_every_position() -> None:
    model = network("panoptic_fcn")
    found, head = raw(model, pictures(1)[0]), model.head
    assert isinstance(head, PanopticFCN)
    pairs = ((head.thing_generator, "thing_embeddings.1"), (head.stuff_generator, "stuff_embeddings.1"))
    for generator, name in pairs:
        kernels = found["kernels.1"]
        for y, x in ((0, 0), (2, 3), (3, 5)):
            with torch.inference_mode():
                alone = generator(kernels[:, :, y, x])
            torch.testing.assert_close(found[name][:, :, y, x], alone)


@needs_onnx
def test_onnx_file_computes_the_raw_outputs_in_onnxruntime(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = network("panoptic_fcn")
    out = tmp_path / "network.onnx"
    assert export_network(model, out, "onnx", SIZE) < 1e-3  # type: ignore[operator]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for image in pictures(2):
        values = session.run(None, {"image": image.numpy()})
        alike(dict(zip(names, map(torch.from_numpy, values), strict=True)), raw(model, image))
    (entry,) = onnx.load(out).metadata_props
    assert (entry.key, json.loads(entry.value)["outputs"]) == ("panoptic_ibs", names)
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]


def test_a_head_whose_weights_work_on_regions_says_that_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"The head PanopticFPN cannot be exported: \d+ of its weights \(.*work on what is chosen"
    ):
        export_network(network("panoptic_fpn"), tmp_path / "x.pt2", "torch", SIZE)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_or_named_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("ciae")
    with pytest.raises(ConfigError, match=r"size=\[64, 100\]: height and width must be multiples of 32"):
        export_network(model, tmp_path / "x", "torch", (64, 100))
    with pytest.raises(ConfigError, match=r"holds a str \(a\.1\)"):
        list(named_tensors({"a": [torch.zeros(1), "b"]}))

    def untraceable(features: Any) -> Any:
        raise RuntimeError("data dependent\nbranch")

    monkeypatch.setattr(model.head, "forward", untraceable)
    with pytest.raises(RuntimeError, match="data dependent"):  # a defect of the head, which fails by itself
        export_network(model, tmp_path / "x", "torch", SIZE)
    from panoptic_ibs import export

    with pytest.raises(ConfigError, match=r"The head CIAE cannot be exported \(RuntimeError: data dependent branch\)"):
        export._program(export_module(model), torch.zeros(1, 3, *SIZE, dtype=torch.uint8))


def export_module(model: PanopticModel) -> Any:
    from panoptic_ibs.exporting import RawNetwork

    return RawNetwork(model)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match=r"x\.pt2: cannot be written \(No space left\)"):
        export_network(network("panoptic_fcn"), tmp_path / "x.pt2", "torch", SIZE)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("panoptic_fcn")
    monkeypatch.setattr("panoptic_ibs.construction.load", lambda *_, **__: model)
    out = tmp_path / "network (1).pt2"
    done = run("export", "ckpt_path=x", "format=torch", f"out={out}", "size=[64,96]")
    assert done.code == 0, done.err
    assert f"{out}: run and compared with the network, largest difference" in done.out
    assert out.is_file()
    for words, message in (
        (["format=tflite"], 'format is "tflite"; expected: torch or onnx'),
        (["format=torch", "size=[64]"], "size is [64]; expected: a list of 2 values"),
        (["format=torch", "size=[64,70]"], "size=[64, 70]: height and width must be multiples of 32"),
    ):
        done = run("export", "ckpt_path=x", f"out={out}", *words)
        assert (done.code, message in done.message) == (2, True), done.message
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    done = run("export", "ckpt_path=x", "format=onnx", f"out={out}")
    assert (done.code, "format=onnx: onnxscript" in done.message, "[export]" in done.message) == (2, True, True)
