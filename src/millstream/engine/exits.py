"""How processes end: what their exit codes mean, and that none of them outlives its parent.

  0  done      as it was told to, and everything that was asked has been answered
  1  failed    a fault of this program; the log has a traceback
  2  usage     the command line or the configuration is wrong: starting again will not help
  3  model     the model cannot be found, downloaded or loaded
  4  engine    the engine can no longer compute, or its process kept dying: `serve` has given up
  5  api       the API process kept dying: `serve` has given up
  6  address   a socket or port cannot be had
  7  cut       told to stop, and requests were cut off: the time to drain was over, or a second signal came
  8  orphaned  the parent process is gone
128+n          ended by signal n, as a shell says it
"""

from __future__ import annotations

import ctypes
import enum
import os
import signal
import sys


class Exit(enum.IntEnum):
    """See above."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MODEL = 3
    ENGINE = 4
    API = 5
    ADDRESS = 6
    CUT = 7
    ORPHANED = 8


# Of these a new start gives more of the same.
HOPELESS = frozenset({Exit.USAGE, Exit.MODEL, Exit.ADDRESS})


def told(code: int) -> str:
    """An exit code in words, as `subprocess` and `os.waitstatus_to_exitcode` give it: below 0 for a signal."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    try:
        return f"exit code {code} ({Exit(code).name.lower()})"
    except ValueError:
        return f"exit code {code}"


def as_shell(code: int) -> int:
    """The same as an exit status of our own: 128 + n for signal n."""
    return 128 - code if code < 0 else code


def die_with_parent(parent: int) -> bool:
    """Has the system kill this process when the thread that started it ends; False when that is `parent` no more.

    Where the system cannot do that, `orphaned` must be asked now and then.
    """
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    return not orphaned(parent)


def orphaned(parent: int) -> bool:
    """Whether the process `parent` is no longer this one's parent."""
    return os.getppid() != parent
