"""Per-user results on disk, with the key that tells which of them can be compared."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from antdist.config.schema import RelearnConfig
from antdist.config.semantics import comparable
from antdist.errors import UserError
from antdist.evaluation.ranking import Ranks
from antdist.io.files import write_atomically

# what zip files, their decompression and numpy's headers raise on damaged bytes
UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class RunKey(BaseModel):
    """What two runs must share for their difference to be due to the strategy alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    manifest: str  # fingerprint of the target's manifest
    features: dict[str, str]  # identity of the frozen encoder, by modality
    seeds: tuple[int, ...]
    epochs: int
    budget: str  # digest of the rest of the configuration, as `budget_digest` makes it
    split: Literal["validation", "test"]


@dataclass(frozen=True)
class Run:
    """One strategy's results: a ranking of the same users for each seed."""

    key: RunKey
    ranks: list[Ranks]  # in the order of key.seeds


def budget_digest(config: RelearnConfig) -> str:
    """Digest what a strategy learns with: the keys that trials must share to be compared."""
    sections = comparable(config)
    sections |= sections.pop("data")  # flat, as in the digests of all earlier results
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()


def pool(runs: Sequence[Run]) -> Run:
    """Join runs of one strategy that differ in their seeds only, by increasing seed.

    Raises:
        UserError: they differ in more, for instance because data or features were prepared again between them.
    """
    by_seed = sorted(((seed, r) for run in runs for seed, r in zip(run.key.seeds, run.ranks, strict=True)), key=_seed)
    key = runs[0].key.model_copy(update={"seeds": tuple(seed for seed, _ in by_seed)})
    alike = [run.key.model_dump(exclude={"seeds"}) for run in runs]
    differs = [name for name in alike[0] if any(other[name] != alike[0][name] for other in alike)]
    if differs:
        raise UserError(
            f"trials of one strategy differ in {', '.join(differs)}, so their seeds cannot be pooled",
            where=f"target {key.target}",
            remedy="choose another name=..., or remove the trials that used older data or features",
        )
    assert len(set(key.seeds)) == len(key.seeds), "a seed twice"
    return Run(key, [ranks for _, ranks in by_seed])


def _seed(pair: tuple[int, Ranks]) -> int:
    return pair[0]


def save_ranks(path: str | Path, run: Run) -> None:
    """Write an .npz file (no pickle): `ranks` (S, U), `users` and `seen` (U,), `key` as JSON text."""
    first, path = run.ranks[0], Path(path)
    assert len(run.ranks) == len(run.key.seeds)
    assert all(np.array_equal(r.users, first.users) and np.array_equal(r.seen, first.seen) for r in run.ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, sync="none") as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            ranks=np.stack([r.ranks for r in run.ranks]),
            users=first.users,
            seen=first.seen,
            key=np.array(run.key.model_dump_json()),
        )


def load_ranks(path: str | Path) -> Run:
    """Read what `save_ranks` wrote.

    Raises:
        UserError: no such file, damaged, or another kind of file.
    """
    try:
        with np.load(path) as file:
            ranks, users, seen = file["ranks"], file["users"], file["seen"]
            key = RunKey.model_validate_json(str(file["key"]))
    except FileNotFoundError:
        raise UserError("no per-user results here", where=path, remedy="run `antdist relearn` first") from None
    except UNREADABLE as error:
        raise UserError(f"not per-user results ({error})", where=path, remedy="evaluate the model again") from error
    if ranks.shape != (len(key.seeds), len(users)) or seen.shape != users.shape:
        raise UserError("shapes of per-user results disagree", where=path, remedy="evaluate the model again")
    return Run(key, [Ranks(users, of_seed, seen) for of_seed in ranks])
