"""Storage that fsspec reaches, by URI: opened, and all that it may answer told in one way."""

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
    """The storage does not answer, or refuses; trying again may help."""

    def __init__(self, uri: str, why: BaseException | str) -> None:
        told = why if isinstance(why, str) else first_line(why)
        super().__init__(f"does not answer, or refuses ({told})", where=uri)


def is_uri(place: str | Path) -> bool:
    return "://" in str(place)


def open_storage(uri: str, where: str) -> tuple[Any, str]:
    """fsspec's storage of a URI, and the path in it.

    Raises:
        UserError: at `where`: fsspec knows no such storage, or its package is missing.
    """
    import fsspec

    def refused(what: str, remedy: str) -> UserError:
        return UserError(what, where=where, remedy=remedy)

    protocol, known, _ = uri.partition("://")
    if "::" in uri:  # fsspec's own way to put one storage before another
        raise refused("it names several storages", "give one, like s3://BUCKET/FOLDER")
    try:
        files, root = fsspec.url_to_fs(uri)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or protocol
        raise refused(
            f"the package for {protocol}:// ({package}) is missing", f"`pip install {package}` on all nodes"
        ) from error
    except Exception as error:  # each kind of storage has errors of its own
        raise refused(
            f"it cannot be used ({first_line(error)})", f"correct the {'address' if known else 'path'}"
        ) from error
    return files, str(root)


@contextlib.contextmanager
def asking(uri: str) -> Iterator[None]:
    """All that the storage may answer as one error, `Unreachable`, but for "no such file"."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # of the packages behind fsspec each has errors of its own, and few are OSErrors
        raise Unreachable(uri, error) from error


def retry_unreachable(work: Callable[[], T], waits: Sequence[float]) -> T:
    """Call `work` again, after each of the `waits` (seconds), while the storage is unreachable. Raises Unreachable."""

    def report(error: BaseException, _: float) -> None:
        logger.warning(f"{error} Trying again")

    return retry(work, waits, lambda error: isinstance(error, Unreachable), report)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
