"""Ways to compute that change no result: formats, recomputed activations, compiled parts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from cli_helpers import compose
from helpers import random_batch
from panoptic_ibs import execution, instantiation
from panoptic_ibs.backbones import TimmBackbone
from panoptic_ibs.callbacks import TrainingCost
from panoptic_ibs.execution import Execution
from panoptic_ibs.trainer import MemoryShortError, Trainer
from recorder import HEADS, model_of

CPU = torch.device("cpu")


def after_a_step(head: str, **options: Any) -> tuple[dict[str, Tensor], int]:
    """Loss, gradients, running statistics and features' signs of one step of training, and bytes kept for backward."""
    model = model_of(head).train()
    batch = random_batch(model.classes, (64, 96), count=2, segments=5)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(11)
    before = list(model.state_dict())
    with Execution(**options).applied(model, CPU):
        assert list(model.state_dict()) == before
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            terms, _ = model.losses(batch)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        loss.backward()
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(p.is_contiguous() for p in model.parameters())
    found = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {n: b for n, b in model.named_buffers() if "running" in n or "tracked" in n}
    return {**found, "loss": loss.detach()}, sum(kept.values())


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = max(1.0, float(value.abs().max())) if value.is_floating_point() else 1.0
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", HEADS)
def test_channels_last_and_recomputed_activations_learn_the_same(head: str) -> None:
    plain, bytes_plain = after_a_step(head)
    other, _ = after_a_step(head, channels_last=True)
    same(other, plain, 1e-4 if head == "mask2former" else 1e-5)  # its attention masks and sampling amplify rounding
    same({"loss": other["loss"]}, {"loss": plain["loss"]}, 1e-5)
    recomputed, bytes_recomputed = after_a_step(head, checkpoint_activations=True)
    same(recomputed, plain, 1e-6)
    assert bytes_recomputed < 0.9 * bytes_plain


def test_backbones_keep_less_for_the_backward_pass() -> None:
    backbone = TimmBackbone("resnet50", options={"layers": [2, 2, 2, 2], "channels": [16, 32, 64, 64]}).train()
    model = nn.Module()
    model.backbone = backbone
    assert len(execution.stages(backbone)) == 4

    def kept(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with Execution(**options).applied(model, CPU), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = backbone(torch.zeros(1, 3, 64, 96))
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        return len(features) and sum(size for place, size in sizes.items() if place not in own)

    assert kept(checkpoint_activations=True) < 0.6 * kept()


def test_the_weights_and_images_of_the_backbone_are_channels_last() -> None:
    model = model_of("ciae")
    batch = random_batch(model.classes, (64, 96), count=2, segments=5)
    seen: list[bool] = []
    hook = model.backbone.model.conv1.register_forward_hook(
        lambda m, x, y: seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (x[0], m.weight, y))
    )
    with Execution(channels_last=True).applied(model, CPU):
        model(batch)
    hook.remove()
    assert seen == [True] * 3


class Nested(nn.Module):
    """A backbone whose blocks lie in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(3))


def test_stages_are_found_wherever_they_lie() -> None:
    backbone = Nested()
    assert execution.stages(backbone) == list(backbone.blocks)
    wrapper = nn.Module()
    wrapper.inner = backbone
    assert execution.stages(wrapper) == list(backbone.blocks)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert execution.stages(plain) == [plain]


# --- compiling


def fake_compile(failing: bool) -> Any:
    """In place of ``torch.compile``: counts calls, and fails at the first as a compiler does."""
    calls: list[str] = []

    def compiled(function: Any, **_: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append("compiled")
            if failing:
                raise RuntimeError("no C++\ncompiler")
            return function(*args)

        return run

    return compiled, calls


@pytest.mark.parametrize("failing", [False, True])
def test_compiled_parts_or_one_sentence(monkeypatch: pytest.MonkeyPatch, failing: bool) -> None:
    plain, _ = after_a_step("panoptic_fcn")
    compiled, calls = fake_compile(failing)
    monkeypatch.setattr(torch, "compile", compiled)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, _ = after_a_step("panoptic_fcn", compile=True)
    same(found, plain, 1e-6)
    assert len(calls) == 3  # backbone, pyramid, semantic pyramid
    sentences = [str(w.message) for w in told if "trainer.compile" in str(w.message)]
    assert len(sentences) == (3 if failing else 0)
    if failing:
        assert "TimmBackbone cannot be compiled here and runs as it is" in sentences[0]
        assert sentences[0].endswith("(RuntimeError: no C++ compiler).")


def test_an_error_of_the_network_itself_is_not_the_compilers() -> None:
    part = nn.Linear(2, 2)
    compiled = execution.Compiled(part)
    compiled.quick = compiled.plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            compiled(torch.zeros(1, 3))
    assert compiled.quick is not None


def test_nothing_is_compiled_where_no_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, calls = fake_compile(False)
    monkeypatch.setattr(torch, "compile", compiled)
    model = model_of("ciae").eval()
    with Execution(compile=True).applied(model, CPU), torch.no_grad():
        model(random_batch(model.classes, (64, 96), count=2, segments=5))
    assert not calls


# --- products in float32


def test_products_have_their_precision_on_gpus_only_and_get_it_back() -> None:
    model = model_of("panoptic_fcn")
    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    with Execution(float32_matmul="medium").applied(model, CPU):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    for precision, convolutions in (("highest", False), ("high", True), ("medium", True)):
        with Execution(float32_matmul=precision).applied(model, torch.device("cuda")):  # type: ignore[arg-type]
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, convolutions)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# --- the trainer's options


def test_the_trainers_options_reach_it() -> None:
    options = ["trainer.channels_last=true", "trainer.compile=true", "trainer.checkpoint_activations=true"]
    config = compose("trainer=cpu", "trainer.float32_matmul=medium", *options)
    trainer = instantiation.instantiate(config.trainer, logger=False, enable_checkpointing=False)
    assert isinstance(trainer, Trainer)
    assert trainer.execution == Execution("medium", True, True, True)
    assert trainer.max_steps == config.trainer.max_steps


class Hungry(LightningModule):
    """Runs out of memory in its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.backbone = nn.Linear(2, 2)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.model.backbone(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def small_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(
        **options, **quiet, accelerator="cpu", max_steps=5, callbacks=[TrainingCost()], default_root_dir=folder
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_without_memory_ends_in_one_sentence(tmp_path: Path, recompute: bool) -> None:
    trainer = small_trainer(tmp_path, checkpoint_activations=recompute)
    with pytest.raises(MemoryShortError) as error:
        trainer.fit(Hungry(), torch.utils.data.DataLoader(torch.zeros(8, 2)))
    last = "another backbone" if recompute else "trainer.checkpoint_activations=true"
    assert re.fullmatch(
        r"The memory of cpu does not suffice for step 2 \(peak so far: [\d.]+ GB\)\. Lower sampling\.batch_size "
        r"\(trainer\.accumulate_grad_batches makes up for it\), take smaller crops by sampling\.crop_size, or set "
        + re.escape(f"{last}."),
        str(error.value),
    )


def test_other_errors_of_a_step_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        small_trainer(tmp_path).fit(Hungry(), torch.utils.data.DataLoader(torch.zeros(8, 3)))
