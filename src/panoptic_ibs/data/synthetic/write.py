"""Write a synthetic set to disk in exactly the Cityscapes panoptic layout: all of it or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panoptic_ibs import signals
from panoptic_ibs.classes import ClassTable
from panoptic_ibs.errors import DataError
from panoptic_ibs.files import umask
from panoptic_ibs.ranges import AtLeastOne, Bounds, Whole

from .lots import LOT_CLASSES, render_lot
from .picture import CLASSES, SyntheticImage
from .render import render

Side = Annotated[int, Bounds(least=32)]  # pixels

SCENES: dict[str, tuple[ClassTable, Callable[[int, int, tuple[int, int]], SyntheticImage]]] = {
    "street": (CLASSES, render),
    "lots": (LOT_CLASSES, render_lot),
}
"""What the pictures may show: its classes, and what draws picture ``index`` of the set ``seed`` at a size."""

CITY = "synthville"
VERSION = 1
"""Raise when the pictures change: a set written by an older version is then not taken for a complete one."""

_SUPERCATEGORY = {
    "road": "flat", "sidewalk": "flat", "building": "construction", "wall": "construction", "fence": "construction",
    "pole": "object", "vegetation": "nature", "terrain": "nature", "sky": "sky", "person": "human", "rider": "human",
}  # fmt: skip
_README = """Synthetic pictures, made by panoptic_ibs (no photograph, no real street, no real person).

Layout and label ids as in Cityscapes, written by `panoptic_ibs.data.synthetic.write_dataset` with the arguments in
synthetic.json; the same arguments give the same pictures.

