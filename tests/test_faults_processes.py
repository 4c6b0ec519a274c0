"""Several processes of one run: what the command says and returns when they end, in whatever way."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli_helpers import TINY, run
from panoptic_ibs import processes
from panoptic_ibs.errors import ConfigError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX")


def trainer_for(count: int) -> Any:
    """All that a supervisor asks of Lightning's trainer."""
    place = SimpleNamespace(
        main_address="127.0.0.1", main_port=1, node_rank=lambda: 0, creates_processes_externally=False
    )
    return SimpleNamespace(
        strategy=SimpleNamespace(launcher=SimpleNamespace(cluster_environment=place, num_processes=count, num_nodes=1))
    )


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the module that each of three processes runs, from the body of a function of its rank."""

    def make(body: str) -> str:
        head = """
            import os, signal, sys, time
            from pathlib import Path
            from panoptic_ibs import processes
            processes.end_with_parent()
            rank, folder = int(os.environ["LOCAL_RANK"]), Path(os.environ["TEST_FOLDER"])
            (folder / f"{rank}.pid").write_text(str(os.getpid()))
        """
        (tmp_path / "fake_member.py").write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return "fake_member"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    return make


def gone(folder: Path, count: int = 3) -> bool:
    """Whether all processes of the test have ended."""

    def alive(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    return not any(alive(int((folder / f"{rank}.pid").read_text())) for rank in range(count))


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", 0, ""),
        # the peers of a killed process fail with whatever their library says
        (
            "time.sleep(0.3 + rank)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
            "if rank == 2: sys.exit(processes.tell('Traceback: connection closed by peer', 1))\ntime.sleep(600)",
            1,
            "error: process 2 of 3 (pid {1}) was ended by SIGKILL, as the system does when memory runs out; so the "
            "others were ended, too. The last checkpoint is kept: resume with "
            "ckpt_path={folder}/checkpoints/last.ckpt.",
        ),
        # bad input that one meets alone, after another one has lost its peer and a third one waits for ever
        (
            "time.sleep(0.3 * rank)\nif rank == 1: sys.exit(processes.tell('Traceback: connection closed', 1))\n"
            "if rank == 2: sys.exit(processes.tell('error: a.png: cannot be decoded.', 2))\ntime.sleep(600)",
            2,
            "error: a.png: cannot be decoded.",
        ),
        ("sys.exit(processes.tell('error: the same for all.', 2))", 2, "error: the same for all."),
        ("if rank == 0: sys.exit(processes.tell('Traceback: a defect', 1))\ntime.sleep(600)", 1, "Traceback: a defect"),
        # the first one writes the report alone, after the others have left
        ("time.sleep(2 if rank == 0 else 0)\nsys.exit(130)", 130, ""),
    ],
    ids=["sound", "killed", "alone", "all", "defect", "report"],
)
def test_one_says_it_for_all(
    body: str, status: int, message: str, member: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert processes.supervise(member(body), [], trainer_for(3), tmp_path, "train") == status
    pids = [(tmp_path / f"{rank}.pid").read_text() for rank in range(3)]
    assert capfd.readouterr().err.strip() == message.format(*pids, folder=tmp_path)
    assert gone(tmp_path)


SUPERVISOR = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from panoptic_ibs import processes
{inspect.getsource(trainer_for)}
processes.GRACE_SECONDS = 1.0
sys.exit(processes.supervise("fake_member", [], trainer_for(3), Path(sys.argv[1]), "train"))
"""


