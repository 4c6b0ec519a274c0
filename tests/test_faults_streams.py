"""What is printed ends no command: letters that an encoding lacks, and readers that have gone."""

from __future__ import annotations

import os
import subprocess
import sys

WORDS = "import sys; from panoptic_ibs.streams import start_command; start_command(); "


def start(code: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WORDS + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def test_a_reader_that_has_gone_ends_nothing_and_is_told_once() -> None:
    process = start("[print('row', i) for i in range(100_000)]; print('done', file=sys.stderr)")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"row 0\n"
    process.stdout.close()
    said = process.stderr.read().decode().splitlines()
    assert process.wait() == 0
    assert said == ["warning: nobody reads the output any more; the command goes on without it.", "done"]


def test_a_reader_of_the_errors_that_has_gone_ends_nothing() -> None:
    process = start("[print('row', i, file=sys.stderr) for i in range(100_000)]; print('done')")
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    assert process.stdout.read() == b"done\n"
    assert process.wait() == 0


def test_what_a_pipe_gets_is_whole_and_in_order() -> None:
    process = start("[print('row', i) for i in range(20_000)]")
    out, err = process.communicate()
    assert out.decode().splitlines() == [f"row {i}" for i in range(20_000)]
    assert (process.returncode, err) == (0, b"")


def test_letters_that_an_encoding_lacks_are_replaced() -> None:
    process = start("print('Straße 日本 │'); print('日', file=sys.stderr)", PYTHONIOENCODING="iso-8859-1")
    out, err = process.communicate()
    assert process.returncode == 0
    assert out.decode("iso-8859-1") == "Straße ?? ?\n"
    assert err.decode("iso-8859-1") == "?\n"
