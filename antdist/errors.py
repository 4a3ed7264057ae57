"""Mistakes that a user can mend, told in one line, no secret among it: where, what, and what to do; and the end that is none."""

from __future__ import annotations

import re

# A password may hold "/" and "@", so everything up to the last "@" of the word goes; file:/// and sqlite:/// have none.
_USERINFO = re.compile(r"(://)(?!/)[^\s\"']*@")
_SECRET = re.compile(
    r"([?&][\w.-]*(?:password|passwd|pwd|token|secret|key|sig|signature|credential)[\w.-]*=)[^&\s\"']*", re.I
)


def redact(text: str) -> str:
    """The text (a URI, or a message that holds some) without user names, passwords and tokens in its URIs."""
    return _SECRET.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


class UserError(Exception):
    """A mistake in the user's input. The command line prints it without a traceback and exits with 2. Credentials in URIs
    are cut out of all that it says.

    Args:
        what: what is wrong, a sentence without its full stop.
        where: the file (with line), configuration key or argument it is about: whatever `str` tells.
        remedy: what to do about it, a sentence without its full stop.
    """

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        self.what, self.where = redact(what), None if where is None else redact(str(where))
        self.remedy = remedy and redact(remedy)
        place = f"{self.where}: " if self.where else ""
        advice = f". {self.remedy[0].upper()}{self.remedy[1:]}." if self.remedy else "."
        super().__init__(f"{place}{self.what}{advice}")

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip back from a Ray worker."""
        return (_rebuild, (self.what, self.where, self.remedy))


class Preempted(Exception):
    """The command was asked to stop, and did, with its state on disk: the same command goes on. The command line exits with
    `EXIT_CODE`, by which a scheduler may tell it from a failure (EX_TEMPFAIL of sysexits.h)."""

    EXIT_CODE = 75


def _rebuild(what: str, where: str | None, remedy: str | None) -> UserError:
    return UserError(what, where=where, remedy=remedy)
