"""Parameter groups, schedule, clipping and the moving average, against hand-computed values."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from panoptic_ibs.callbacks.averaging import MovingAverage
from panoptic_ibs.errors import CheckpointError, ConfigError
from panoptic_ibs.optim import Recipe, build_optimizer, clip_gradients, parameter_groups, warmup_poly, warmup_steps_down


class Net(nn.Module):
    """A backbone with a norm, and a head with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.norm_free = nn.Linear(4, 2)  # named "norm", but a linear layer: type decides, not the name
        self.group = nn.GroupNorm(2, 4)
        self.table = nn.Embedding(5, 4)


def groups_of(model: nn.Module, **options: Any) -> dict[str, dict[str, Any]]:
    return {g["name"]: g for g in parameter_groups(model, 0.02, 1e-4, **options)}


def ids(group: dict[str, Any]) -> set[int]:
    return {id(p) for p in group["params"]}


def test_groups_by_type_of_module() -> None:
    net = Net()
    groups = groups_of(net, backbone_lr_factor=0.1)
    assert set(groups) == {"backbone", "backbone_no_decay", "rest", "rest_no_decay"}
    conv, norm = net.backbone
    assert ids(groups["backbone"]) == {id(conv.weight), id(conv.bias)}
    assert ids(groups["backbone_no_decay"]) == {id(norm.weight), id(norm.bias)}
    assert ids(groups["rest"]) == {id(net.norm_free.weight), id(net.norm_free.bias)}
    assert ids(groups["rest_no_decay"]) == {id(net.group.weight), id(net.group.bias), id(net.table.weight)}
    assert groups["backbone"]["lr"] == pytest.approx(0.002)
    assert groups["rest"]["lr"] == pytest.approx(0.02)
    assert groups["rest"]["weight_decay"] == pytest.approx(1e-4)
    assert groups["rest_no_decay"]["weight_decay"] == 0


def test_groups_hold_every_trainable_parameter_once() -> None:
    net = Net()
    net.table.weight = nn.Parameter(net.norm_free.weight)  # shared
    net.backbone[0].weight.requires_grad_(False)
    found = [id(p) for g in parameter_groups(net, 1.0, 1.0, no_decay=["bias"]) for p in g["params"]]
    assert sorted(found) == sorted({id(p) for p in net.parameters() if p.requires_grad})


def test_bias_without_decay_leaves_norms_decayed() -> None:
    net = Net()
    groups = groups_of(net, no_decay=["bias"])
    assert ids(groups["backbone_no_decay"]) == {id(net.backbone[0].bias)}
    assert id(net.group.bias) in ids(groups["rest"])


def test_group_errors() -> None:
    with pytest.raises(ConfigError, match=r"optim\.no_decay.*norms"):
        parameter_groups(Net(), 1.0, 1.0, no_decay=["norms"])
    with pytest.raises(ConfigError, match="frozen_stages"):
        parameter_groups(Net().requires_grad_(False), 1.0, 1.0)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.001),  # ramp 0.001, polynomial 1
        (1, 0.500_5 * 0.9**0.9),  # half-way up a ramp of two steps: 0.001 + 0.999 / 2
        (2, 0.8**0.9),
        (5, 0.535_886_731_268_146_6),  # 0.5 ** 0.9 by hand
        (10, 0.0),
        (11, 0.0),  # beyond the end, never negative or complex
    ],
)
def test_schedule_by_hand(step: int, factor: float) -> None:
    assert warmup_poly(step, max_steps=10, warmup_steps=2) == pytest.approx(factor, abs=1e-12)


def test_schedule_drives_the_optimizer() -> None:
    net = Net()
    recipe = Recipe(lr=0.02, warmup_steps=2, backbone_lr_factor=0.1)
    optimizer, scheduler = build_optimizer(net, recipe, max_steps=10)
    seen = []
    for _ in range(4):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    base = torch.tensor([0.02, 0.02, 0.002, 0.002])
    factors = torch.tensor([0.001, 0.5005 * 0.9**0.9, 0.8**0.9, 0.7**0.9])
    torch.testing.assert_close(torch.tensor(seen), factors[:, None] * base)
    assert all(g["momentum"] == 0.9 for g in optimizer.param_groups)


def test_milestones() -> None:
    factors = [warmup_steps_down(s, [4, 6], warmup_steps=2, factor=0.5) for s in (0, 1, 2, 3, 4, 5, 6, 9)]
    assert factors == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01])
    optimizer, scheduler = build_optimizer(Net(), Recipe(lr=1.0, warmup_steps=0, milestones=[1]), max_steps=10)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.1)


def test_relative_positions_of_swin_are_embeddings() -> None:
    from timm.models.swin_transformer import WindowAttention

    attention = WindowAttention(8, num_heads=2, window_size=4)
    undecayed = [g for g in parameter_groups(attention, 1.0, 1.0) if g["weight_decay"] == 0]
    assert [id(p) for g in undecayed for p in g["params"]] == [id(attention.relative_position_bias_table)]


def test_adamw_recipe() -> None:
    recipe = Recipe(optimizer=torch.optim.AdamW, lr=1e-4, weight_decay=0.05, warmup_steps=0)
    optimizer, _ = build_optimizer(Net(), recipe, max_steps=10)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.05, 0.0}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)  # no warm-up


