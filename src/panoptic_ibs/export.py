"""Export the network of a checkpoint to PyTorch's or ONNX's format, without the fusing of its outputs.

python -m panoptic_ibs.export ckpt_path=FILE format=torch out=network.pt2 [size=[512,1024]]
python -m panoptic_ibs.export ckpt_path=FILE format=onnx out=network.onnx [size=[512,1024]]

The network takes an image as (1, 3, height, width) uint8, red first, of this one size, and gives the head's raw
outputs by name. Its classes stand in the file. What was written is run and compared with the network.
+overrides.head.... changes an option of the checkpoint's model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import commands, instantiation
from .errors import CheckpointError, ConfigError
from .extras import lack, require

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor
    from torch.export import ExportedProgram

    from .exporting import RawNetwork
    from .model import PanopticModel

Format = Literal["torch", "onnx"]
ENTRY = "panoptic_ibs"  # of the file: a JSON of what its numbers mean


def export(config: DictConfig) -> int:
    """Export one checkpoint; returns the exit status."""
    from .configuration.checking import check_changes
    from .construction import load

    if config.format == "onnx":
        require("format=onnx", "onnx", "onnxscript")
    changes, packages = instantiation.plain(config.overrides), instantiation.packages(config)
    model = load(config.ckpt_path, packages=packages, overrides=changes, check=check_changes)
    out = Path(config.out)
    difference = export_network(model, out, config.format, instantiation.plain(config.size))
    if difference is None:
        print(f"{out}: not compared with the network, as {lack('onnxruntime')}")
    else:
        print(f"{out}: run and compared with the network, largest difference {difference:.2g}")
    return 0


def export_network(
    model: PanopticModel, out: Path | str, format: Format = "onnx", size: Sequence[int] = (512, 1024)
) -> float | None:
    """Write the network without fusing.

    Args:
        model: of any head whose raw output is made by all of its weights.
        out: the file; what is there is replaced.
        format: ``"torch"`` for :func:`torch.export.load`, ``"onnx"`` for any program that runs ONNX.
        size: height and width of the images.

    Returns:
        The largest difference between an output of the file and one of the network; None without onnxruntime.

    Raises:
        ConfigError: a size that does not fit the network, a head that cannot be exported, or a package is missing.
        CheckpointError: the file cannot be written.
    """
    import torch

    from .exporting import RawNetwork
    from .files import write_atomically

    out, network = Path(out), RawNetwork(model.cpu().eval())
    image = network.example(size)
    with torch.inference_mode():
        expected = network(image)
    program = _program(network, image)
    about = network.about(size, list(expected))
    write = _write_torch if format == "torch" else _write_onnx
    try:
        write_atomically(out, lambda path: write(program, path, about))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}).") from None
    found = _run_torch(out, image) if format == "torch" else _run_onnx(out, image)
    if found is None:
        return None
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def _program(network: RawNetwork, image: Tensor) -> ExportedProgram:
    """The network as PyTorch traced it.

    Raises:
        ConfigError: it cannot be traced, or part of its weights work on what is found in its outputs only later.
    """
    import torch

    head = type(network.model.head).__name__
    try:
        with torch.no_grad():
            program = torch.export.export(network, (image,))
    except Exception as error:  # torch raises many kinds
        told = " ".join(str(error).split())[:200]
        raise ConfigError(f"The head {head} cannot be exported ({type(error).__name__}: {told}).") from error
    names = program.graph_signature.inputs_to_parameters
    unused = [names[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in names and not n.users]
    if unused:
        raise ConfigError(
            f"The head {head} cannot be exported: {len(unused)} of its weights ({unused[0]}, ...) work on what is "
            "chosen from the raw outputs, so those are no whole network."
        )
    return program


def _write_torch(program: ExportedProgram, path: Path, about: str) -> None:
    import torch

    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={ENTRY: about})


def _write_onnx(program: ExportedProgram, path: Path, about: str) -> None:
    import logging

    import torch

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what its optimiser leaves as it is
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    names = json.loads(about)["outputs"]
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=names)
    assert made is not None
    made.model.metadata_props[ENTRY] = about
    made.save(path)


def _run_torch(path: Path, image: Tensor) -> Mapping[str, Tensor]:
    import torch

    with torch.inference_mode():
        found: Mapping[str, Tensor] = torch.export.load(path).module()(image)
    return found


def _run_onnx(path: Path, image: Tensor) -> Mapping[str, Tensor] | None:
    if lack("onnxruntime"):
        return None
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": image.numpy()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def main() -> int:
    """Entry point."""
    return commands.run_command("export", export, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
