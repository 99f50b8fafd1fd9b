"""Names, loading and conversion of weights."""
