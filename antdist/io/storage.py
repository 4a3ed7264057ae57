"""Remote storage through fsspec, by URI, with one error for all that it may raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.io.retry import retry

logger = get_logger(__name__)

T = TypeVar("T")


class Unreachable(UserError):
    """The storage does not answer, or refuses; a retry may succeed."""

    def __init__(self, uri: str, why: BaseException | str) -> None:
        reason = why if isinstance(why, str) else first_line(why)
        super().__init__(f"does not answer, or refuses ({reason})", where=uri)


def is_uri(place: str | Path) -> bool:
    """Return whether a location is a URI rather than a path."""
    return "://" in str(place)


def open_storage(uri: str, where: str) -> tuple[Any, str]:
    """Open the fsspec file system of a URI, and return it with the path in it.

    Raises:
        UserError: at `where`; fsspec does not know the protocol, or its package is missing.
    """
    import fsspec

    def error_of(what: str, remedy: str) -> UserError:
        return UserError(what, where=where, remedy=remedy)

    protocol, known, _ = uri.partition("://")
    if "::" in uri:  # fsspec's syntax for one storage in front of another
        raise error_of("it names several storages", "give one, like s3://BUCKET/FOLDER")
    try:
        files, root = fsspec.url_to_fs(uri)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or protocol
        raise error_of(
            f"the package for {protocol}:// ({package}) is missing", f"`pip install {package}` on all nodes"
        ) from error
    except Exception as error:  # each kind of storage has its own errors
        raise error_of(
            f"it cannot be used ({first_line(error)})", f"correct the {'address' if known else 'path'}"
        ) from error
    return files, str(root)


@contextlib.contextmanager
def translate_storage_errors(uri: str) -> Iterator[None]:
    """Raise every error of the storage as `Unreachable`, except that a file does not exist."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # each package behind fsspec has its own errors, and few are OSErrors
        raise Unreachable(uri, error) from error


def retry_unreachable(work: Callable[[], T], waits: Sequence[float]) -> T:
    """Call `work` again, after each of the `waits` (seconds), while the storage is unreachable.

    Raises Unreachable.
    """

    def report(error: BaseException, _: float) -> None:
        logger.warning(f"{error} Trying again")

    return retry(work, waits, lambda error: isinstance(error, Unreachable), report)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
