"""Reading files of tensors from anywhere without executing anything in them.

A pickle is a program. Files of ``torch.save`` go through ``torch.load(weights_only=True)``, other pickles (detectron2's
``.pkl``) through an unpickler that knows NumPy arrays and plain containers and nothing else. Files of ``torch.save``
are zips with a check sum for every tensor, which torch does not look at: it is compared here.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import CheckpointError
from .files import check_regular
from .schemas import read_json

ENTRY = "panoptic_ibs"  # in our checkpoints the description of the model, beside Lightning's own entries
ZIP = b"PK\x03\x04"
FETCH = "Copy or fetch the file again, or give another one."


def read_tensors(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read ``.safetensors``, a file of ``torch.save``, a pickle of arrays, or a folder of a ``transformers`` model.

    Arrays become tensors; other plain values stay.

    Raises:
        CheckpointError: no such file, a pipe or device, truncated, with bytes that are not those written, not a
            dictionary, or one that holds Python objects: those could run code when they are read, so they are refused.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path, map_location)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: there is no such file.")
    check_regular(path, "the file of weights", "Check its path.", CheckpointError)
    try:
        state = _read_file(path, map_location)
    except CheckpointError:
        raise
    except PermissionError:
        raise CheckpointError(f"{path}: may not be read (no permission).") from None
    except pickle.UnpicklingError as error:
        detail = f" ({error})" if isinstance(error, RefusedError) else ""
        raise CheckpointError(
            f"{path}: is no plain file of tensors: it is damaged, or holds Python objects, which could run code when "
            f"they are read and are therefore refused{detail}. Save its state dict alone."
        ) from error
    except Exception as error:  # zip, safetensors and pickle each have their own
        raise CheckpointError(
            f"{path}: cannot be read as tensors ({type(error).__name__}); it is truncated or of another format "
            f"({path.stat().st_size} bytes). {FETCH}"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors.")
    return dict(state)


def _read_file(path: Path, map_location: str | torch.device) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device=str(map_location))
    with path.open("rb") as file:
        zipped = file.read(4) == ZIP
    if not zipped and path.suffix == ".pkl":
        return _as_tensors(ArrayUnpickler(io.BytesIO(path.read_bytes())).load())
    if zipped:
        check_sums(path)
    with torch.serialization.safe_globals(_numpy_globals()):  # schedulers of other programs keep NumPy numbers
        return torch.load(path, map_location=map_location, weights_only=True)


def check_sums(path: Path) -> None:
    """Compare the check sums in a zip with its bytes; once, however often a process reads the file.

    Raises:
        CheckpointError: one differs.
        zipfile.BadZipFile: the zip's own structure is damaged.
    """
    now = path.stat()
    damaged = _damaged_part(os.path.realpath(path), now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    if damaged:
        raise CheckpointError(f"{path}: is damaged: the bytes of {damaged} are not those that were written. {FETCH}")


@lru_cache(maxsize=64)
def _damaged_part(path: str, *_: int) -> str | None:
    """The first entry whose bytes do not fit its check sum; further arguments tell versions of a file apart."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.CRC and entry.file_size:
                continue  # written without check sums: torch.serialization.set_crc32_options(False)
            try:
                with archive.open(entry) as part:
                    while part.read(1 << 20):
                        pass
            except (zipfile.BadZipFile, EOFError):
                return entry.filename
    return None


def check_numbers(weights: Mapping[str, torch.Tensor], source: object) -> None:
    """Make sure that a network can compute with weights.

    Raises:
        CheckpointError: NaN or infinity in a tensor, or a tensor without plain numbers; the message names ``source``.
    """
    odd = [k for k, v in weights.items() if v.layout != torch.strided or v.is_quantized or v.is_meta]
    if odd:
        raise CheckpointError(f"{source}: {len(odd)} of its tensors hold no plain numbers, first {odd[0]!r}.")
    broken = [k for k, v in weights.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} of its {len(weights)} tensors hold NaN or infinity, first {broken[0]!r}: it is "
            "damaged, or its training had diverged. Give another file, or an earlier checkpoint."
        )


def _read_folder(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """All weight files of a ``transformers`` folder, joined."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return read_tensors(path / name, map_location)
        index = path / f"{name}.index.json"
        if index.is_file():
            return {k: v for f in _parts(index) for k, v in read_tensors(path / f, map_location).items()}
    raise CheckpointError(f"{path}: holds neither model.safetensors nor pytorch_model.bin (nor an index of parts).")


def _parts(index: Path) -> list[str]:
    """Names of the files that an index names; they lie beside it.

    Raises:
        CheckpointError: no such index.
    """
    content = read_json(index, "the index of the weights", FETCH, CheckpointError)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(f, str) and Path(f).name for f in names.values()):
        raise CheckpointError(f"{index}: 'weight_map' does not give the file of each tensor by name. {FETCH}")
    return sorted({Path(f).name for f in names.values()})


def _as_tensors(value: Any) -> Any:
    """Arrays in nested containers as tensors; arrays of a type that torch lacks stay arrays."""
    if isinstance(value, Mapping):
        return {k: _as_tensors(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))  # 0-d stays 0-d
        except TypeError:
            return value
    return value


class RefusedError(pickle.UnpicklingError):
    """A pickle holds something else than arrays of numbers and plain containers."""


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """What NumPy's pickles start an array from; its contents follow through ``ndarray.__setstate__``."""
    if kind is not np.ndarray:
        raise RefusedError("an array of another class than numpy.ndarray")
    return np.ndarray((0,), dtype=np.int8)


def _plain_dtype(name: Any, *_: Any) -> np.dtype:
    """Types of numbers only: an array of objects would hold anything."""
    made = np.dtype(str(name))
    if made.kind not in "biuf":
        raise RefusedError(f"an array of type {made}")
    return made


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """How protocol 5 stores arrays."""
    return np.frombuffer(bytearray(buffer), dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 2 and protocol 2 store bytes."""
    if encoding.replace("-", "") not in ("latin1", "iso88591"):
        raise RefusedError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _admitted() -> dict[tuple[str, str], Callable[..., Any] | type]:
    """The only names that a pickle may look up, by module and name."""
    names: dict[tuple[str, str], Callable[..., Any] | type] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): _latin1,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        names[f"{core}.multiarray", "_reconstruct"] = _empty_array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return names


def _numpy_globals() -> list[Any]:
    """The same for ``torch.load(weights_only=True)``: replacements by full name, and the types of numbers."""
    named = [(made, f"{module}.{name}") for (module, name), made in _admitted().items() if module != "collections"]
    kinds = [type(np.dtype(kind)) for kind in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")]
    return [*named, *kinds]


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays of numbers and plain containers; refuses everything else.

    Raises:
        RefusedError: the file asks for any other name.
    """

    ADMITTED = _admitted()

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")  # files of Python 2 are still around

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of the few admitted names."""
        if (module, name) not in self.ADMITTED:
            raise RefusedError(f"it asks for {module}.{name}")
        return self.ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to storage outside the file."""
        raise RefusedError("it refers to storage outside the file")
