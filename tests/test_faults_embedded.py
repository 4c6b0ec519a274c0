"""The embedded data set: nothing outlives the process that draws it, and a set is never taken for another one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from panoptic_ibs.data.datamodule import PanopticDataModule
from panoptic_ibs.data.synthetic import write_dataset
from panoptic_ibs.errors import DataError

ASKED: dict[str, Any] = {"num_train": 2, "num_val": 1, "size": [32, 64], "seed": 0, "scenes": "street"}


def module(root: Path, **changes: Any) -> PanopticDataModule:
    return PanopticDataModule(name="synthetic", root=root, train="train", val="val", synthetic={**ASKED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": "lots"}, "scenes=street, now lots"),
        ({"num_train": 3}, r"num_train=2, now 3.*take it as it is \(data\.synthetic\.num_train=2\)"),
        ({"size": [64, 64]}, r"size=\[32, 64\], now \[64, 64\].*\(data\.synthetic\.size=\[32,64\]\)"),
        ({"seed": 1}, "seed=0, now 1"),
    ],
    ids=["scenes", "number", "size", "seed"],
)
def test_another_set_is_not_taken_for_the_one_asked_for(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    module(tmp_path / "set").prepare_data()
    module(tmp_path / "set").setup("fit")  # the very one is
    with pytest.raises(DataError, match=message) as met:
        module(tmp_path / "set", **changes).setup("fit")
    assert str(tmp_path / "set") in str(met.value)


def test_a_set_of_an_older_version(tmp_path: Path) -> None:
    module(tmp_path / "set").prepare_data()
    file = tmp_path / "set" / "synthetic.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    with pytest.raises(DataError, match=r"version=0, now 1.*Choose another root= or remove that folder\.$"):
        module(tmp_path / "set").prepare_data()
    file.unlink()
    with pytest.raises(DataError, match="holds other files"):
        module(tmp_path / "set").prepare_data()


def test_the_folder_has_the_rights_of_the_umask(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        write_dataset(tmp_path / "set", 1, 1, (32, 32), progress=False)
    finally:
        os.umask(former)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "set", *(tmp_path / "set").rglob("*"))}
    assert modes == {0o750, 0o640}


def _group(pid: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_one_that_draws(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from panoptic_ibs.data.synthetic import write_dataset\n"
        f"if __name__ == '__main__': write_dataset(Path({str(tmp_path / 'set')!r}), 400, 1, (128, 256), progress=False)"
    )
    (tmp_path / "draw.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "draw.py"], start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".set.part-*/leftImg8bit/train/*/*.png")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(_group(process.pid)) > 2  # itself and those that draw
    process.send_signal(number)
    assert process.wait(30) != 0
    while _group(process.pid):
        assert time.monotonic() < deadline, _group(process.pid)
        time.sleep(0.05)
    assert [p.name[:10] for p in tmp_path.iterdir() if p.is_dir()] == [".set.part-"]
    write_dataset(tmp_path / "set", 1, 1, (32, 32), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draw.py", "set"]
