"""Photographs of any kind: one policy for modes, EXIF orientation, size, damage and what is no file."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panoptic_ibs.data.readers.images import check_rgb, read_ids, read_rgb
from panoptic_ibs.errors import DataError
from panoptic_ibs.functional.pictures import MAX_PIXELS, max_pixels, opened, upright_rgb

GREY = np.arange(0, 240, 10, dtype=np.uint16).reshape(4, 6)


def read_picture(path: Path) -> np.ndarray:
    with opened(path) as image:
        return np.asarray(upright_rgb(image, path))


def save(path: Path, orientation: int = 1) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("suffix", ["png", "tif", "I.tif"])
def test_grey_of_16_bits_keeps_the_high_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture = Image.fromarray(GREY * 256 + 99)
    (picture.convert("I") if suffix == "I.tif" else picture).save(path)
    expected = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_picture(path), expected)
    np.testing.assert_array_equal(read_rgb(path, (4, 6)), expected)


def test_floats_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 6), np.float32)).save(tmp_path / "f.tif")
    for read in (read_picture, lambda p: read_rgb(p, (4, 6))):
        with pytest.raises(DataError, match=r"f\.tif: images of floating-point"):
            read(tmp_path / "f.tif")


UPRIGHT = {  # what viewers show, by the definition of the eight values
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("turn", UPRIGHT)
def test_orientation_is_applied_without_labels_and_not_with_them(tmp_path: Path, turn: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    pixels = save(path, turn)
    np.testing.assert_array_equal(read_picture(path), UPRIGHT[turn](pixels))
    np.testing.assert_array_equal(read_rgb(path, (4, 6)), pixels)
    assert check_rgb(path, (4, 6), "x.json: image 3") == turn


@pytest.mark.parametrize("turn", [0, 9, 77])
def test_orientations_that_do_not_exist_turn_nothing(tmp_path: Path, turn: int) -> None:
    pixels = save(tmp_path / "a.png", turn)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), pixels)


def test_a_size_that_the_orientation_explains_is_named_so(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 6)
    with pytest.raises(DataError, match=r"is 4x6 .* says 6x4\. Its EXIF orientation is 6"):
        read_rgb(tmp_path / "a.png", (6, 4))
    with pytest.raises(DataError, match="Restore the original file"):
        read_rgb(tmp_path / "a.png", (4, 7))
    save(tmp_path / "b.png", 3)
    with pytest.raises(DataError, match="Restore the original file"):
        read_rgb(tmp_path / "b.png", (6, 4))


def test_pillows_limit_holds_no_longer_but_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # 24 pixels are more than twice that
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), pixels)
    assert Image.MAX_IMAGE_PIXELS == 5
    monkeypatch.setenv(MAX_PIXELS, "23")
    with pytest.raises(DataError, match=rf"a\.png: the image is 4x6 .*limit is 23\..*{MAX_PIXELS}"):
        read_picture(tmp_path / "a.png")
    monkeypatch.setenv(MAX_PIXELS, "24")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), pixels)
    monkeypatch.setenv(MAX_PIXELS, "1e9")
    with pytest.raises(DataError, match="no whole number of pixels"):
        read_picture(tmp_path / "a.png")
    monkeypatch.delenv(MAX_PIXELS)
    assert max_pixels() > 2e8


def test_threads_leave_pillows_limit_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    former, failed = Image.MAX_IMAGE_PIXELS, []

    def work() -> None:
        for _ in range(50):
            try:
                read_picture(tmp_path / "a.png")
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed
    assert former == Image.MAX_IMAGE_PIXELS


@pytest.mark.timeout(20)
def test_what_is_no_picture_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    for name, words in {
        "pipe.png": "must be a regular file, this is a pipe", "folder.png": "this is a folder",
        "none.png": "is missing", "text.png": "no image format", "empty.png": "no image format",
        "half.png": "cannot be decoded", "x" * 300: "cannot be read", "a\0b": r"a\\x00b: the image cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words) as error:
            read_picture(tmp_path / name)
        assert name.replace("\0", r"\x00") in str(error.value)
    with pytest.raises(DataError, match="a pipe, socket or device"):
        read_picture(Path("/dev/zero"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
def test_damaged_bytes_never_give_another_exception(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif", "gif", "bmp", "webp"):
        path = tmp_path / f"a.{suffix}"
        save(path)
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            path.write_bytes(bytes(data[: rng.integers(1, len(data) + 1)]))
            with contextlib.suppress(DataError):
                assert read_picture(path).dtype == np.uint8


# ------------------------------------------------------------------------------------------------ id PNGs


def id_png(path: Path, kind: int = 2, depth: int = 8) -> bytes:
    """A PNG of 4 x 6 pixels whose ids are 1 to 24, written by hand: Pillow writes no RGB of 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels, step = {0: 1, 2: 3, 6: 4}[kind], depth // 8
    pixels = np.zeros((4, 6, channels, step), np.uint8)
    pixels[:, :, 0, -1] = np.arange(1, 25).reshape(4, 6)  # the low byte
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 6, 4, depth, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(data)
    return data


def test_id_pngs_mean_their_ids_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.png"
    expected = np.arange(1, 25).reshape(4, 6)
    for kind in (2, 6):  # RGB, RGB with alpha
        id_png(path, kind)
        np.testing.assert_array_equal(read_ids(path, (4, 6)), expected)
        np.testing.assert_array_equal(read_ids(path, (4, 6), (1, 2, 2, 3)), expected[1:3, 2:5])
        id_png(path, kind, 16)
        with pytest.raises(DataError, match=r"ids\.png: the id PNG is RGB.*, 16 bits; ids are RGB of 8 bits"):
            read_ids(path, (4, 6))
    for depth in (8, 16):
        id_png(path, 0, depth)
        with pytest.raises(DataError, match=rf"not RGB: grey, {depth} bits.*Write the ids as RGB"):
            read_ids(path, (4, 6))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"bKGD", bytes(6)), (b"tRNS", bytes([0, 1, 0, 0, 0, 0])), (b"gAMA", struct.pack(">I", 45455)),
        (b"sBIT", bytes([3, 3, 3])), (b"acTL", struct.pack(">II", 9, 0)), (b"tEXt", b"Comment\0x"), (b"acTL", bytes(8)),
    ],
)  # fmt: skip
def test_ids_do_not_depend_on_what_else_a_png_says(tmp_path: Path, name: bytes, data: bytes) -> None:
    """A background, a transparent colour, gamma, significant bits, animation, a remark."""
    path = tmp_path / "ids.png"
    plain = id_png(path)
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(plain[:33] + chunk + plain[33:])
    np.testing.assert_array_equal(read_ids(path, (4, 6)), np.arange(1, 25).reshape(4, 6))


@pytest.mark.timeout(20)
def test_damaged_id_pngs_are_noticed_and_pipes_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.png"
    data = id_png(path)
    for damage in range(8, len(data)):  # any bit that flips behind the signature
        path.write_bytes(data[:damage] + bytes([data[damage] ^ 4]) + data[damage + 1 :])
        with pytest.raises(DataError, match=r"ids\.png: the id PNG"):
            read_ids(path, (4, 6))
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="truncated"):
        read_ids(path, (4, 6))
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in {"pipe.png": "regular file", "none.png": "is missing", ".": "a folder"}.items():
        with pytest.raises(DataError, match=words):
            read_ids(tmp_path / name, (4, 6), key="x.json: image 3")


def test_no_other_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS files to Ghostscript."""
    started: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: started.append(a))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png"):
        read_picture(tmp_path / "a.png")
    assert not started
