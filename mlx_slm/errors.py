"""The errors that a user sees as one sentence; every other exception is a bug and shows its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlmError(Exception):
    """Bad input or a state that the user can mend: the text names the file, key or value and says what to do."""


class Busy(SlmError):
    """Another process holds what is needed."""


class OtherSettings(SlmError):
    """What is there under a name was made with other settings: `what` says which."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}: {remedy}")
        self.what = what


class Interrupted(SlmError):
    """Stopped by SIGINT or SIGTERM after saving; the same command again goes on from there."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
