"""Prepare data sets: ``python -m panoptic_ibs.prepare check|synthetic key=value ...``.

check      scan a data set, list all defects, exit with 1 if there are any
           data=NAME data.root=DIR [data.train=SPLIT] [data.val=SPLIT] [images=true] [workers=N] [run_dir=DIR]
           [data.allow_outside=false]
           NAME is coco_panoptic, cityscapes, vistas or synthetic; data.train=null leaves a split out.
           data.allow_outside=true takes files that the annotations name outside the data set's folders.
           Writes check.json to run_dir (the current folder by default).
synthetic  write the embedded data set in the Cityscapes layout
           root=DIR [num_train=N] [num_val=N] [height=256] [width=512] [seed=0] [scenes=street|lots]
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .configuration.ending import reported
from .errors import ConfigError, DataError, printable
from .streams import start_command

if TYPE_CHECKING:
    from .data.readers import Defect

CHECK_KEYS = (
    "data", "data.root", "data.train", "data.val", "data.allow_outside", "images", "workers", "run_dir"
)  # fmt: skip
SYNTHETIC_KEYS = ("root", "num_train", "num_val", "height", "width", "seed", "scenes")
EMPTY = ("data.train", "data.val")  # an empty split is left out
SHOWN = 40  # rows of the printed table; check.json holds all


def parse(arguments: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Turn ``key=value`` words into a dictionary.

    Raises:
        ConfigError: for a word without ``=`` or an unknown key.
    """
    values: dict[str, str] = {}
    for word in arguments:
        key, sign, value = word.partition("=")
        if not sign or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(f"'{word}' is not understood. {hint}Known keys: {', '.join(known)} (as key=value).")
        if key in values:
            raise ConfigError(f"{key} is given twice: {values[key]} and {value}. Give it once.")
        if not value and key not in EMPTY:
            raise ConfigError(f"{key}= has no value. Give {key}=VALUE, or leave it out.")
        values[key] = value
    return values


def number(values: Mapping[str, str], key: str, default: int, least: int = 0) -> int:
    """A whole number.

    Raises:
        ConfigError: if it is none, or below ``least``.
    """
    text = values.get(key, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 19) or int(text) < least:
        raise ConfigError(f"{key}={text} is not a whole number of at least {least}.")
    return int(text)


def flag(values: Mapping[str, str], key: str, default: bool) -> bool:
    """A word that is true or false.

    Raises:
        ConfigError: another word.
    """
    text = values.get(key, str(default)).lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{key}={values[key]} must be true or false.")
    return text == "true"


def check(values: Mapping[str, str]) -> int:
    """Scan the splits, print a table, write ``check.json``; 1 if there are defects (more than warnings), else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from .data.check import check as scan
    from .data.readers import DEFAULT_SPLITS, Defect, different_classes, make_reader
    from .files import write_json

    name = values.get("data", "")
    if name not in DEFAULT_SPLITS:
        raise ConfigError(f"data={name} is unknown. Choose one of: {', '.join(DEFAULT_SPLITS)}.")
    decode, allow_outside = flag(values, "images", True), flag(values, "data.allow_outside", False)
    if not values.get("data.root"):
        raise ConfigError("data.root is not set. Name the data set's folder: data.root=DIR.")
    if not Path(values["data.root"]).expanduser().is_dir():
        raise ConfigError(f"data.root={values['data.root']}: no such folder.")
    folder = Path(values.get("run_dir", ".")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # before the work: it may not be possible
    console = Console(markup=False, highlight=False)  # brackets in names are no markup
    splits: dict[str, dict[str, Any]] = {}
    everything, readers = [], []
    for key, default in zip(("data.train", "data.val"), DEFAULT_SPLITS[name], strict=True):
        split = values.get(key, default)
        if split in ("", "null", "none"):
            continue
        summary = {"images": 0, "segments": 0}
        try:
            reader = make_reader(name, values["data.root"], split, strict=False, allow_outside=allow_outside)
            readers.append(reader)
            summary = {"images": len(reader), "segments": len(reader.table.segment_ids)}
            with Progress(console=console) as bar:
                step = partial(bar.advance, bar.add_task(escape(printable(split)), total=len(reader)))
                defects = scan(reader, decode, number(values, "workers", 0) or None, step)
            different = different_classes(*readers) if len(readers) == 2 else None
            if different:
                defects.append(Defect("categories", str(reader.json_path), different))
        except DataError as error:
            defects = [Defect("unreadable", values["data.root"], str(error))]
        splits[split] = {**summary, "defects": [vars(d) for d in defects]}
        everything += [(split, d) for d in defects]
        found = _counted(defects)
        console.print(f"{printable(split)}: {summary['images']} images, {summary['segments']} segments, {found}")
    if not splits:
        raise ConfigError("There is no split to check: data.train and data.val are both null.")
    fatal = sum(not d.warning for _, d in everything)
    counts = {"defects": fatal, "warnings": len(everything) - fatal}
    report = {"data": name, "root": values["data.root"], **counts, "splits": splits}
    write_json(folder / "check.json", report)
    _print(everything, folder / "check.json")
    return 1 if fatal else 0


def _counted(defects: Sequence[Defect]) -> str:
    fatal = sum(not d.warning for d in defects)
    warnings = len(defects) - fatal
    return f"{fatal or 'no'} defects" + (f", {warnings} warnings" if warnings else "")


def _print(defects: Sequence[tuple[str, Defect]], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False)  # brackets in names are no markup
    found = _counted([defect for _, defect in defects])
    if defects:
        table = Table("split", "kind", "defect", title=found)
        for split, defect in defects[:SHOWN]:
            table.add_row(Text(printable(split)), defect.kind, Text(printable(defect.message)))
        console.print(table)
        counts = Counter(defect.kind for _, defect in defects)
        console.print(", ".join(f"{kind}: {count}" for kind, count in counts.most_common()))
    console.print(f"{found}; all of it is in {path}", soft_wrap=True)


def synthetic(values: Mapping[str, str]) -> int:
    """Write the embedded data set."""
    from .data.synthetic import write_dataset

    if "root" not in values:
        raise ConfigError("root is not set. Name the folder to write to: root=DIR.")
    write_dataset(
        Path(values["root"]).expanduser(),
        num_train=number(values, "num_train", 64, 1),
        num_val=number(values, "num_val", 16, 1),
        size=(number(values, "height", 256, 32), number(values, "width", 512, 32)),
        seed=number(values, "seed", 0),
        scenes=values.get("scenes", "street"),
    )
    print(f"synthetic data set: {values['root']}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    start_command()
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    if {"-h", "--help"} & set(words) or not words:
        print(__doc__)
        return 0

    def job() -> int:
        if command == "check":
            return check(parse(words[1:], CHECK_KEYS))
        if command == "synthetic":
            return synthetic(parse(words[1:], SYNTHETIC_KEYS))
        raise ConfigError(f"'{command}' is unknown. Say 'check' or 'synthetic'; --help explains.")

    typed = dict(word.partition("=")[::2] for word in words[1:])
    return int(reported(job, typed))


if __name__ == "__main__":
    sys.exit(main())
