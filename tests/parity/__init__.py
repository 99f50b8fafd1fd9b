"""The comparison with numbers of the reference implementations (scripts/check_parity.py)."""
