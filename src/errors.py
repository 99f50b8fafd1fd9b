"""The base class of all errors that the user can fix."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can fix. Its text is one line: where it is, what is wrong, what to write instead.

    Commands print it after `error: ` and end with exit code 2. Every error class of this project derives from it.
    """
