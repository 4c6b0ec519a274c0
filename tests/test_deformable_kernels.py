"""The kernels of deformable attention, run by Triton's interpreter on the CPU, against the plain form; and compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from panoptic_ibs.functional import forms
from panoptic_ibs.layers import sampling
from test_deformable_sampling import SIZES, inputs

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes with PyTorch on Linux)", allow_module_level=True)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a process in which nothing of Triton is kept."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(folder), **more}


def test_under_the_interpreter(tmp_path: Path) -> None:
    here = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(here)]
    done = subprocess.run(
        command,
        env=environment(tmp_path, TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


COMPILE = """
from panoptic_ibs.layers import sampling_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

constants = {"D": 32, "BLOCK_D": 32, "LEVELS": 3, "POINTS": 4, "BLOCK": 32}
kinds = {"values": "*bf16", "levels": "*i32", "queries": "i32", "rows": "i32", "heads": "i32"}
for kernel in (sampling_kernels._forward, sampling_kernels._backward):
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    made = compile(ASTSource(kernel, signature=signature, constexprs=places), target=GPUTarget("cuda", 80, 32))
    print(len(made.asm["cubin"]))
"""


def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=200, check=False)
    if "ptxas" in done.stderr and "FileNotFoundError" in done.stderr:
        pytest.skip("Triton's assembler is not installed")
    assert done.returncode == 0, done.stderr
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]


def test_without_a_kernel_the_plain_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values, reference, offsets, weights = (t.float() for t in inputs())
    wanted = sampling.sample_grid(values, SIZES, reference, offsets, weights)
    with forms.forced(True):  # on the CPU there is none
        assert torch.equal(sampling.deformable_sampling(values, SIZES, reference, offsets, weights), wanted)
    old = {"get_device_capability": lambda *_: (7, 5), "is_available": lambda: True}
    for name, value in old.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    sampling._kernels.cache_clear()
    for dtype, reason in ((torch.float32, "capability is below 8.0"), (torch.float64, "values of torch.float64")):
        with pytest.warns(UserWarning, match=f"without its kernel on cuda:0: .*{reason}"):
            assert sampling._kernels(torch.device("cuda:0"), dtype) is None
    sampling._kernels.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    kernels: Any = sampling._kernels(device, torch.float32)
    assert kernels is not None
    given = [t.float().to(device) for t in inputs(queries=100, heads=8)]
    leaves = [t.requires_grad_() for t in (given[0], *given[2:])]
    results = [f(leaves[0], SIZES, given[1], *leaves[1:]) for f in (kernels.deformable_sampling, sampling.sample_grid)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(r.square().sum(), leaves) for r in results), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
