"""`antdist promote`: an alias moved by hand, to a version whose validation beats the holder's."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from antdist.errors import UserError
from antdist.report import Report
from antdist.tracking.registry import alias_holder, find_version, judge
from antdist.tracking.store import connect, told_clearly

FORCED = "forced."  # + alias: the tag of a version that an alias was forced on, with what spoke against it
MAY_BE_CHAMPION = (None, "ground truth", "positive")  # transfer: of a pre-training, of `scratch`, shown to help


@dataclass(frozen=True, repr=False)
class Promotion(Report):
    """What became of an alias. `before` and `after` are versions of `name`; `forced` says what spoke against it."""

    name: str
    alias: str
    before: int | None
    after: int
    why: str
    forced: str | None = None

    def lines(self) -> list[str]:
        if self.before == self.after:
            return [f"models:/{self.name}/{self.after} is {self.why}"]
        held = "nobody" if self.before is None else f"version {self.before}"
        return [f"{self.alias} of {self.name}: from {held} to version {self.after} ({self.why})"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promote(model: str, alias: str, uri: str, *, force: bool = False) -> Promotion:
    """Move `alias` to the version that `model` means, if its validation metric beats the holder's for the same task, or if
    nothing holds it. `champion` asks besides that the transfer is positive, or that there is none to judge.

    With `force` it moves in any case; what spoke against it is a tag of the version.

    Raises:
        UserError: no such version, no name for an alias, or, without `force`, a version that does not beat the holder.
    """
    check_alias(alias)
    with told_clearly(uri):
        client = connect(uri)
        version = find_version(client, model)
        holder = alias_holder(client, version.name, alias)
        before, after = None if holder is None else int(holder.version), int(version.version)
        moves, why = judge(alias, holder, version)
        if before == after:
            return Promotion(version.name, alias, before, after, why)
        transfer = version.tags.get("transfer")
        if alias == "champion" and transfer not in MAY_BE_CHAMPION:
            moves, why = False, f"not champion: its transfer is {transfer}; {why}"
        if not moves and not force:
            raise UserError(why, where=model, remedy="name another version, or move the alias anyway with --force")
        if not moves:
            note = f"{datetime.now(UTC).isoformat(timespec='seconds')} {why}"
            client.set_model_version_tag(version.name, version.version, FORCED + alias, note)
        client.set_registered_model_alias(version.name, alias, version.version)
    return Promotion(version.name, alias, before, after, why if moves else f"forced: {why}", None if moves else why)


def check_alias(alias: str) -> None:
    """Raises UserError for what MLflow takes for no alias, and for the one that registering alone moves."""
    if alias == "newest":
        raise UserError(
            "registering moves this alias, to the highest version", where=alias, remedy="name another alias"
        )
    if not re.fullmatch(r"[\w-]{1,255}", alias) or alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"{alias!r} cannot name an alias",
            where="ALIAS",
            remedy="use letters, digits, - and _; latest and v1, v2 ... are taken for versions",
        )
