"""What the heads compute for a fixed batch: losses, gradients, predictions; for comparing two states of the code.

python tests/recorder.py FILE          write a record (bit for bit: floats in hexadecimal, sha256 of tensors)
python tests/recorder.py FILE OTHER    write it, and compare with the record of other code on the same machine
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import class_table, random_batch
from panoptic_ibs.construction import build_model
from panoptic_ibs.ibs import IntraBatchSupervision
from panoptic_ibs.model import PanopticModel

BACKBONE = {
    "_target_": "panoptic_ibs.backbones.TimmBackbone",
    "name": "resnet18",
    "pretrained": False,
    "options": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]},
}
HEADS: dict[str, dict[str, Any]] = {
    "panoptic_fcn": {
        "_target_": "panoptic_ibs.heads.panoptic_fcn.PanopticFCN",
        "channels": 16,
        "feature_channels": 16,
        "depth": 1,
        "inference": {"center_threshold": 0.005, "region_threshold": 0.005, "instance_threshold": 0.0, "min_score": 0.0,
                      "stuff_area": 16},
    },
    "mask2former": {
        "_target_": "panoptic_ibs.heads.mask2former.Mask2Former",
        "queries": 12,
        "channels": 32,
        "encoder_hidden": 32,
        "encoder_depth": 1,
        "decoder_hidden": 32,
        "decoder_depth": 2,
        "score_threshold": 0.0,
        "overlap_threshold": 0.0,
        "loss": {"points": 128},
    },
    "ciae": {
        "_target_": "panoptic_ibs.heads.ciae.CIAE",
        "dimension": 8,
        "channels": 16,
        "embedding_channels": 16,
        "depth": 1,
        "inference": {"score_threshold": 0.0, "stuff_area": 16, "proposals": 10},
    },
}  # fmt: skip


def model_of(head: str) -> PanopticModel:
    """A narrow network with weights that follow from the head's name."""
    torch.manual_seed(7)
    model = build_model({"backbone": BACKBONE, "head": HEADS[head]}, class_table())
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "head" in name:  # wide enough to tell pixels apart
            torch.nn.init.kaiming_uniform_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def record(head: str) -> dict[str, Any]:
    """Loss terms, the IBS loss, gradient norms by module, segments, and a digest of every tensor of it."""
    model = model_of(head).train()
    batch = random_batch(model.classes, (64, 96), count=4, segments=5)
    torch.manual_seed(11)
    terms, segments = model.losses(batch)
    terms = {**terms, "ibs": IntraBatchSupervision(weight=1.0, partners="paired")(segments, batch.pairs, batch.targets)}
    torch.stack([term.float() for term in terms.values()]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    groups: dict[str, float] = {}
    for name, gradient in gradients.items():
        group = ".".join(name.split(".")[:3])
        groups[group] = groups.get(group, 0.0) + float(gradient.double().square().sum())
    with torch.inference_mode():
        predictions = model.eval().predict_batch(random_batch(model.classes, (64, 96), count=2, segments=5, seed=3))
    return {
        "losses": {name: float(term.detach()) for name, term in terms.items()},
        "gradients": {name: value**0.5 for name, value in groups.items()},
        "segments": [
            {
                "classes": p.class_ids.tolist(),
                "scores": p.scores.tolist(),
                "areas": torch.bincount(p.id_map.long().ravel(), minlength=len(p) + 1).tolist(),
            }
            for p in predictions
        ],
        "digest": {
            "losses": _digest(*terms.values()),
            "gradients": _digest(*gradients.values()),
            "predictions": _digest(*(t for p in predictions for t in (p.id_map, p.class_ids, p.scores))),
        },
    }


def _digest(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def main(file: str, other: str | None = None) -> int:
    """Write a record; 1 if another one differs in a bit."""
    torch.set_num_threads(1)
    records = {head: record(head) for head in HEADS}
    Path(file).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if other is None:
        return 0
    theirs = json.loads(Path(other).read_text(encoding="utf-8"))
    differ = [
        f"{head}.{part}"
        for head, found in records.items()
        for part, digest in found["digest"].items()
        if digest != theirs[head]["digest"][part]
    ]
    print("differ: " + ", ".join(differ) if differ else f"bit-equal: {', '.join(records)}")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
