"""Hand-written operations, each beside a plain twin.

An operation is written by hand where torch's own is slow or needs too much memory. Its twin, `<name>_plain`, is the same
function in a few lines of torch with torch's gradients: the tests hold the operation to it, and `use_plain_ops()` runs it
instead, to find out whether an operation is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_plain = False


@contextmanager
def use_plain_ops() -> Iterator[None]:
    """Run the plain twins instead of the hand-written operations inside the block, in all threads.

    Losses and gradients agree to rounding; dropout draws other random numbers. With activation checkpointing the backward
    pass runs the operations again, so it belongs inside the block, too.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def plain_ops() -> bool:
    """Return whether the plain twins are selected."""
    return _plain
