from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from panoptic_ibs.errors import CheckpointError
from panoptic_ibs.weight_files import read_tensors


class Evil:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_detectron2_pickles(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "backbone.stem.conv1.weight": np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.array(7, dtype=np.int64),
        "flags": np.array([True, False]),
    }
    content = {"model": OrderedDict(arrays), "__author__": "someone", "matching_heuristics": True, "n": np.float32(2)}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    state = read_tensors(path)
    assert state["__author__"] == "someone"
    assert float(state["n"]) == 2.0
    for name, array in arrays.items():
        assert state["model"][name].shape == array.shape
        assert np.array_equal(state["model"][name].numpy(), array), name


@pytest.mark.parametrize("where", ["value", "key of the state", "inside an array", "array type"])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_hostile_pickles_are_refused_and_not_run(where: str, suffix: str, tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / f"evil{suffix}"
    evil = Evil(witness)
    content = {
        "value": {"model": {"a": evil}},
        "key of the state": {"model": {"a": np.zeros(2)}, "optimizer": [evil]},
        "inside an array": {"model": {"a": np.array([evil], dtype=object)}},
        "array type": {"model": {"a": np.zeros(2).view(np.matrix)}},
    }[where]
    path.write_bytes(pickle.dumps(content)) if suffix == ".pkl" else torch.save(content, path)
    with pytest.raises(CheckpointError, match="refused"):
        read_tensors(path)
    assert not witness.exists()
    if where == "value":  # the witness works: a careless reader would have run it
        pickle.loads(pickle.dumps(evil))
        assert witness.exists()


def test_no_way_round_the_list_of_names(tmp_path: Path) -> None:
    """Opcodes by hand: dotted names, built-ins through another module, another encoding."""
    programs = {
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "builtins": b"cbuiltins\neval\n(V1+1\ntR.",
        "compat": b"\x80\x02c__builtin__\neval\n(X\x03\x00\x00\x001+1tR.",
        "encoding": b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        "persistent": b"\x80\x02X\x01\x00\x00\x00aQ.",
    }
    for name, program in programs.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(program)
        with pytest.raises(CheckpointError):
            read_tensors(path)


def test_training_checkpoints_with_numpy_numbers(tmp_path: Path) -> None:
    state = {
        "model": {"a": torch.ones(2)},
        "scheduler": {"base_lrs": [np.float64(0.1)], "last_epoch": np.int64(3)},
        "iteration": 9,
    }
    torch.save(state, tmp_path / "model_0009.pth")
    loaded = read_tensors(tmp_path / "model_0009.pth")
    assert loaded["scheduler"]["base_lrs"] == [0.1]
    assert loaded["scheduler"]["last_epoch"] == 3


def test_transformers_folders(tmp_path: Path) -> None:
    a, b = torch.ones(2), torch.arange(3.0)
    (tmp_path / "parts").mkdir()
    save_file({"a": a}, tmp_path / "parts" / "model-1.safetensors")
    save_file({"b": b}, tmp_path / "parts" / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../parts/model-2.safetensors"}}
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    state = read_tensors(tmp_path / "parts")
    assert torch.equal(state["a"], a)
    assert torch.equal(state["b"], b)
    (tmp_path / "bin").mkdir()
    torch.save({"a": a}, tmp_path / "bin" / "pytorch_model.bin")
    assert torch.equal(read_tensors(tmp_path / "bin")["a"], a)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        read_tensors(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04", b"hello world"])
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_broken_files(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="broken"):
        read_tensors(path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_tensors(tmp_path / f"none{suffix}")