def start(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A supervisor of three in a process of its own, all of them ready."""
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path)], start_new_session=True)
    wait_for(*(tmp_path / f"{rank}.ready" for rank in range(3)))
    return process


READY = """
    got = []
    def note(number, frame):
        got.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    (folder / f"{rank}.ready").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_each_gets_a_signal_once(number: signal.Signals, member: Any, tmp_path: Path) -> None:
    """As a terminal and ``timeout`` send it: to the whole group."""
    member(READY + """
    while not got: time.sleep(0.05)
    time.sleep(0.5)
    (folder / f"{rank}.got").write_text(str(got))
    sys.exit(128 + got[0])
""")  # fmt: skip
    process = start(tmp_path)
    os.killpg(process.pid, number)
    assert process.wait(30) == 128 + number
    assert [(tmp_path / f"{rank}.got").read_text() for rank in range(3)] == [f"[{int(number)}]"] * 3


def test_a_second_signal_ends_those_that_hang(member: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member(READY + "\n    while True: time.sleep(1)")
    process = start(tmp_path)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(30) == 130
    assert gone(tmp_path)


def test_none_outlives_the_command(member: Any, tmp_path: Path) -> None:
    member(READY + "\n    while True: time.sleep(1)")
    process = start(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not gone(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_strategies() -> None:
    from lightning import Trainer

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    assert not processes.needed(Trainer(devices=1, **quiet))
    assert not processes.needed(Trainer(devices=1, strategy="ddp", **quiet))
    assert processes.needed(Trainer(devices=2, strategy="ddp", **quiet))
    with pytest.raises(ConfigError, match=r"trainer\.strategy .*such as ddp"):
        processes.needed(Trainer(devices=2, strategy="ddp_spawn", **quiet))


TWO = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu")


def same(first: Any, second: Any) -> bool:
    """Whether two JSON values agree, numbers up to the order of their sums."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, float):
        return first == pytest.approx(second, abs=1e-12)
    return bool(first == second)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_processes_end_with_the_numbers_of_one(tmp_path: Path) -> None:
    """Training, three images for its evaluation, one for its baselines: of that one process has none."""
    cache = f"paths.cache={tmp_path}"
    sizes = ("data.synthetic.num_train=4", "data.synthetic.num_val=3", "data.synthetic.size=[96,192]")
    command = [sys.executable, "-m", "panoptic_ibs.train", *TINY, *sizes, *TWO, cache, "evaluation.limit=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"run_dir={tmp_path / 'two'}"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    assert (tmp_path / "two" / "report" / "index.html").is_file()
    assert read(tmp_path / "two" / "timing.json")["evaluation_seconds"] > 0
    metrics, three = (read(tmp_path / "two" / f"{name}.json") for name in ("metrics", "baselines"))
    assert "hydra.run.dir" not in metrics["command"]

    from cli_helpers import compose
    from panoptic_ibs import baselines, instantiation

    config = compose(*TINY, *sizes, cache)
    data = instantiation.make_data(config)
    data.setup("fit")
    alone = baselines.baselines(data, instantiation.model_config(config, data.eval_resize), 1, config.seed)
    assert same(alone, three)
    assert alone["stuff only"]["pq"] > 0

    checkpoint = f"ckpt_path={tmp_path / 'two' / 'checkpoints' / 'last.ckpt'}"
    judged = run(
        "evaluate", *sizes, cache, checkpoint, "trainer=cpu", f"run_dir={tmp_path / 'one'}", "data.num_workers=0"
    )
    assert judged.code == 0, judged.err
    one = read(tmp_path / "one" / "metrics.json")
    assert one["num_images"] == 3
    results = metrics.keys() - {"step", "interrupted", "config", "versions", "command", "best"}
    assert len(results) > 10
    assert same({key: one[key] for key in results}, {key: metrics[key] for key in results})


def test_being_told_to_stop(tmp_path: Path) -> None:
    """As a scheduler does it. One image is evaluated then, so one of the two processes has none."""
    sizes = ("data.synthetic.num_train=4", "data.synthetic.num_val=3", "data.synthetic.size=[96,192]")
    command = [sys.executable, "-m", "panoptic_ibs.train", *TINY, *sizes, *TWO, f"paths.cache={tmp_path}"]
    options = ("trainer.max_steps=100000", "trainer.val_check_interval=100000", "evaluation.interrupted_images=1")
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [*command, *options, f"run_dir={run_dir}"], start_new_session=True, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows, deadline = run_dir / "metrics.csv", time.monotonic() + 300
    while not rows.is_file() or rows.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 143, told
    assert "Traceback" not in told
    assert told.count("stopped by SIGTERM") == 1
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()
    assert (run_dir / "report" / "index.html").is_file()
    metrics = read(run_dir / "metrics.json")
    assert metrics["interrupted"]
    assert metrics["num_images"] == 1
