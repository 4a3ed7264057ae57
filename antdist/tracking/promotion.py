"""`antdist promote`: move an alias by hand to a version whose validation metric beats the holder's."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from antdist.errors import UserError
from antdist.report import Report
from antdist.tracking.registry import compare_with_holder, find_alias_holder
from antdist.tracking.resolve import find_version
from antdist.tracking.store import connect, translate_errors

FORCED = "forced."  # + alias: the tag that records why a forced alias would have stayed
CHAMPION_TRANSFERS = (None, "ground truth", "positive")  # of a pre-training, of `scratch`, proven


@dataclass(frozen=True, repr=False)
class Promotion(Report):
    """The result of a promotion: version numbers, and in `forced` the reason that --force overruled."""

    name: str
    alias: str
    before: int | None
    after: int
    why: str
    forced: str | None = None

    def lines(self) -> list[str]:
        if self.before == self.after:
            return [f"models:/{self.name}/{self.after} is {self.why}"]
        held = "no version" if self.before is None else f"version {self.before}"
        return [f"{self.alias} of {self.name}: from {held} to version {self.after} ({self.why})"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promote(model: str, alias: str, uri: str, *, force: bool = False) -> Promotion:
    """Move `alias` to `model` if its validation metric beats the holder's, or if nothing holds it.

    Metrics compare for the same task only. `champion` also requires that the transfer is positive, or that there is none to
    judge.

    Args:
        force: move it in any case, and record the reason against it as a tag of the version.

    Raises:
        UserError: no such version, an invalid alias, or, without `force`, a version that does not beat the holder.
    """
    check_alias(alias)
    with translate_errors(uri):
        client = connect(uri)
        version = find_version(client, model)
        holder = find_alias_holder(client, version.name, alias)
        before, after = None if holder is None else int(holder.version), int(version.version)
        moves, why = compare_with_holder(alias, holder, version)
        if before == after:
            return Promotion(version.name, alias, before, after, why)
        transfer = version.tags.get("transfer")
        if alias == "champion" and transfer not in CHAMPION_TRANSFERS:
            moves, why = False, f"not champion: its transfer is {transfer}; {why}"
        if not moves and not force:
            raise UserError(why, where=model, remedy="name another version, or move the alias anyway with --force")
        if not moves:
            note = f"{datetime.now(UTC).isoformat(timespec='seconds')} {why}"
            client.set_model_version_tag(version.name, version.version, FORCED + alias, note)
        client.set_registered_model_alias(version.name, alias, version.version)
    return Promotion(version.name, alias, before, after, why if moves else f"forced: {why}", None if moves else why)


def check_alias(alias: str) -> None:
    """Raise UserError for an alias that MLflow refuses, and for the one that only registering moves."""
    if alias == "newest":
        raise UserError(
            "registering moves this alias, to the highest version", where=alias, remedy="name another alias"
        )
    if not re.fullmatch(r"[\w-]{1,255}", alias) or alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"{alias!r} cannot name an alias",
            where="ALIAS",
            remedy="use letters, digits, - and _; latest and v1, v2 ... mean versions",
        )
