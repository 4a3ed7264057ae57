"""Mistakes that a user can mend, told in one line: where, what, and what to do."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input. The command line prints it without a traceback and exits with 2.

    Args:
        what: what is wrong, a sentence without its full stop.
        where: the file (with line), configuration key or argument it is about.
        remedy: what to do about it, a sentence without its full stop.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, None if where is None else str(where), remedy
        place = f"{self.where}: " if self.where else ""
        advice = f". {remedy[0].upper()}{remedy[1:]}." if remedy else "."
        super().__init__(f"{place}{what}{advice}")

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip back from a Ray worker."""
        return (_rebuild, (self.what, self.where, self.remedy))


def _rebuild(what: str, where: str | None, remedy: str | None) -> UserError:
    return UserError(what, where=where, remedy=remedy)
