"""User-facing errors: where, what, remedy, without credentials. `Preempted` is an orderly stop, not a failure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# A password may contain "/" and "@", so everything up to the last "@" of the word is cut; file:/// and sqlite:/// have none.
_USERINFO = re.compile(r"(://)(?!/)[^\s\"']*@")
_SECRET = re.compile(
    r"([?&][\w.-]*(?:password|passwd|pwd|token|secret|key|sig|signature|credential)[\w.-]*=)[^&\s\"']*", re.I
)


def redact(text: str) -> str:
    """Cut user names, passwords and tokens out of the URIs in a text."""
    return _SECRET.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


class UserError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with 2.

    Credentials in URIs are redacted in all parts.

    Args:
        what: what is wrong, a sentence without its full stop.
        where: the file (with its line), configuration key or argument at fault; anything with a `str`.
        remedy: what to do about it, a sentence without its full stop.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        self.what, self.where = redact(what), None if where is None else redact(str(where))
        self.remedy = remedy and redact(remedy)
        place = f"{self.where}: " if self.where else ""
        advice = f". {self.remedy[0].upper()}{self.remedy[1:]}." if self.remedy else "."
        super().__init__(f"{place}{self.what}{advice}")

    def to_dict(self) -> dict[str, str | None]:
        """Return `what`, `where` and `remedy`, for JSON."""
        return {"what": self.what, "where": self.where, "remedy": self.remedy}

    @staticmethod
    def from_dict(parts: Mapping[str, Any]) -> UserError:
        """Rebuild an error from `to_dict`."""
        return UserError(parts["what"], where=parts["where"], remedy=parts["remedy"])

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle for the way back from a Ray worker; a subclass arrives as a UserError."""
        return (UserError.from_dict, (self.to_dict(),))


class Preempted(Exception):
    """The command was asked to stop and did, with its state on disk; the same command continues.

    The command line exits with `EXIT_CODE` (EX_TEMPFAIL of sysexits.h), by which a scheduler can tell it from a failure.
    """

    EXIT_CODE = 75
