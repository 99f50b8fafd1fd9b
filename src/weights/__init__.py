"""Names, loading and conversion of weights."""


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; one line for the user."""
