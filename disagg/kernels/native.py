"""The compiled helper (`native.c`): many blocks copied, hashed and looked at in one call, without Python's lock.

It is built with the package where a C compiler is, and missing elsewhere: `is_loaded` says which. Each caller has a
way without it. Addresses are the caller's responsibility: nothing here can check them. `DISAGG_NATIVE=off` in the
environment leaves it out, and with it the attention of `native_attention`, which is in the same library.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from disagg.kernels.finite import LARGEST_FINITE, is_finite

log = logging.getLogger(__name__)

Addresses = npt.NDArray[np.uint64]

VARIABLE: Final = "DISAGG_NATIVE"

VERSION: Final = 5
"""Of the functions here, in the modules `native_*` and in `disagg.engine.sampling.native`; a library built from other
sources, in a tree that went on since, is not used."""

MIN_NBYTES: Final = 241
"""XXH3 hashes up to 240 bytes by other formulas; no KV block is so small outside tests."""


def _find() -> ctypes.CDLL | None:
    value = os.environ.get(VARIABLE) or None
    if value not in (None, "on", "off"):
        raise ValueError(f"{VARIABLE}={value!r}: expected on or off, or unset to use the helper where it is built")
    if value == "off":
        return None
    for suffix in reversed(EXTENSION_SUFFIXES):  # `.so`, as it is built, before names that bind it to one Python
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            return _load(path)
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
        version = ctypes.c_int.in_dll(library, "disagg_native_version").value
    except (OSError, ValueError) as exc:
        log.warning("%s cannot be used, copies and digests are slower: %s", path, exc)
        return None
    if version != VERSION or sys.byteorder != "little":
        log.warning("%s is of version %d, not %d: build the package anew", path, version, VERSION)
        return None
    size, word, array = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
    library.disagg_copy.argtypes = (size, array, array, array)
    library.disagg_land.argtypes = (size, array, array, size, word, word, array, array)
    library.disagg_copy.restype = library.disagg_land.restype = None
    return library


_library = _find()


def library() -> ctypes.CDLL | None:
    return _library


def quick_library() -> ctypes.PyDLL | None:
    """The same functions, called with Python's lock held: for calls of a few microseconds.

    A thread that gives the lock up for less may wait for a turn of the event loop until it has it back.
    """
    return None if _library is None else ctypes.PyDLL(_library._name)


def is_loaded() -> bool:
    return _library is not None


def can_land(nbytes: int) -> bool:
    """Whether `land` takes units of this size."""
    return _library is not None and nbytes >= MIN_NBYTES and nbytes % 8 == 0


def copy(to: Addresses, source: Addresses, nbytes: Addresses) -> None:
    """Copy `nbytes[i]` bytes from `source[i]` to `to[i]`, past the caches: for bytes this core will not touch soon.

    uint64 `[n]` each. Reads a third less memory than memcpy, which fetches each line before it overwrites it.
    """
    assert _library is not None
    assert len(to) == len(source) == len(nbytes)
    _library.disagg_copy(len(to), to.ctypes.data, source.ctypes.data, nbytes.ctypes.data)


def land(
    to: Addresses, source: Addresses | None, nbytes: int, dtype: str
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Copy n units of `nbytes` bytes, hash each where it now lies, and look for Inf and NaN of `dtype`, in one pass.

    Without `source` only hashes and looks. Returns (xxh3-64 digests, finite), `[n]` each. Needs `can_land(nbytes)`.
    """
    assert _library is not None
    assert can_land(nbytes)
    digests, finite = np.empty(len(to), dtype=np.uint64), np.empty(len(to), dtype=np.bool_)
    from_address = None if source is None else source.ctypes.data
    ends = len(to), to.ctypes.data, from_address
    masks = (0, 0) if dtype == "int8" else _masks(dtype)  # its NaN is no largest exponent: nothing is found in C
    _library.disagg_land(*ends, nbytes, *masks, digests.ctypes.data, finite.ctypes.data)
    if dtype == "int8":
        units = ((ctypes.c_uint8 * nbytes).from_address(address) for address in to.tolist())
        finite[:] = [is_finite(np.ctypeslib.as_array(unit), dtype) for unit in units]
    return digests, finite


def _masks(dtype: str) -> tuple[int, int]:
    """(mask, add) of native.c for eight bytes of numbers: all but their signs; what makes the sign of a larger one."""
    signed, largest = LARGEST_FINITE[dtype]
    width = np.dtype(signed).itemsize
    top = 1 << (8 * width - 1)
    ones = sum(1 << (8 * at) for at in range(0, 8, width))
    return (top - 1) * ones, (top - 1 - largest) * ones