def test_optimizer_state_is_plain(tmp_path: Any) -> None:
    optimizer, scheduler = build_optimizer(Net(), Recipe(optimizer=partial(torch.optim.SGD, momentum=0.9)), 10)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pth")
    torch.load(tmp_path / "state.pth", weights_only=True)


def test_clipping() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([-9.0, 3.0, 8.0, -1.0])
    clip_gradients([p], value=5.0, norm=None)
    assert p.grad.tolist() == [-5, 3, 5, -1]
    clip_gradients([p], value=None, norm=1.0)
    torch.testing.assert_close(p.grad, torch.tensor([-5.0, 3, 5, -1]) / 60**0.5, rtol=1e-4, atol=0)
    clip_gradients([p], value=None, norm=None)
    assert p.grad.norm() == pytest.approx(1, rel=1e-4)


class Wrapped(nn.Module):
    """As the task holds the network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.BatchNorm1d(1)
        with torch.no_grad():
            self.model.weight.fill_(0.0)


def trained_average(decay: float, values: list[float]) -> tuple[MovingAverage, Wrapped]:
    module, average, trainer = Wrapped(), MovingAverage(decay), SimpleNamespace(global_step=0)
    average.on_fit_start(trainer, module)  # type: ignore[arg-type]
    for value in values:
        with torch.no_grad():
            module.model.weight.fill_(value)
            module.model.running_mean.fill_(value)
        trainer.global_step += 1
        for _ in range(2):  # the second call is a step of accumulation only
            average.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    return average, module


def test_moving_average_by_hand() -> None:
    average, _ = trained_average(0.2, [1.0, 2.0])
    assert average.average is not None
    # step 1: decay min(0.2, 2 / 11) = 2 / 11, so 9 / 11; step 2: min(0.2, 3 / 12) = 0.2, so 0.2 * 9 / 11 + 0.8 * 2
    assert average.average["model.weight"].item() == pytest.approx(0.2 * 9 / 11 + 1.6)
    assert average.average["model.running_mean"].item() == 2.0


def test_moving_average_swaps_for_validation_only() -> None:
    average, module = trained_average(0.0, [1.0])
    with torch.no_grad():
        module.model.weight.fill_(7.0)
    average.on_validation_start(None, module)  # type: ignore[arg-type]
    assert module.model.weight.item() == 1.0
    average.on_validation_end(None, module)  # type: ignore[arg-type]
    assert module.model.weight.item() == 7.0
    assert average.average["model.weight"].item() == 1.0  # type: ignore[index]


def test_moving_average_travels_in_the_checkpoint() -> None:
    average, module = trained_average(0.9, [1.0, 2.0, 3.0])
    checkpoint: dict[str, Any] = {}
    average.on_save_checkpoint(None, module, checkpoint)  # type: ignore[arg-type]
    other = MovingAverage(0.9)
    other.on_load_checkpoint(None, Wrapped(), checkpoint)  # type: ignore[arg-type]
    assert other.average is not None
    torch.testing.assert_close(other.average, average.average)
    with pytest.raises(CheckpointError, match="another model"):
        other.on_load_checkpoint(None, Wrapped(), {"ema_state_dict": {"model.x": torch.zeros(1)}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        MovingAverage(1.0)


def after_five_steps(
    recipe: Recipe, net: nn.Module, resume_as: torch.memory_format | None = None
) -> list[torch.Tensor]:
    """Parameters after five steps; with ``resume_as`` the network's layout changes after the second, and the optimiser
    goes on from its state dict.
    """
    optimizer, scheduler = build_optimizer(net, recipe, max_steps=10)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        if step == 2 and resume_as is not None:
            state = optimizer.state_dict()
            net.to(memory_format=resume_as)
            optimizer, _ = build_optimizer(net, recipe, max_steps=10)
            optimizer.load_state_dict(state)
        for p in net.parameters():
            grad = torch.empty_like(p)  # its layout is the parameter's, as autograd makes it
            p.grad = grad.copy_(torch.randn(p.shape, generator=generator))
        clip_gradients(net.parameters(), None, 0.5)
        optimizer.step()
        if resume_as is None:
            scheduler.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("kind", [partial(torch.optim.AdamW), partial(torch.optim.SGD, momentum=0.9)])
def test_fused_optimisers_are_chosen_and_take_the_same_steps(kind: Any) -> None:
    recipe = Recipe(kind, lr=0.01, weight_decay=0.05, warmup_steps=2)
    plain = Recipe(partial(kind, foreach=False), lr=0.01, weight_decay=0.05, warmup_steps=2)
    assert build_optimizer(Net(), recipe, 10)[0].defaults["fused"]
    assert not build_optimizer(Net(), plain, 10)[0].defaults["fused"]  # the recipe's word
    assert not build_optimizer(Net(), recipe, 10, fused=False)[0].defaults["fused"]
    torch.manual_seed(0)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    for ours, theirs in zip(after_five_steps(recipe, net), after_five_steps(plain, twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_fused_steps_survive_another_memory_layout() -> None:
    recipe = Recipe(torch.optim.AdamW, lr=0.01, warmup_steps=0)
    torch.manual_seed(0)
    nets = [Net() for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    first = after_five_steps(recipe, nets[0], torch.contiguous_format)
    for i, (before, after) in enumerate(
        [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)], 1
    ):
        found = after_five_steps(recipe, nets[i].to(memory_format=before), after)
        for a, b in zip(first, found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
