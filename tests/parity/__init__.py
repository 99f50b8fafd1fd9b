"""Comparison with numbers from the reference implementations (scripts/check_parity.py)."""
