"""The base class of all errors that the user can fix, and text that stays on one line."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can fix. Its text is one line: where it is, what is wrong, what to write instead.

    Commands print it after `error: ` and end with exit code 2. Every error class of this project derives from it.
    """

    longest = 2000  # characters; what a text quotes can be as long as a file

    def __init__(self, text: object = ""):
        whole = str(text)
        super().__init__(whole if len(whole) <= self.longest else f"{whole[: self.longest]}...")


def one_line(text: str) -> str:
    """Escape line ends and control characters, which file names may contain."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
