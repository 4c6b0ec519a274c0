"""Two runs side by side."""

from __future__ import annotations

from typing import Any

from .embed import PHOTOGRAPH_BUDGET, Embedder
from .gallery import Gallery, read_gallery
from .page import css_color, gallery_view
from .records import Run
from .run_figures import per_class


def pair_classes(a: Run, b: Run) -> list[dict[str, Any]]:
    """PQ per class of two runs (classes that occur in both), largest difference first."""
    gallery = read_gallery(a.path)
    colors = {c.name: css_color(c.color) for c in gallery.classes.classes} if gallery and gallery.classes else {}
    of_b = dict(per_class(b))
    rows = [
        {"name": name, "a": values["pq"], "b": of_b[name]["pq"], "color": colors.get(name)}
        for name, values in per_class(a)
        if name in of_b
    ]
    for row in rows:
        row["difference"] = row["b"] - row["a"]
    return sorted(rows, key=lambda row: -abs(row["difference"]))


def pair_gallery(a: Run, b: Run) -> dict[str, Any] | None:
    """Images that both galleries show; input and truth once (from ``a``), predictions and confused segments of both."""
    left, right = read_gallery(a.path), read_gallery(b.path)
    if left is None or right is None:
        return None
    of_right = {str(item.get("image_id")): item for item in right.items}
    shared = [item for item in left.items if str(item.get("image_id")) in of_right]
    partners = [of_right[str(item.get("image_id"))] for item in shared]
    partners = [{k: v for k, v in item.items() if k not in ("input", "truth")} for item in partners]
    half = Embedder(PHOTOGRAPH_BUDGET // 2)
    first = gallery_view(Gallery(left.folder, shared, left.classes, []), half, None)
    second = gallery_view(Gallery(right.folder, partners, right.classes, []), half, None)
    if first is None or second is None:
        return None
    return {"entries": list(zip(first["entries"], second["entries"], strict=True)), "legend": first["legend"]}