leftImg8bit/{{train,val}}/{city}/*_leftImg8bit.png          pictures, RGB
gtFine/cityscapes_panoptic_{{train,val}}.json              segments, COCO panoptic format
gtFine/cityscapes_panoptic_{{train,val}}/*_panoptic.png    id = R + 256 G + 65536 B; 0 is void
"""


def write_dataset(
    root: Path,
    num_train: AtLeastOne,
    num_val: AtLeastOne,
    size: tuple[Side, Side] = (256, 512),
    seed: Whole = 0,
    progress: bool = True,
    workers: AtLeastOne = 2,
    scenes: str = "street",  # its own message lists them
) -> None:
    """Write ``num_train`` and ``num_val`` pictures of ``size`` (height, width) under ``root``.

    ``scenes``: ``street`` scenes, or ``lots``, car parks from above, which are easier.

    Everything is written to a temporary folder beside ``root`` that takes its name when complete, so an interrupted
    run leaves nothing half-made. A complete set of the same arguments is left alone. The bytes do not depend on the
    number of ``workers`` (1: no other process is started).

    Raises:
        DataError: if an argument is out of range, ``root`` holds anything else, or its parent cannot be written.
    """
    root = Path(root).expanduser().absolute()
    if num_train < 1 or num_val < 1 or min(size) < 32 or seed < 0:
        raise DataError(
            f"Synthetic set: num_train={num_train}, num_val={num_val}, size={tuple(size)}, seed={seed}: "
            "need at least one picture in each split, 32 pixels on each side and a seed that is not negative."
        )
    arguments: dict[str, Any] = {
        "synthetic": True, "version": VERSION, "num_train": num_train, "num_val": num_val,
        "size": list(size), "seed": seed,
    }  # fmt: skip
    if scenes not in SCENES:
        raise DataError(f"Synthetic set: scenes={scenes} is unknown. Choose one of: {', '.join(SCENES)}.")
    if scenes != "street":
        arguments["scenes"] = scenes
    if _is_complete(root, arguments):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with _turn(root.with_name(f".{root.name}.lock")) as ours:
            if ours:
                _clear_away(root)
            if not _is_complete(root, arguments):  # another process may have written it meanwhile
                _write(root, arguments, progress, workers)
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error.strerror}). Choose another root=.") from error


@contextmanager
def _turn(path: Path) -> Iterator[bool]:
    """Wait until no other process holds the file's lock, then hold it; the system takes it from one that dies. Gives
    whether there is a lock at all.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: several processes may write the set, and one of them puts it in place
        yield False
        return
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                yield False
                return
            if not _names(path, lock.fileno()):  # the one that we waited for has removed it
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _clear_away(root: Path) -> None:
    """Remove what processes that were killed have left half drawn; the lock says that none is at work."""
    for part in root.parent.glob(f".{escape(root.name)}.part-*"):
        shutil.rmtree(part, ignore_errors=True)


def _write(root: Path, arguments: dict[str, Any], progress: bool, workers: int) -> None:
    """Write the set beside its place and move it there."""
    part = Path(tempfile.mkdtemp(prefix=f".{root.name}.part-", dir=root.parent))
    try:
        _fill(part, arguments, progress, workers)
        part.chmod(0o777 & ~umask())
        with suppress(OSError):  # an empty folder may stand where the set goes
            root.rmdir()
        try:
            os.rename(part, root)
        except OSError as error:
            if _is_complete(root, arguments):  # another process wrote the same set meanwhile
                return
            raise DataError(f"{root}: cannot be put in place ({error.strerror}). Choose another root=.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_complete(root: Path, arguments: dict[str, Any]) -> bool:
    """Whether the very set is there already; anything else that is there raises."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "synthetic.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{root}: holds other files, not a synthetic set. Choose another root= or remove it."
        ) from error
    if found == arguments:
        return True
    had: dict[str, Any] = found if isinstance(found, dict) else {}
    had = {"scenes": "street", **had}
    asked = {"scenes": "street", **arguments}
    keys = [k for k in {**asked, **had} if had.get(k, "not given") != asked.get(k, "not given")]
    differs = ", ".join(f"{k}={had.get(k, 'not given')}, now {asked.get(k, 'not given')}" for k in keys)
    known = " ".join(f"data.synthetic.{k}={had.get(k)}".replace(", ", ",") for k in keys)
    take = "" if {"synthetic", "version"} & set(keys) else f", or take it as it is ({known})"
    raise DataError(
        f"{root}: holds a synthetic set made with other arguments ({differs}). "
        f"Choose another root= or remove that folder{take}."
    )


def _fill(folder: Path, arguments: dict[str, Any], progress: bool, workers: int) -> None:
    """Write pictures, labels and JSON into an empty folder."""
    height, width = arguments["size"]
    scenes = arguments.get("scenes", "street")
    counts = {"train": arguments["num_train"], "val": arguments["num_val"]}
    jobs = []
    for split in counts:
        (folder / "leftImg8bit" / split / CITY).mkdir(parents=True)
        (folder / "gtFine" / f"cityscapes_panoptic_{split}").mkdir(parents=True)
        first = 0 if split == "train" else counts["train"]
        jobs += [
            (str(folder), split, number, scenes, arguments["seed"], first + number, (height, width))
            for number in range(counts[split])
        ]
    annotations: dict[str, list[dict[str, Any]]] = {split: [] for split in counts}
    for job, annotation in zip(jobs, _progress(_map(jobs, workers), len(jobs), progress), strict=True):
        annotations[job[1]].append(annotation)
    categories = [
        {
            "id": c["id"], "name": c["name"], "color": c["color"], "isthing": c["isthing"],
            "supercategory": _SUPERCATEGORY.get(c["name"], "vehicle"),
        }
        for c in SCENES[scenes][0].to_coco()
    ]  # fmt: skip
    for split, rows in annotations.items():
        images = [
            {
                "id": row["image_id"], "width": width, "height": height,
                "file_name": f"{row['image_id']}_gtFine_leftImg8bit.png",
            }
            for row in rows
        ]  # fmt: skip
        content = {"images": images, "annotations": rows, "categories": categories}
        path = folder / "gtFine" / f"cityscapes_panoptic_{split}.json"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "README.txt").write_text(_README.format(city=CITY), encoding="utf-8")
    (folder / "synthetic.json").write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")


Job = tuple[str, str, int, str, int, int, tuple[int, int]]
"""Folder, split, number in the split, scenes, seed, index, size."""


def _map(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1 or len(jobs) < 8:
        yield from map(_write_one, jobs)
        return
    # spawn: fork is unsafe once torch or cv2 run threads
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_serve)
    done = 0
    try:
        for row in pool.map(_write_one, jobs, chunksize=4):
            yield row
            done += 1
    except BrokenProcessPool:  # a script without a main guard, or no memory for workers: go on without them
        yield from map(_write_one, jobs[done:])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _serve() -> None:
    """Workers share the cores, so each keeps to one thread; signals are the parent's affair, whom none outlives."""
    import cv2

    cv2.setNumThreads(1)
    signals.let_first_pass()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _progress(rows: Iterator[dict[str, Any]], total: int, show: bool) -> Iterator[dict[str, Any]]:
    if not show:
        yield from rows
        return
    from rich.progress import track

    yield from track(rows, description="synthetic pictures", total=total)


def _write_one(job: Job) -> dict[str, Any]:
    """Render and write one picture; returns its annotation."""
    folder, split, number, scenes, seed, index, size = job
    name = f"{CITY}_{number:06d}_000019"
    picture = SCENES[scenes][1](seed, index, size)
    ids, infos = panoptic_ids(picture)
    file_name = f"{name}_gtFine_panoptic.png"
    image_path = Path(folder, "leftImg8bit", split, CITY, f"{name}_leftImg8bit.png")
    Image.fromarray(picture.image).save(image_path, compress_level=1)
    Image.fromarray(ids).save(Path(folder, "gtFine", f"cityscapes_panoptic_{split}", file_name), compress_level=2)
    return {"image_id": name, "file_name": file_name, "segments_info": infos}


def panoptic_ids(picture: SyntheticImage) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Panoptic PNG (H, W, 3) uint8 and ``segments_info`` of a picture.

    Ids as in Cityscapes: the label id for stuff and crowd, label id * 1000 + n for instances.
    """
    from scipy.ndimage import find_objects

    boxes = find_objects(picture.id_map)
    areas = np.bincount(picture.id_map.ravel(), minlength=len(picture.segments) + 1)
    table = np.zeros((len(picture.segments) + 1, 3), np.uint8)
    counts: dict[str, int] = {}
    infos = []
    for row, (name, crowd) in enumerate(picture.segments):
        info = CLASSES[CLASSES.names.index(name)]
        segment = info.dataset_id
        if info.is_thing and not crowd:
            segment = info.dataset_id * 1000 + counts.get(name, 0)
            counts[name] = counts.get(name, 0) + 1
        ys, xs = boxes[row]
        table[row + 1] = segment & 255, segment >> 8 & 255, segment >> 16
        infos.append(
            {
                "id": segment, "category_id": info.dataset_id, "area": int(areas[row + 1]),
                "bbox": [xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start], "iscrowd": int(crowd),
            }
        )  # fmt: skip
    return table[picture.id_map], infos
