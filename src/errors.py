"""The one class of errors that the user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the text is one line that says where, what is wrong and what to write instead.

    Commands print it after `error: ` and end with exit code 2. Every error class of this project derives from it.
    """
