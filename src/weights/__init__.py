"""Weights: names, loading and conversion."""

from __future__ import annotations

from ..errors import UserError


class WeightsError(UserError):
    """Weights that cannot be read or do not fit; one line for the user."""
