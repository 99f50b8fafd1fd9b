"""What the three entry points share: quiet framework, one-line errors, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run_command(command: Callable[[], None]) -> int:
    """Run a command; 0 when done, 2 with one line for what the user can mend, 130 when interrupted."""
    os.environ.setdefault("GLOG_v", "4")  # MindSpore's errors arrive as exceptions; GLOG_v=2 shows its warnings
    from .run import UserError

    try:
        command()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0
