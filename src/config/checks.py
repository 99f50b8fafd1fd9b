"""Checks that the dataclasses of a recipe share, and the error for an invalid value."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..errors import UserError

LONGEST_QUOTE = 100  # characters of a value in an error


class FieldError(UserError):
    """An invalid value of a dataclass field. `key` is relative to that dataclass; the text says what to write."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def need(condition: bool, key: str, message: str) -> None:
    """Raise `FieldError` unless the condition is true."""
    if not condition:
        raise FieldError(key, message)


def shown(value: Any) -> str:
    """Return a value for an error message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def legal_near(value: int, step: int) -> str:
    """Return the multiples of `step` on both sides of `value`, for error messages."""
    low = value // step * step
    return f"{low} or {low + step}" if low else f"{step}"


MOST_VALUES = 1000  # of a list in a recipe, such as the means of channels
MOST_BLOCKS = 1000  # of an encoder or decoder
LARGEST_SIZE = 1_000_000  # of any size of a network, so that whatever counts with it ends soon


def check_sizes(config: Any) -> None:
    """Check that no whole number of a configuration is larger than that of any network."""
    for item in fields(config):
        value = getattr(config, item.name)
        for number in value if isinstance(value, tuple) else (value,):
            need(
                not isinstance(number, int) or number <= LARGEST_SIZE,
                item.name,
                f"{number} is larger than any network has; write at most {LARGEST_SIZE}",
            )


def check_blocks(count: int, key: str) -> None:
    """Check a number of blocks, each of which takes time and memory to build."""
    need(count <= MOST_BLOCKS, key, f"{count} blocks are more than any network has; write at most {MOST_BLOCKS}")


def check_positive(config: Any, *keys: str) -> None:
    for key in keys:
        need(getattr(config, key) > 0, key, f"{getattr(config, key)} is not above 0")


def check_not_negative(config: Any, *keys: str) -> None:
    for key in keys:
        need(getattr(config, key) >= 0, key, f"{getattr(config, key)} is negative")


def check_rate(config: Any, key: str, closed: bool = False) -> None:
    value = getattr(config, key)
    need(0 <= value < 1 or (closed and value == 1), key, f"{value} is not a rate from 0 to 1")


def show_size(size: Any) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def check_multiples(key: str, sides: tuple[int, ...], unit: int, meaning: str) -> None:
    """Check that every side is a multiple of `unit`; `meaning` names the unit in the error."""
    for side in sides:
        need(
            side > 0 and side % unit == 0,
            key,
            f"{side} is not a multiple of {meaning}; write {legal_near(max(side, 1), unit)}",
        )


def plural(count: int, noun: str, plural_noun: str = "") -> str:
    """Return the count with its noun: 1 image, 2 images."""
    return f"{count} {noun if count == 1 else plural_noun or noun + 's'}"
