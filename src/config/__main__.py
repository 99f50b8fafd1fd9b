"""python -m src.config FILE [key=value ...]: print the resolved recipe."""

from __future__ import annotations

if __name__ == "__main__":
    from .files import main

    raise SystemExit(main())
