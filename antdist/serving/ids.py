"""Errors for unknown ids of users and items, with the nearest known ones."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from antdist.errors import UserError

MAX_COMPARED = 20_000  # ids compared with an unknown one: difflib takes about 10 microseconds for each


def unknown_id(owner: str, kind: str, wanted: str, known: Sequence[str], where: str) -> UserError:
    """Make the error for an id that `owner`, a domain or a catalogue, does not have."""
    alike = [i for i in known if i[:1] == wanted[:1] and abs(len(i) - len(wanted)) <= 2]
    near = difflib.get_close_matches(wanted, (alike or known)[:MAX_COMPARED])
    remedy = f"did you mean {' or '.join(near)}?" if near else f"ids look like {', '.join(known[:3])}"
    return UserError(f"{owner} has no {kind} {wanted!r}", where=where, remedy=remedy)
