"""Threads wait quietly and are no more than help; what a user has set stays. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from panoptic_ibs import cores


def _in_a_command(code: str, **environment: str) -> list[str]:
    """What a new process prints that begins as a command does, with nothing set but what is given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "MKL_", "GOMP_"))}
    whole = f"from panoptic_ibs import cores; cores.start_command()\nimport os, sys\n{code}"
    done = subprocess.run([sys.executable, "-c", whole], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.split(), *done.stderr.splitlines()]


def test_waiting_is_passive_when_torch_comes() -> None:
    said = _in_a_command("import torch", OMP_DISPLAY_ENV="VERBOSE")
    if not any("OMP_WAIT_POLICY" in line for line in said):
        pytest.skip("this build of torch has another library of threads")
    assert any("OMP_WAIT_POLICY = 'PASSIVE'" in line for line in said)


@pytest.mark.parametrize("name", sorted(cores.WAITING))
def test_what_a_user_has_set_stays(name: str) -> None:
    code = "print(*(f'{k}={os.environ[k]}' for k in cores.WAITING if k in os.environ))"
    assert _in_a_command(code, **{name: "7"}) == [f"{name}=7"]


def test_nothing_is_set_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cores.WAITING:
        monkeypatch.delenv(name, raising=False)
    assert torch.__name__ in sys.modules
    cores.start_command()
    assert not set(cores.WAITING) & set(os.environ)


def test_small_networks_get_one_thread() -> None:
    code = (
        "import torch; from torch import nn; torch.set_num_threads(4)\n"
        "for network, cpu in ((nn.Linear(9, 9), True), (nn.Linear(9, 9), False), (nn.Linear(2500, 2500), True)):\n"
        "    with cores.fitted(network, cpu): print(torch.get_num_threads())\n"
        "print(torch.get_num_threads())"
    )
    large = str(min(4, cores.usable_cores()))
    assert _in_a_command(code) == ["1", "4", large, "4"]
    assert _in_a_command(code, OMP_NUM_THREADS="3") == ["4"] * 4


def test_cores_of_a_container(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    everything = cores.usable_cores(quota)  # no such file
    assert 1 <= everything <= (os.cpu_count() or 1)
    for text, expected in (("max 100000", everything), ("50000 100000", 1), ("100000 100000", 1), ("junk", everything)):
        quota.write_text(text)
        assert cores.usable_cores(quota) == expected
    quota.write_text(f"{everything * 100000 + 150000} 100000")
    assert cores.usable_cores(quota) == everything


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    assert [cores.helpful(10**7, n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert cores.helpful(cores.SMALL, 1) == 1
