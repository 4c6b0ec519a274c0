"""Mask2Former (R50, 100 queries) beside transformers': training step, inference, panoptic post-processing, IBS.

Both have the same weights, which are renamed from transformers' to ours, and the same images and targets. Before
anything is timed, the outputs are compared. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CROP, IMAGE, CROPS, INSTANCES, CLASSES, FIRST_THING = (512, 1024), (1024, 2048), 2, 10, 19, 11


def class_table() -> Any:
    """As many classes as Cityscapes has."""
    from panoptic_ibs.classes import ClassInfo, ClassTable

    return ClassTable(ClassInfo(f"class{i}", i, i >= FIRST_THING, (i, i, i)) for i in range(CLASSES))


def peer_network() -> Any:
    """transformers' network, with random weights and the options of the published R50 configuration for Cityscapes."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    torch.manual_seed(0)
    torch.set_num_threads(1)
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])  # ResNet-50
    config = Mask2FormerConfig(
        backbone_config=backbone, num_queries=100, num_labels=CLASSES, use_auxiliary_loss=True, decoder_layers=10
    )
    model = Mask2FormerForUniversalSegmentation(config)
    for name, parameter in model.named_parameters():  # so that attention does not look at the grid's own points alone
        if name.endswith("sampling_offsets.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def own_network(state: dict[str, Any]) -> Any:
    """Our network with those weights."""
    from panoptic_ibs.construction import build_model
    from panoptic_ibs.importing.imported import compare, import_checkpoint

    classes = class_table()
    found = import_checkpoint(state, "mask2former", CLASSES, FIRST_THING)
    backbone = {"_target_": "panoptic_ibs.backbones.TimmBackbone", **found.backbone}
    head = {"_target_": "panoptic_ibs.heads.mask2former.Mask2Former", **found.head}
    model = build_model({"backbone": backbone, "head": head, **found.model}, classes)
    comparison = compare(found, model.state_dict())
    assert comparison.complete, comparison
    model.load_state_dict(found.weights)
    return model


def batch_of(size: tuple[int, int]) -> tuple[Any, Any, dict[str, Any]]:
    """Normalised images, targets of ten things of all sizes each, and the same targets as the peer takes them."""
    import torch

    from panoptic_ibs.structures import Target, id_map_dtype

    g = torch.Generator().manual_seed(1)
    height, width = size
    images = torch.randn(CROPS, 3, *size, generator=g)
    targets = []
    for image in range(CROPS):
        id_map, boxes = torch.zeros(size, dtype=id_map_dtype(INSTANCES)), []
        for k in range(INSTANCES):
            side = max(8, int(height * (0.08 + 0.07 * k)))
            y, x = (37 * k * (image + 1)) % (height - side), (97 * k * (image + 1)) % (width - side)
            id_map[y : y + side, x : x + side] = INSTANCES - k
            boxes.append([x, y, x + side, y + side])
        ids = FIRST_THING + torch.arange(INSTANCES) % (CLASSES - FIRST_THING)
        areas = torch.bincount(id_map.flatten().long(), minlength=INSTANCES + 1)[1:]
        crowd, rows = torch.zeros(INSTANCES, dtype=torch.bool), torch.arange(INSTANCES)
        boxes_of_rows = torch.tensor(boxes[::-1]).float()
        targets.append(Target(id_map, ids, ~crowd, crowd, boxes_of_rows, areas, rows, image, str(image)))
    seen = [(t.areas > 1).nonzero().squeeze(1) for t in targets]
    labels = {
        "mask_labels": [
            torch.stack([(t.id_map == r + 1).float() for r in rows]) for t, rows in zip(targets, seen, strict=True)
        ],
        "class_labels": [t.class_ids[rows] for t, rows in zip(targets, seen, strict=True)],
    }
    return images, targets, labels


def own_step(model: Any, size: tuple[int, int], ibs: Any | None = None) -> Callable[[], None]:
    """A training step of ours: forward, matching, losses, backward."""
    images, targets, _ = batch_of(size)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses, segments = model.head.losses(model.head(model.backbone(images)), targets)
        total = sum(losses.values())
        if ibs is not None:
            total = total + ibs(segments, targets=targets)
        total.backward()

    return step


def peer_step(model: Any, size: tuple[int, int]) -> Callable[[], None]:
    """A training step of the peer."""
    images, _, labels = batch_of(size)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(images, **labels).loss.sum().backward()

    return step


def inference(model: Any, size: tuple[int, int], peer: bool) -> Callable[[], None]:
    """Class logits and mask logits at stride 4 of the last prediction of one image."""
    import torch

    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    model.eval()

    @torch.inference_mode()
    def run() -> tuple[Any, Any]:
        if peer:
            result = model(image)
            return result.class_queries_logits, result.masks_queries_logits
        output = model.head(model.backbone(image))
        return output.logits[-1], torch.einsum("bqc,bchw->bqhw", output.embeddings[-1], output.features)

    return run  # type: ignore[return-value]


def logits_of_a_trained_network(size: tuple[int, int], kept: int = 30) -> tuple[Any, Any, Any]:
    """Class logits and stride-4 mask logits as a trained network gives them: ``kept`` queries of 100 with a sure class,
    of which half share their place with another; the rest say "no object"."""
    import torch

    g = torch.Generator().manual_seed(3)
    height, width = size[0] // 4, size[1] // 4
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    masks = torch.empty(100, height, width)
    for k in range(100):
        cy, cx, r = (torch.rand(3, generator=g) * torch.tensor([height, width, height / 8])).tolist()
        masks[k] = 6 - 6 * ((y - cy) ** 2 + ((x - cx) / 1.5) ** 2).sqrt() / (r + 4)
    masks += torch.randn(masks.shape, generator=g) * 0.3
    logits = torch.randn(100, CLASSES + 1, generator=g)
    sure = torch.randperm(100, generator=g)[:kept]
    logits[:, -1] += 8
    logits[sure, torch.randint(0, CLASSES, (kept,), generator=g)] += 16
    return logits, masks, torch.tensor([c >= FIRST_THING for c in range(CLASSES)])


def published_panoptic(logits: Any, masks: Any, is_thing: Any, size: tuple[int, int]) -> tuple[Any, list[int]]:
    """The peer: the published definition step by step, every query at full resolution.

    Resize all masks to the image, sigmoid, keep sure queries, give each pixel to the query with the largest product of
    score and probability, and walk over the queries: a segment is what its query won and is inside its own mask, if
    enough of that mask was won; stuff of a class is one segment.
    """
    import torch
    from torch.nn import functional as F

    whole = F.interpolate(masks[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    score, label = logits.softmax(-1).max(-1)
    probability = whole.sigmoid()
    sure = label.ne(CLASSES) & (score > 0.8)
    score, label, probability = score[sure], label[sure], probability[sure]
    id_map, classes, of_stuff = torch.zeros(size, dtype=torch.int32), [], {}
    if not len(score):
        return id_map, classes
    owner = (score.view(-1, 1, 1) * probability).argmax(0)
    for k, c in enumerate(label.tolist()):
        owned = (owner == k).sum().item()
        inside = probability[k] >= 0.5
        segment = (owner == k) & inside
        if owned == 0 or inside.sum().item() == 0 or segment.sum().item() == 0 or owned / inside.sum().item() < 0.8:
            continue
        if not is_thing[c] and c in of_stuff:
            id_map[segment] = of_stuff[c]
            continue
        classes.append(c)
        id_map[segment] = len(classes)
        if not is_thing[c]:
            of_stuff[c] = len(classes)
    return id_map, classes


def own_panoptic(logits: Any, masks: Any, is_thing: Any, size: tuple[int, int]) -> tuple[Any, list[int]]:
    """Ours: id map and the classes of its segments."""
    from panoptic_ibs.heads.mask2former.inference import confident, panoptic
    from panoptic_ibs.structures import ImageSize

    keep, label, score = confident(logits, 0.8)
    id_map, classes, _ = panoptic(masks[keep].float(), score, label, is_thing[label], ImageSize(size, size))
    return id_map, classes.tolist()


# --- measuring -----------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turns(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median CPU seconds of each, one after the other in turns, after one untimed call."""
    for function in functions:
        function()
    times = [[seconds(f) for f in functions] for _ in range(repeats)]
    return [sorted(t)[repeats // 2] for t in zip(*times, strict=True)]


def peak_memory(what: str, peer: bool, size: tuple[int, int]) -> float:
    """Peak resident memory in MB of a process that does ``what`` twice."""
    command = [sys.executable, str(Path(__file__).resolve()), what, str(int(peer)), str(size[0]), str(size[1])]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak"])


def _memory_process(what: str, peer: bool, size: tuple[int, int]) -> None:
    import torch

    torch.set_num_threads(1)
    base = 0.0
    if what == "panoptic":
        data = logits_of_a_trained_network(size)
        small = logits_of_a_trained_network((64, 128))
        method = published_panoptic if peer else own_panoptic
        method(*small, (64, 128))  # imports
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        base = _kilobytes("VmRSS") / 1024
        method(*data, size)
    else:
        network = peer_network()
        if not peer:
            network = own_network(network.state_dict())
        step = (peer_step if peer else own_step)(network, size)
        step()
        step()
    print(json.dumps({"peak": _kilobytes("VmHWM") / 1024 - base}))


def _kilobytes(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(entry)))


def check(peer: Any, own: Any) -> None:
    """Both networks and both post-processings must give the same, or the comparison means nothing."""
    import torch

    for mine, theirs in zip(inference(own, (128, 256), False)(), inference(peer, (128, 256), True)(), strict=True):  # type: ignore[call-overload]
        error = ((mine - theirs).norm() / theirs.norm()).item()
        assert error < 1e-3, f"the networks differ: relative error {error:.1e}"
    data = logits_of_a_trained_network(IMAGE)
    (mine, my_classes), (theirs, classes) = own_panoptic(*data, IMAGE), published_panoptic(*data, IMAGE)
    assert torch.equal(mine.int(), theirs), "post-processing differs"
    assert my_classes == classes, "post-processing differs"


# --- where the time goes -------------------------------------------------------------------------------------------


class Profile:
    """CPU seconds of the calls of some functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds added up under a name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0) + time.process_time() - start
            return result

        return timed


def profile_own(model: Any, size: tuple[int, int]) -> dict[str, float]:
    """Seconds of the parts of our step."""
    from panoptic_ibs.heads.mask2former import losses

    images, targets, _ = batch_of(size)
    model.train()
    model.zero_grad(set_to_none=True)
    profile = Profile()
    original = losses.match
    features = profile.wrap("backbone", model.backbone)(images)
    levels, mask_features = profile.wrap("pixel decoder", model.head.pixel_decoder)(features)
    output = profile.wrap("decoder", model.head.query_decoder)(levels, mask_features)
    losses.match = profile.wrap("matching", losses.match)
    try:
        terms, _ = profile.wrap("losses", model.head.losses)(output, targets)
    finally:
        losses.match = original
    profile.seconds["losses"] -= profile.seconds["matching"]
    profile.wrap("backward", sum(terms.values()).backward)()
    return profile.seconds


def profile_peer(model: Any, size: tuple[int, int]) -> dict[str, float]:
    """Seconds of the same parts of the peer's step."""
    images, _, labels = batch_of(size)
    model.train()
    model.zero_grad(set_to_none=True)
    profile = Profile()
    parts = {
        "backbone": model.model.pixel_level_module.encoder,
        "pixel decoder": model.model.pixel_level_module.decoder,
        "decoder": model.model.transformer_module,
        "matching": model.criterion.matcher,
    }
    originals = {name: part.forward for name, part in parts.items()}
    for name, part in parts.items():
        part.forward = profile.wrap(name, part.forward)
    criterion = model.criterion.forward
    model.criterion.forward = profile.wrap("losses", criterion)
    try:
        loss = model(images, **labels).loss.sum()
    finally:
        for name, part in parts.items():
            part.forward = originals[name]
        model.criterion.forward = criterion
    profile.seconds["losses"] -= profile.seconds["matching"]
    profile.wrap("backward", loss.backward)()
    return profile.seconds


# --- rows ----------------------------------------------------------------------------------------------------------


def run(crop: tuple[int, int] = CROP, image: tuple[int, int] = IMAGE, repeats: int = 2) -> list[dict[str, Any]]:
    """Rows of the table; steps and inference are timed ``repeats`` times each, after one untimed call."""
    import torch

    from panoptic_ibs.ibs import IntraBatchSupervision

    torch.set_num_threads(1)
    peer = peer_network()
    own = own_network(peer.state_dict())
    check(peer, own)
    data = logits_of_a_trained_network(image)
    rows = []

    def row(what: str, ours: float, theirs: float, unit: str, target: str = "") -> None:
        ratio = ours / theirs
        rows.append({"what": what, "ours": ours, "peer": theirs, "unit": unit, "ratio": ratio, "target": target})
        print(f"{what}: {ours:.4g} / {theirs:.4g} {unit} = {ratio:.3f} {target}", file=sys.stderr, flush=True)

    post = [lambda: own_panoptic(*data, image), lambda: published_panoptic(*data, image)]
    text = f"panoptic post-processing, 100 queries, {image[0]}x{image[1]}"
    row(text, *in_turns(post, 5), "s", "<= 0.35")
    row(f"{text}: memory", *(peak_memory("panoptic", p, image) for p in (False, True)), "MB", "<= 0.15")
    infer = [inference(own, image, False), inference(peer, image, True)]
    row(f"network inference, one image {image[0]}x{image[1]}", *in_turns(infer, repeats), "s", "<= 0.6")
    text = f"step, {CROPS} crops {crop[0]}x{crop[1]}, {INSTANCES} targets each"
    steps = [own_step(own, crop), peer_step(peer, crop)]
    row(text, *in_turns(steps, repeats), "s", "<= 0.75")
    row(f"{text}: peak memory", *(peak_memory("step", p, crop) for p in (False, True)), "MB", "<= 0.7")
    mine, theirs = profile_own(own, crop), profile_peer(peer, crop)
    for part in mine:
        row(f"  of that: {part}", mine[part], theirs[part], "s")
    del peer, steps
    ibs = IntraBatchSupervision(weight=50.0)
    with_ibs, without = in_turns([own_step(own, crop, ibs), own_step(own, crop)], repeats)
    row(f"{text}: with IBS (dense, nine layers) over without", with_ibs, without, "s", "<= 1.02")
    alone = ibs_alone(own, crop, ibs)
    row(f"{text}: (step + IBS alone) over step", without + alone, without, "s", "<= 1.02")
    return rows


def ibs_alone(model: Any, size: tuple[int, int], ibs: Any, repeats: int = 5) -> float:
    """CPU seconds of IBS, forward and backward, on detached outputs of the network."""
    from dataclasses import replace

    import torch

    images, targets, _ = batch_of(size)
    with torch.no_grad():
        output = model.head(model.backbone(images))
        _, segments = model.head.losses(output, targets)
    features = output.features.requires_grad_()
    segments = [replace(s, embeddings=s.embeddings.detach().requires_grad_(), features=features) for s in segments]
    (taken,) = in_turns([lambda: ibs(segments, targets=targets).backward()], repeats)
    return taken


if __name__ == "__main__":
    _memory_process(sys.argv[1], sys.argv[2] == "1", (int(sys.argv[3]), int(sys.argv[4])))
