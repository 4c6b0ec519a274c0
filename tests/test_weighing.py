"""Loss weights: fixed ones, learnt ones against the formula by hand; optimiser, checkpoint and average hold them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import class_table, random_batch
from panoptic_ibs.callbacks.averaging import MovingAverage
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.heads.base import Head
from panoptic_ibs.model import PanopticModel
from panoptic_ibs.optim import Recipe, build_optimizer
from panoptic_ibs.segments import Prediction, SoftSegments
from panoptic_ibs.structures import FeatureLevel
from panoptic_ibs.task import PanopticTask
from panoptic_ibs.weighing import Fixed, Uncertainty

WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 1.0}


def terms(*values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(float(v), requires_grad=True) for name, v in zip(WEIGHTS, values, strict=True)}


def test_fixed_weights() -> None:
    weighted = Fixed()(terms(0.5, 0.1, 3.0), WEIGHTS)
    assert {k: v.item() for k, v in weighted.items()} == pytest.approx({"class": 1.0, "mask": 0.5, "dice": 3.0})


def learnt(**options: Any) -> Uncertainty:
    weigh = Uncertainty({"masks": ["mask", "dice"], "classes": ["class"]}, **options)
    weigh.prepare(WEIGHTS)
    return weigh


def test_uncertainty_by_hand_with_gradients() -> None:
    weigh = learnt(regression=["masks"], initial=0.3)
    given = terms(0.5, 0.1, 3.0)
    weighted = weigh(given, WEIGHTS)
    masks, classes = 5 * 0.1 + 3.0, 2 * 0.5
    assert weighted["masks"].item() == pytest.approx(0.5 * math.exp(-0.3) * masks + 0.15)
    assert weighted["classes"].item() == pytest.approx(math.exp(-0.3) * classes + 0.15)
    sum(weighted.values()).backward()
    assert given["mask"].grad.item() == pytest.approx(0.5 * math.exp(-0.3) * 5)
    assert given["class"].grad.item() == pytest.approx(math.exp(-0.3) * 2)
    assert weigh.log_variance["masks"].grad.item() == pytest.approx(0.5 - 0.5 * math.exp(-0.3) * masks)
    assert weigh.log_variance["classes"].grad.item() == pytest.approx(0.5 - math.exp(-0.3) * classes)
    assert {k: v.item() for k, v in weigh.report().items()} == pytest.approx(
        {"raw_masks": masks, "raw_classes": classes, "log_variance_masks": 0.3, "log_variance_classes": 0.3}
    )


def test_the_best_log_variance_halves_the_loss() -> None:
    """exp(-s) = 1 / (2 L) at the optimum, so a small loss makes the total negative."""
    weigh = learnt()
    optimizer = torch.optim.SGD(weigh.parameters(), 0.5)
    for _ in range(400):
        total = sum(weigh(terms(0.05, 0.1, 1.0), WEIGHTS).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert weigh.log_variance["classes"].item() == pytest.approx(math.log(2 * 0.1), abs=1e-3)
    assert total.item() == pytest.approx(sum(0.5 + 0.5 * math.log(2 * v) for v in (0.1, 1.5)), abs=1e-3)


def test_limits_and_terms_outside_of_groups() -> None:
    weigh = Uncertainty({"masks": ["mask"]}, initial=9.0, limit=5.0)
    weigh.prepare(WEIGHTS)
    weighted = weigh(terms(0.5, 0.1, 3.0), WEIGHTS)
    assert weighted["masks"].item() == pytest.approx(math.exp(-5) * 0.5 + 2.5)
    assert (weighted["class"].item(), weighted["dice"].item()) == pytest.approx((1.0, 3.0))


def test_each_term_a_group_without_groups() -> None:
    weigh = Uncertainty()
    with pytest.raises(ConfigError, match="prepare"):
        weigh(terms(1, 1, 1), WEIGHTS)
    weigh.prepare(WEIGHTS)
    assert set(weigh.log_variance) == set(WEIGHTS)
    assert weigh(terms(1, 1, 1), WEIGHTS)["mask"].item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": {}}, "every group needs at least one loss term"),
        ({"groups": {"a": []}}, "every group needs at least one loss term"),
        ({"groups": {"a": ["mask"], "b": ["mask"]}}, "mask is in two groups"),
        ({"groups": {"a": ["boxes"]}}, r"weigh.groups.a: the head has no loss term boxes; it has class, mask, dice"),
        ({"regression": ["box"]}, "box is no group; there are class, mask, dice"),
    ],
)
def test_contradictory_groups(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Uncertainty(**options).prepare(WEIGHTS)


@pytest.mark.parametrize("weigh", [Fixed(), learnt()])
def test_terms_and_weights_must_have_the_same_names(weigh: nn.Module) -> None:
    with pytest.raises(ConfigError, match="loss term extra has no weight"):
        weigh({**terms(1, 1, 1), "extra": torch.zeros(())}, WEIGHTS)
    with pytest.raises(ConfigError, match="weight extra has no loss term"):
        weigh(terms(1, 1, 1), {**WEIGHTS, "extra": 1.0})


class Stub(Head):
    """Two terms of one parameter."""

    weights = {"a": 2.0, "b": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(class_table(), [FeatureLevel(4, 3)])
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.shares: list[float] = []

    def forward(self, features: Any) -> Tensor:
        return features * self.scale

    def losses(self, output: Tensor, targets: Any) -> Any:
        return {"a": output.square().mean(), "b": output.abs().mean()}, []

    def segments(self, output: Any, sizes: Any, targets: Any = None) -> list[SoftSegments]:
        return []

    def fuse(self, soft: SoftSegments) -> Prediction:
        raise AssertionError

    def progress(self, share: float) -> None:
        self.shares.append(share)


def stub_task(weigh: Any = None) -> PanopticTask:
    model = PanopticModel(nn.Conv2d(3, 3, 1), Stub(), class_table())
    return PanopticTask(model, Recipe(warmup_steps=0), weigh=weigh)


def test_learnt_weights_are_optimised_without_decay_saved_and_averaged() -> None:
    task = stub_task(Uncertainty())
    optimizer, _ = build_optimizer(task.model, Recipe(weight_decay=0.1), 10, list(task.weigh.parameters()))
    group = optimizer.param_groups[-1]
    assert (group["name"], group["weight_decay"], len(group["params"])) == ("loss_weights", 0.0, 2)
    assert {"weigh.log_variance.a", "weigh.log_variance.b"} <= set(task.state_dict())
    average = MovingAverage(decay=0.5)

    class Trainer:
        global_step = 0

    average.on_fit_start(Trainer, task)
    assert {"weigh.log_variance.a", "weigh.log_variance.b"} <= set(average.average)
    with torch.no_grad():
        task.weigh.log_variance["a"].fill_(1.0)
    Trainer.global_step = 1
    average.on_train_batch_end(Trainer, task, None, None, 0)
    assert average.average["weigh.log_variance.a"].item() == pytest.approx(1 - 2 / 11)


def test_fixed_weights_add_nothing_to_optimiser_and_checkpoint() -> None:
    task = stub_task()
    optimizer, _ = build_optimizer(task.model, Recipe(), 10, list(task.weigh.parameters()))
    assert "loss_weights" not in [g["name"] for g in optimizer.param_groups]
    assert not [k for k in task.state_dict() if k.startswith("weigh")]


def test_the_model_weighs_by_itself_in_a_loop_of_ones_own() -> None:
    task = stub_task()
    batch = random_batch(class_table(), (32, 32))
    raw, _ = task.model.head.losses(task.model(batch), batch.targets)
    weighted, _ = task.model.losses(batch)
    assert weighted["a"].item() == pytest.approx(2 * raw["a"].item())
    assert weighted["b"].item() == pytest.approx(raw["b"].item())


def test_the_head_is_told_the_share_that_is_done() -> None:
    """Also after a resume: the share follows from the step alone."""
    from lightning import Trainer

    batches = [random_batch(class_table(), (32, 32), seed=k) for k in range(4)]
    task = stub_task()
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    Trainer(max_steps=4, **options).fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    assert task.model.head.shares == [0.0, 0.25, 0.5, 0.75]
