"""Window first against resize-then-crop, on 1024x2048 images with the paired sampler's scales for Cityscapes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CROP = (512, 1024)
SIZE = (1024, 2048)
REQUESTS = 200


def _write_set(root: Path, images: int = 4) -> None:
    """Images of the size and about the segment sizes of Cityscapes, in COCO panoptic layout."""
    rng = np.random.default_rng(0)
    (root / "val").mkdir(parents=True)
    (root / "annotations/panoptic_val").mkdir(parents=True)
    entries, annotations = [], []
    for i in range(images):
        coarse = rng.integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(root / f"val/{i}.png")
        ids = np.full(SIZE, 1, np.int64)
        ids[SIZE[0] // 2 :] = 2
        for k in range(30):
            h = int(np.exp(rng.uniform(np.log(12), np.log(500))))
            w = int(h * rng.uniform(0.4, 2.0))
            y, x = int(rng.integers(0, SIZE[0] - h)), int(rng.integers(0, SIZE[1] - w))
            ids[y : y + h, x : x + w] = 26_000 + k
        segments = []
        for value in np.unique(ids):
            ys, xs = np.nonzero(ids == value)
            box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
            category = int(value) if value < 3 else 26
            segments.append({"id": int(value), "category_id": category, "bbox": box, "area": len(ys), "iscrowd": 0})
        rgb = np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], -1).astype(np.uint8)
        Image.fromarray(rgb).save(root / f"annotations/panoptic_val/{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]})
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    names = {1: ("building", 0), 2: ("road", 0), 26: ("car", 1)}
    categories = [{"id": k, "name": n, "isthing": t} for k, (n, t) in names.items()]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "annotations/panoptic_val.json").write_text(json.dumps(content))


def _requests(reader: Any) -> list[Any]:
    """The first requests of the paired sampler at the published scales."""
    from panoptic_ibs.data.geometry import ShortestSide
    from panoptic_ibs.data.sampling import PairedCropSampler

    resize = ShortestSide(range=(512, 2048), longest=4096)
    sampler = PairedCropSampler(reader, crop_size=CROP, resize=resize, flip_probability=0.0)
    return [r for i in range(REQUESTS // 2) for r in sampler.requests(0, i)]


def _window_first(image: np.ndarray, id_map: np.ndarray, request: Any) -> tuple[np.ndarray, np.ndarray]:
    from panoptic_ibs.data.windows import plan, resize_id_map, resize_image

    part = plan(SIZE, request.resized, request.window)
    y, x, h, w = part.source
    source, ids = image[y : y + h, x : x + w], id_map[y : y + h, x : x + w]
    return resize_image(source, part), resize_id_map(ids, SIZE, request.resized, part)


def _resize_then_crop(image: np.ndarray, id_map: np.ndarray, request: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the reference does: the whole image, then the crop."""
    size = request.resized[::-1]
    top, left, height, width = request.window
    box = (left, top, min(left + width, size[0]), min(top + height, size[1]))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    ids = Image.fromarray(id_map).resize(size, Image.Resampling.NEAREST)
    return np.asarray(resized.crop(box)), np.asarray(ids.crop(box))


def _decoding(resize: Callable[..., Any], window_first: bool) -> Callable[[Any, Any], Any]:
    """The same from files: window first converts and looks up only the window, too."""
    from panoptic_ibs.data.windows import plan, resize_id_map, resize_image

    def whole(reader: Any, request: Any) -> Any:
        return resize(*reader.read(request.image_index), request)

    def part_only(reader: Any, request: Any) -> Any:
        part = plan(SIZE, request.resized, request.window)
        image, ids = reader.read(request.image_index, part.source)
        return resize_image(image, part), resize_id_map(ids, SIZE, request.resized, part)

    return part_only if window_first else whole


def _measure(name: str, root: Path) -> dict[str, float]:
    """One variant in this process: CPU seconds a request (mean), and peak memory above the start in MB (Linux)."""
    from panoptic_ibs.data.readers import coco_panoptic

    reader = coco_panoptic(root, "val", cache_dir=root / "cache")
    window_first = name.startswith("window")
    resize = _window_first if window_first else _resize_then_crop
    requests = _requests(reader)
    if name.endswith("files"):
        run = _decoding(resize, window_first)
        jobs = [(reader, r) for r in requests]
    else:
        stored = [reader.read(i) for i in range(len(reader))]
        run = lambda pair, request: resize(*pair, request)  # noqa: E731
        jobs = [(stored[r.image_index], r) for r in requests]
    run(*min(jobs, key=lambda job: job[1].resized))  # imports and first allocations
    before = _forget_peak()
    start = time.process_time()
    for job in jobs:
        run(*job)
    seconds = (time.process_time() - start) / len(jobs)
    return {"seconds": seconds, "memory": _status("VmHWM") - before}


def _forget_peak() -> float:
    """Reset the peak of resident memory to what is resident now (Linux); returns that in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def run() -> list[dict[str, Any]]:
    """Rows of the benchmark; each variant runs in a process of its own, so that peaks do not mix."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _write_set(Path(folder))
        for where in ("arrays", "files"):
            measured = {}
            for variant in ("window", "whole"):
                command = [sys.executable, __file__, f"{variant}-{where}", folder]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                measured[variant] = json.loads(answer.splitlines()[-1])
            decoding = "decoding excluded" if where == "arrays" else "decoding included"
            for key, unit, factor in (("seconds", "ms", 1000.0), ("memory", "MB", 1.0)):
                ours, peer = (measured[v][key] * factor for v in ("window", "whole"))
                what = "time" if key == "seconds" else "peak memory above the start"
                rows.append(
                    {
                        "what": f"crop 512x1024 of 1024x2048, paired scales, {decoding}: {what}",
                        "ours": ours,
                        "peer": peer,
                        "unit": unit,
                        "ratio": peer / max(ours, 1e-9),
                        "target": ">= 5" if (where, key) == ("arrays", "seconds") else "",
                    }
                )
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        for row in run():
            print(row)
