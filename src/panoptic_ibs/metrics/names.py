"""What every number is called and means: the one table that tables, pages, loggers and the terminal read."""

from __future__ import annotations

from typing import NamedTuple

SIZES = ("small", "medium", "large")


class Metric(NamedTuple):
    """A number of ``metrics.json``.

    Attributes:
        key: where it stands there; a dot leads into an object, and ``confusion@50`` is ``confusion["50"]``.
        name: in full.
        short: as the head of a column.
        help: what it is, for someone who has not read the paper.
        lower: whether lower is better.
        first: whether a group of numbers begins with it.
        share: whether it is a share, shown in percent; else a count.
    """

    key: str
    name: str
    short: str
    help: str
    lower: bool = False
    first: bool = False
    share: bool = True


def _quality(suffix: str, over: str, first: bool) -> list[Metric]:
    """PQ and its factors over some of the classes."""
    name, short = (f" {suffix}", f"_{suffix[:2]}") if suffix else ("", "")
    tail = f"_{suffix}" if suffix else ""
    return [
        Metric(
            f"pq{tail}",
            f"PQ{name}",
            f"PQ{short}",
            f"panoptic quality: finding segments (RQ) x outlining them (SQ), mean over {over}",
            first=first,
        ),
        Metric(f"sq{tail}", f"SQ{name}", f"SQ{short}", f"segmentation quality of {over}: mean IoU of matched segments"),
        Metric(f"rq{tail}", f"RQ{name}", f"RQ{short}", f"recognition quality of {over}: F1 score of finding segments"),
    ]


def _confusion(percent: int, first: bool = False) -> Metric:
    return Metric(
        f"confusion@{percent}", f"Confusion @ {percent} %", f"Conf@{percent}",
        f"share of the predicted thing segments that cover more than {percent} % of two or more true instances",
        lower=True, first=first,
    )  # fmt: skip


def _precision(prefix: str, name: str, of: str) -> list[Metric]:
    """Average precision and what it is made of."""
    kinds = [("", "", "", "over IoU 50 to 95 %"), ("50", " at IoU 50", "50", "at IoU 50 %"),
             ("75", " at IoU 75", "75", "at IoU 75 %"),
             *((f"_{size}", f", {size}", f" {size[0].upper()}", f"of {size} ones") for size in SIZES)]  # fmt: skip
    return [
        Metric(f"{prefix}ap{key}", f"{name}{long}", f"AP{short}", f"average precision of {of}, {tail}", first=not key)
        for key, long, short, tail in kinds
    ]


METRICS = (
    *_quality("", "the classes that occur", first=False),
    *_quality("things", "the thing classes", first=True),
    *_quality("stuff", "the stuff classes", first=True),
    Metric("acc_things", "Acc things", "Acc_th",
           "share of the true thing pixels that lie in correctly matched predictions", first=True),
    Metric("prec_things", "Prec things", "Prec_th", "share of the predicted thing pixels that are correct"),
    _confusion(5, first=True), _confusion(25), _confusion(50), _confusion(75),
    *(Metric(f"confusion_by_size.{size}.50", f"Confusion @ 50 % of {size} segments", f"Conf@50 {size}",
             f"confusion at 50 % of the {size} predicted things", lower=True, first=size == "small")
      for size in SIZES),
    *(Metric(f"pq_by_size.{size}.pq", f"PQ of {size} segments", f"PQ {size}",
             "a match and a miss count at the true segment's area, a false prediction at its own; small is below 32² "
             "pixels, large from 96² on", first=size == "small")
      for size in SIZES),
    *(Metric(f"pq_by_size.{size}.pq_things", f"PQ of {size} things", f"PQ_th {size}",
             f"PQ over the thing classes of {size} segments", first=size == "small")
      for size in SIZES),
    Metric("miou", "mIoU", "mIoU", "mean over the classes of the semantic IoU, which knows no instances", first=True),
    Metric("boundary_pq", "Boundary PQ", "B-PQ",
           "PQ with the smaller of mask IoU and the IoU of the zones along the outlines", first=True),
    Metric("boundary_pq_things", "Boundary PQ things", "B-PQ_th", "boundary PQ over the thing classes"),
    Metric("boundary_pq_stuff", "Boundary PQ stuff", "B-PQ_st", "boundary PQ over the stuff classes"),
    *_precision("", "AP", "instances as COCO defines it"),
    *_precision("ap_from_panoptic.", "AP of the panoptic result", "the thing segments of the panoptic result"),
    Metric("things.predicted", "Things predicted", "predicted", "thing segments predicted", first=True, share=False),
    Metric("things.matched", "Things matched", "matched", "thing segments that match a true one", share=False),
    Metric("things.true", "True things", "true", "true thing segments", share=False),
)  # fmt: skip
_BY_KEY = {metric.key: metric for metric in METRICS}
HEADLINE = ("pq", "pq_things", "pq_stuff", "acc_things", "prec_things")


def named(key: str) -> Metric:
    """The number at a key of ``metrics.json``.

    Raises:
        KeyError: there is none.
    """
    return _BY_KEY[key]


def columns(*keys: str) -> tuple[tuple[str, str], ...]:
    """(key, head of the column) of several numbers; see :func:`named`."""
    return tuple((key, named(key).short) for key in keys)
