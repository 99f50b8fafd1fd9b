"""Read the file format of MindSpore's checkpoints within limits.

MindSpore's own reader trusts the file: an array whose shape is larger than its numbers reads beyond them. The format is
a protobuf message: a list of values, each a name and a number type, shape and numbers (mindspore's checkpoint.proto),
then `crc_num` and a checksum. A large array is several values of one name in a row.
"""

from __future__ import annotations

import itertools
import math
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config.reading import available_memory

CHECKSUM = b"crc_num"  # before the last 10 bytes
DIGITS = 10  # bytes of the checksum
MOST_VALUES = 100_000  # of a file; training states here have up to 3000
MOST_AXES = 32
LONGEST_TEXT = 32_000_000  # bytes, four for each character
#: number type in a file -> in NumPy
DTYPES = {f"{sign}Int{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)}
DTYPES |= {f"Float{bits}": f"float{bits}" for bits in (16, 32, 64)} | {"Bool": "bool"}


def read_file(path: Path) -> tuple[dict[str, np.ndarray | str], bool]:
    """Return arrays and texts by name, and whether the file has a checksum, which is then right.

    Raises:
        OSError: the file cannot be read.
        ValueError, IndexError: it is damaged, or another kind of file.
        MemoryError: it is larger than what is left.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if not size:
            raise ValueError("it is empty")
        if size > available_memory():
            raise MemoryError
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # closed with the last part of it
    end = len(whole) - DIGITS - len(CHECKSUM)
    has_checksum = end >= 0 and bytes(whole[end:-DIGITS]) == CHECKSUM
    message = whole[:end] if has_checksum else whole
    if has_checksum and zlib.crc32(message) != int.from_bytes(whole[-DIGITS:], "big"):
        raise ValueError("its checksum is wrong")
    return read_values(message), has_checksum


def read_values(message: memoryview) -> dict[str, np.ndarray | str]:
    """Arrays and texts by name. A name twice is an error unless its values follow each other."""
    found: dict[str, np.ndarray | str] = {}
    values = (read_value(part) for _, part in fields(message, MOST_VALUES))
    for name, parts in itertools.groupby(values, key=lambda value: value[0]):
        if name in found:
            raise ValueError("a name is in it twice")
        found[name] = joined([part for _, part in parts])
    return found


def read_value(message: memoryview | int) -> tuple[str, tuple[str, list[int], memoryview]]:
    """The name of a value, and its number type, shape and bytes."""
    parts = dict(fields(as_bytes(message), 2))
    shape: list[int] = []
    kind, content = "", memoryview(b"")
    for number, part in fields(as_bytes(parts[2]), MOST_AXES + 2):
        if number == 1:
            shape += [part] if isinstance(part, int) else varints(part)
        elif number == 2:
            kind = text_of(part)
        else:
            content = as_bytes(part)
    return text_of(parts[1]), (kind, shape, content)


def joined(parts: list[tuple[str, list[int], memoryview]]) -> np.ndarray | str:
    """The array or text of the values of one name."""
    kind, shape, _ = parts[0]
    size = sum(len(content) for _, _, content in parts)
    if kind == "str":
        if size > LONGEST_TEXT:
            raise ValueError("a text in it is too long")
        return b"".join(content for _, _, content in parts).decode("utf-32-le").rstrip("\0")
    dtype = np.dtype(DTYPES[kind])
    if any(other[:2] != (kind, shape) for other in parts) or len(shape) > MOST_AXES:
        raise ValueError("the parts of an array differ")
    dims = () if shape == [0] and size else tuple(shape)  # MindSpore writes [0] for a single number
    if not all(0 <= side < 2**60 for side in dims) or math.prod(dims) * dtype.itemsize != size:
        raise ValueError("the numbers of an array do not fit its shape")
    array = np.empty(dims, dtype)
    flat, place = array.reshape(-1).view(np.uint8), 0
    for _, _, content in parts:
        flat[place : place + len(content)] = np.frombuffer(content, np.uint8)
        place += len(content)
    return array


# --- protobuf ---------------------------------------------------------------------------------------------------


def fields(message: memoryview, most: int) -> Iterator[tuple[int, memoryview | int]]:
    """Numbers and values of the fields of a message: whole numbers, or bytes."""
    place = 0
    for _ in range(most):
        if place == len(message):
            return
        key, place = varint(message, place)
        if key & 7 == 0:
            value, place = varint(message, place)
            yield key >> 3, value
        elif key & 7 == 2:
            length, place = varint(message, place)
            if length > len(message) - place:
                raise ValueError("it is cut short")
            yield key >> 3, message[place : place + length]
            place += length
        else:
            raise ValueError("it has a field that MindSpore does not write")
    if place < len(message):
        raise ValueError("it has too many fields")


def varints(message: memoryview | int) -> list[int]:
    """Whole numbers in a row."""
    numbers: list[int] = []
    data, place = as_bytes(message), 0
    while place < len(data) and len(numbers) <= MOST_AXES:
        number, place = varint(data, place)
        numbers.append(number)
    return numbers


def varint(message: memoryview, place: int) -> tuple[int, int]:
    """The whole number at a place, and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("a number in it is too long")


def as_bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it has a number where MindSpore writes bytes")
    return value


def text_of(value: memoryview | int) -> str:
    data = as_bytes(value)
    if len(data) > 1000:
        raise ValueError("a name in it is too long")
    return bytes(data).decode()
