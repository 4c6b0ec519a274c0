"""The kernels of deformable attention, run by Triton's interpreter on the CPU, against the plain form; and compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from panoptic_ibs.functional import forms
from panoptic_ibs.layers import sampling

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes with PyTorch on Linux)", allow_module_level=True)

NAME = "panoptic_ibs.layers.sampling_kernels"
SIZES = [(3, 5), (2, 1)]


def imported(name: str) -> ModuleType:
    """The module of the kernels, imported anew under another name."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.origin is not None
    again = importlib.util.spec_from_file_location(name, spec.origin)
    assert again is not None
    assert again.loader is not None
    module = importlib.util.module_from_spec(again)
    sys.modules[name] = module
    again.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The kernels as programs of Triton's interpreter, which works on tensors of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield imported("interpreted_kernels")


def inputs(queries: int = 5, batch: int = 1, heads: int = 2, channels: int = 3, reach: float = 2.0) -> list[Tensor]:
    """Values, references, offsets (some samples lie outside of the map) and weights."""
    generator = torch.Generator().manual_seed(queries + channels)
    rows = sum(h * w for h, w in SIZES)
    values = torch.randn(batch, rows, heads, channels, generator=generator)
    reference = torch.rand(queries, 2, generator=generator)
    offsets = reach * torch.randn(batch, queries, heads, len(SIZES), 2, 2, generator=generator)
    return [values, reference, offsets, torch.rand(batch, queries, heads, len(SIZES), 2, generator=generator)]


def both(kernels: ModuleType, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Result and gradients of the kernels and of the plain form."""
    found = []
    upstream: Tensor | None = None
    for form in (kernels.deformable_sampling, sampling.sample_grid):
        values, reference, offsets, weights = given
        leaves = [t.clone().requires_grad_() for t in (values, offsets, weights)]
        result = form(leaves[0], SIZES, reference, leaves[1], leaves[2])
        if upstream is None:
            upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
        found.append([result, *torch.autograd.grad(result, leaves, upstream.to(result.dtype))])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("reach", [0.0, 2.0, 1e6])
def test_forward_and_gradients_equal_the_plain_form(kernels: ModuleType, reach: float) -> None:
    (result, plain), *gradients = both(kernels, inputs(reach=reach))
    torch.testing.assert_close(result, plain, atol=1e-5, rtol=0)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_several_images_and_more_queries_than_a_program_takes(kernels: ModuleType) -> None:
    for ours, theirs in both(kernels, inputs(queries=kernels.QUERIES + 1, batch=2, heads=1, channels=1)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_values_of_bfloat16(kernels: ModuleType) -> None:
    values, *rest = inputs()
    (result, _), *_ = both(kernels, [values.bfloat16(), *rest])
    wanted = sampling.sample_grid(values.bfloat16().float(), SIZES, *rest)
    assert result.dtype == torch.float32  # as the plain form's: weights are single precision
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)  # the sums are single precision as well


@pytest.mark.parametrize(("queries", "batch"), [(0, 1), (5, 0)])
def test_nothing_to_sample(kernels: ModuleType, queries: int, batch: int) -> None:
    values, reference, offsets, weights = inputs(queries=queries, batch=batch)
    leaves = [t.requires_grad_() for t in (values, offsets, weights)]
    result = kernels.deformable_sampling(values, SIZES, reference, offsets, weights)
    assert result.shape == (batch, queries, 2, 3)
    assert all((g == 0).all() for g in torch.autograd.grad(result.sum(), leaves))


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]  # another process: the interpreter has changed Triton's language here
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    if "ptxas" in done.stderr and "FileNotFoundError" in done.stderr:
        pytest.skip("Triton's assembler is not installed")
    assert done.returncode == 0, done.stderr
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]


def test_without_a_kernel_the_plain_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values, reference, offsets, weights = inputs()
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
    given = [t.to(device) for t in inputs(queries=100, batch=2, heads=8, channels=32)]
    leaves = [t.requires_grad_() for t in (given[0], *given[2:])]
    results = [f(leaves[0], SIZES, given[1], *leaves[1:]) for f in (kernels.deformable_sampling, sampling.sample_grid)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(r.square().sum(), leaves) for r in results), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
