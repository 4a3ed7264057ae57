"""What a verb returns: lines for people, a document for programs, a data frame for notebooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 block`, `2,561 blocks`, and with `plural` `2 entries`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


class Report(ABC):
    """The result of a verb. Its `repr` is what the command line prints.

    Attributes:
        table_key: the key of `to_json` that holds the report's table, a list of rows; None where it has none.
    """

    table_key: ClassVar[str | None] = None

    @abstractmethod
    def lines(self) -> list[str]:
        """Return the report for people, a line each."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the report for programs: plain JSON, without credentials."""

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of the report's table; without one a single row, of the figures at the top level of `to_json`."""
        content = self.to_json()
        if self.table_key is not None:
            return list(content[self.table_key])
        return [{key: value for key, value in content.items() if isinstance(value, str | int | float | None)}]

    def to_frame(self) -> pd.DataFrame:
        """Return the report's table as a data frame, a row an entry of `records`."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def __repr__(self) -> str:
        return "\n".join(self.lines())
