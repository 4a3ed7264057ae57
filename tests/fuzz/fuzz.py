"""Fuzz everything that parses external input: `python -m tests.fuzz.fuzz --count 100000 --seed 0`.

Input n of a seed is always the same. Even inputs are mutations by structure of valid files, odd ones of their bytes. The
only things allowed to happen are success and a `UserError` (of a picture: that it is broken); anything else is a finding,
and so is an input that takes longer than ten seconds. `--coverage` counts lines of the parsers reached, at half the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from antdist import ragged
from antdist.config.load import dump_config, load_config
from antdist.config.schema import PretrainConfig, RelearnConfig, StreamConfig
from antdist.data.domain import Sequences, open_domain
from antdist.data.images import BrokenImageError, normalize_image
from antdist.data.ingest.append import append_to_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.ingest.sources import SourceFiles, read_source
from antdist.data.quarantine import Quarantine
from antdist.data.stream.stream import Stream
from antdist.data.verify import verify_domain
from antdist.data.writing import write_domain
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.features.encoders.image import read_picture
from antdist.features.source import item_metadata
from antdist.features.table import open_table
from tests.fuzz import mutations
from tests.items import picture, some_items
from tests.worlds import make_domain

PROJECT = Path(__file__).resolve().parents[2]
PARSERS = (
    "antdist/data/ingest/sources.py", "antdist/data/ingest/readers/files.py", "antdist/data/ingest/readers/columns.py", "antdist/data/ingest/readers/tabular.py",
    "antdist/data/ingest/readers/amazon.py", "antdist/data/ingest/readers/atomic.py", "antdist/data/ingest/readers/base.py",
    "antdist/data/quarantine.py", "antdist/data/manifest.py", "antdist/data/shards.py", "antdist/data/images.py",
    "antdist/data/verify.py", "antdist/features/source.py", "antdist/config/load.py",
)  # fmt: skip
SLOW = 10.0  # seconds
MOST_MEMORY = 6 << 30  # addresses, most of them of libraries

Mutate = Callable[[bytes, Random], bytes]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A parser to fuzz: valid files, how to mutate each by structure, and how to use the folder."""

    name: str
    files: Files
    structure: Callable[[str, bytes, Random], bytes]
    use: Callable[[Path, Random], Any]
    seal: Callable[[Path, Random], None] | None = None  # corrects digests


@dataclass
class Outcome:
    """The result of a run; `ended` counts inputs by target and result."""

    inputs: int = 0
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------ readers


def _json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _interactions() -> list[dict[str, Any]]:
    return [{"user_id": f"u{n % 6}", "item_id": f"i{n % 5}", "timestamp": 100 + n} for n in range(30)]


def _items() -> list[dict[str, Any]]:
    texts = ["Apples, red", None, 'a "b"', "é <b>x</b> &amp;", "  "]
    prices = [1.5, None, "$1,299.00", "$5 - $10", "free"]
    return [{"item_id": f"i{n}", "text": texts[n], "price": prices[n], "image": ["a.png|b.png"][n:]} for n in range(5)]


def _lines_of_json(name: str, data: bytes, random: Random) -> bytes:
    packed = data.startswith(b"\x1f\x8b")
    rows = [json.loads(line) for line in (gzip.decompress(data) if packed else data).splitlines()]
    for _ in range(random.choice([1, 1, 3])):
        at = random.randrange(len(rows))
        rows[at] = mutations.mutate_tree(rows[at], random, 1)
    text = b"".join(mutations.to_json(row, random) + b"\n" for row in rows)
    return gzip.compress(text, 1) if packed else text


def _delimited(mark: str) -> Callable[[str, bytes, Random], bytes]:
    def mutate(name: str, data: bytes, random: Random) -> bytes:
        packed = data.startswith(b"\x1f\x8b")
        text = (gzip.decompress(data) if packed else data).decode()
        changed = mutations.mutate_table([line.split(mark) for line in text.splitlines()], random, mark)
        return gzip.compress(changed, 1) if packed else changed

    return mutate


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _other_parquet(name: str, data: bytes, random: Random) -> bytes:
    """Columns of other types, renamed, missing or with holes."""
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for _ in range(random.choice([1, 1, 2])):
        key = random.choice(list(columns))
        kind = random.randrange(6)
        if kind == 0:
            columns[key][: random.randint(0, 2)] = [None]
        elif kind == 1:
            columns[random.choice(["x", key.upper(), ""])] = columns.pop(key)
        elif kind == 2:
            values = [
                1,
                1.5,
                None,
                True,
                b"\xff",
                "é",
                ["a"],
                {"a": 1},
                2**62,
                np.datetime64("2020-01-01"),
                "\0",
                "",
                1e30,
            ]
            columns[key] = [random.choice(values)] * len(rows)
        elif kind == 3:
            columns[key] = [str(value) for value in columns[key]]
        elif kind == 4:
            columns[key] = [float(n) for n in range(len(rows))]
        else:
            columns = {name: values[:0] if random.random() < 0.5 else values[:1] for name, values in columns.items()}
        rows = rows[: len(next(iter(columns.values())))]
        if not rows or not columns:
            break
    length = min(map(len, columns.values()), default=0)
    out = io.BytesIO()
    with contextlib.suppress(
        pa.ArrowException, TypeError, ValueError, OverflowError
    ):  # a mixture that no column can hold
        pq.write_table(pa.table({name: pa.array(values[:length]) for name, values in columns.items()}), out)
    return out.getvalue() or data


def _preparing(form: Any) -> Callable[[Path, Random], Any]:
    def use(folder: Path, random: Random) -> Any:
        shares: dict[str, float] = {} if form == "atomic" else {"max_bad": random.choice([0.0, 0.001, 0.5])}
        options: dict[str, Any] = {} if form == "atomic" else {"k_core": random.choice([None, None, 2])}
        options["drop_unknown"] = form != "atomic" and random.random() < 0.3
        if random.random() < 0.7:  # the reader alone
            return read_source(SourceFiles(folder, form), quarantine=Quarantine(shares.get("max_bad", 0.0)))
        return prepare_domain(folder, format=form, domain="d", out=folder / "out", overwrite=True, **shares, **options)

    return use


def _atomic() -> Files:
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    users = {"x": [0, 1, 2, 3, 4, 0], "y": [3, 3, 1, 2], "z": [4, 1, 0]}

    def row(user: str, at: int) -> str:
        return f"{user}\t{' '.join(map(str, users[user][:at]))}\t{users[user][at]}\n"

    train = [row(user, at) for user, items in users.items() for at in range(len(items) - 3, 0, -1)]
    return {
        "T.train.inter": (header + "".join(train)).encode(),
        "T.valid.inter": (header + "".join(row(u, len(i) - 2) for u, i in users.items())).encode(),
        "T.test.inter.gz": gzip.compress((header + "".join(row(u, len(i) - 1) for u, i in users.items())).encode()),
        "T.item2index": "".join(f"asin{n}\t{n}\n" for n in range(5)).encode(),
        "T.text": ("item_id:token\ttext:token_seq\n" + "".join(f"asin{n}\ttext {n}\n" for n in range(5))).encode(),
    }


def reader_targets() -> list[Target]:
    csv_rows = [["user_id", "item_id", "timestamp"], *([str(v) for v in row.values()] for row in _interactions())]
    csv_items = [["item_id", "text", "price", "image"], *([f"i{n}", f"text {n}", f"{n}.5", "a.png"] for n in range(5))]
    table = {
        "interactions.csv": "\n".join(map(",".join, csv_rows)).encode() + b"\n",
        "items.csv": "\n".join(map("\t".join, csv_items)).encode() + b"\n",
    }
    amazon_items = [
        {"asin": f"i{n}", "title": f"T {n}", "category": ["A", "B"], "brand": "C", "price": "$2"} for n in range(5)
    ]
    reviews = [
        {"reviewerID": f"u{n % 6}", "asin": f"i{n % 5}", "unixReviewTime": n, "reviewText": "good"} for n in range(30)
    ]
    images = {"a.png": picture(1), "b.png": picture(2, form="JPEG")}

    def csv_structure(name: str, data: bytes, random: Random) -> bytes:
        if name.endswith(".png"):
            return mutations.mutate_bytes(data, random)
        return _delimited("," if name.startswith("inter") else "\t")(name, data, random)

    def json_structure(name: str, data: bytes, random: Random) -> bytes:
        return mutations.mutate_bytes(data, random) if name.endswith(".png") else _lines_of_json(name, data, random)

    lines = {"interactions.jsonl": _json_lines(_interactions()), "items.jsonl.gz": gzip.compress(_json_lines(_items()))}
    parquet_items = [{"item_id": f"i{n}", "text": "x", "price": float(n)} for n in range(5)]
    parquet = {"interactions.parquet": _parquet(_interactions()), "items.parquet": _parquet(parquet_items)}
    amazon = {"R.json.gz": gzip.compress(_json_lines(reviews)), "meta_R.json": _json_lines(amazon_items)}
    return [
        Target("tabular csv", {**table, **images}, csv_structure, _preparing("tabular")),
        Target("tabular json", {**lines, **images}, json_structure, _preparing("tabular")),
        Target("tabular parquet", parquet, _other_parquet, _preparing("tabular")),
        Target("amazon", amazon, _lines_of_json, _preparing("amazon")),
        Target("atomic", _atomic(), _delimited("\t"), _preparing("atomic")),
    ]


# --------------------------------------------------------------------------------------------------- prepared domains


def _folder_files(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _prepared(folder: Path) -> Files:
    lengths = [3, 7, 4, 9, 5, 3]
    offsets = ragged.offsets(lengths)
    sequences = Sequences(offsets, np.arange(offsets[-1]) % 7, np.arange(offsets[-1]))
    users = [f"u{n}" for n in range(len(lengths))]
    write_domain(folder, "d", some_items(7), sequences, users, {"format": "test"}, block_users=2, blocks_per_shard=2)
    return _folder_files(folder)


def _use_domain(folder: Path, random: Random) -> None:
    """Read all of a domain; each reader is tried, and the last refusal is raised."""
    domain = open_domain(folder)
    readings: list[Callable[[], Any]] = [
        lambda: list(islice(Stream([domain], StreamConfig(batch_size=5), max_length=4, seed=0).batches(0), 4)),
        domain.sequences,
        domain.user_ids,
        lambda: list(domain.items()),
        domain.item_ids,
        lambda: list(item_metadata(domain)),
        domain.popularity,
        lambda: verify_domain(folder),
    ]
    refused = None
    for reading in readings:
        try:
            reading()
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def _reseal(folder: Path, random: Random) -> None:
    """Mostly update the manifest to the mutated shards, so that their parsers are reached."""
    if random.random() < 0.15:
        return
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    others = [content[key] for key in ("superseded", "pending") if content.get(key)]
    for file in [*content["item_shards"], *content["sequence_shards"], content["popularity"], *others]:
        data = (folder / file["name"]).read_bytes()
        file.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_text(json.dumps(content))


def _manifest_structure(name: str, data: bytes, random: Random) -> bytes:
    tree = json.loads(data)
    if random.random() < 0.4:  # counts that still add up
        extra = random.choice([-1, 1, 7, 2**31, 2**62, 10**30])
        count = random.choice(["users", "interactions"])
        shard = random.choice(tree["sequence_shards"])
        for holder in (tree, shard, random.choice(shard["blocks"])):
            holder[count] += extra
        for later in tree["sequence_shards"][tree["sequence_shards"].index(shard) + 1 :]:
            later["first_user"] += extra * (count == "users")
        if random.random() < 0.5:
            tree["items"] += extra
            tree["item_shards"][-1]["items"] += extra
        return json.dumps(tree).encode()
    return mutations.to_json(mutations.mutate_tree(tree, random), random)


def _shard_structure(name: str, data: bytes, random: Random) -> bytes:
    if name.endswith(".tar"):
        return mutations.mutate_tar(mutations.tar_members(data), random)
    return mutations.mutate_npy(data, random) if name.endswith(".npy") else data


def _appended(folder: Path) -> Files:
    """Make a domain with two appends and pending users."""
    lengths = [3, 7, 4, 9, 5, 3]
    offsets = ragged.offsets(lengths)
    sequences = Sequences(offsets, np.arange(offsets[-1]) % 5, np.arange(offsets[-1]))
    items, users = some_items(5), [f"u{n}" for n in range(len(lengths))]
    made = {"format": "tabular", "max_sequence": 9}
    write_domain(folder / "d", "d", items, sequences, users, made, block_users=2, blocks_per_shard=1)
    for step in (1, 2):
        source = folder / f"source{step}"
        source.mkdir()
        rows = [{"user_id": f"u{n * step}", "item_id": f"n{n % 3}", "timestamp": 100 * step + n} for n in range(8)]
        (source / "interactions.jsonl").write_bytes(_json_lines(rows))
        (source / "items.jsonl").write_bytes(_json_lines([{"item_id": f"n{n}"} for n in range(2 + step)]))
        append_to_domain(source, domain="d", out=folder, block_users=2, drop_unknown=True)
    return _folder_files(folder / "d")


def _appended_structure(name: str, data: bytes, random: Random) -> bytes:
    return (_manifest_structure if name.endswith(".json") else _shard_structure)(name, data, random)


def _reseal_appended(folder: Path, random: Random) -> None:
    with contextlib.suppress(
        ValueError, TypeError, KeyError, OSError, AttributeError
    ):  # the manifest may be what was mutated
        _reseal(folder, random)


def _use_appended(folder: Path, random: Random) -> None:
    list(open_domain(folder).pending_histories())
    _use_domain(folder, random)


def _featured(folder: Path) -> Files:
    make_domain(folder, "d", users=4, items=6, dims={"text": 3, "image": 2})
    return _folder_files(folder / "d")


def _use_features(folder: Path, random: Random) -> None:
    domain = open_domain(folder)
    refused = None
    for modality in ("text", "image"):
        try:
            table = open_table(domain, modality)
            table.rows(np.arange(domain.manifest.items))
            table.verify()
        except UserError as error:
            refused = error
    verify_domain(folder)
    Catalogue([domain], ["text", "image"]).features(np.arange(domain.manifest.items))
    if refused is not None:
        raise refused


def _feature_structure(name: str, data: bytes, random: Random) -> bytes:
    if name.endswith(".json"):
        return mutations.to_json(mutations.mutate_tree(json.loads(data), random), random)
    return mutations.mutate_npy(data, random)


def _reseal_features(folder: Path, random: Random) -> None:
    for path in (folder / "features").glob("*.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError, AttributeError):
            content = json.loads(path.read_bytes())
            for part in content["parts"]:
                for prefix, suffix in (("", ""), ("present_", ".present")):
                    array = (path.parent / f"{part['name']}{suffix}.npy").read_bytes()
                    part |= {f"{prefix}bytes": len(array), f"{prefix}sha256": hashlib.sha256(array).hexdigest()}
            path.write_text(json.dumps(content))


def domain_targets(folder: Path) -> list[Target]:
    prepared, featured = _prepared(folder / "prepared"), _featured(folder / "featured")
    manifest_alone = {"manifest.json": prepared["manifest.json"]}
    shards = {name: data for name, data in prepared.items() if name != "manifest.json"}
    tables = {name: data for name, data in featured.items() if name.startswith("features/")}
    appended = _appended(folder / "grown")
    newest = {
        name: data for name, data in appended.items() if name == "manifest.json" or name.startswith("append-00002/")
    }
    newest = {name: data for name, data in newest.items() if not name.startswith("append-00002/manifest-")}
    fixed = {"manifest": prepared, "shards": prepared, "features": featured, "grown": appended}
    for name, files in fixed.items():
        for file, data in files.items():
            path = folder / "fixed" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return [
        Target("manifest", manifest_alone, _manifest_structure, _use_domain),
        Target("shards", shards, _shard_structure, _use_domain, _reseal),
        Target("grown", newest, _appended_structure, _use_appended, _reseal_appended),
        Target("features", tables, _feature_structure, _use_features, _reseal_features),
    ]


# ------------------------------------------------------------------------------------------- configuration, pictures


def _config_structure(name: str, data: bytes, random: Random) -> bytes:
    text = yaml.safe_dump(mutations.mutate_tree(yaml.safe_load(data), random), allow_unicode=random.random() < 0.5)
    if random.random() < 0.3:
        extras = [
            "a: &a [x, x]\nb: &b [*a, *a]\n", "<<: {seed: 1}\n", "? [1, 2]\n: 3\n", "seed: !!python/name:os.system\n",
            "seed: !!python/object/apply:os.system ['true']\n", "seed: 1:30\n", "seed: 2020-01-01\n", "seed: !!binary aGk=\n",
            "name: !!set {a}\n", "%YAML 9.9\n---\n", "--- 1\n--- 2\n", "&a name: *a\n", "seed: 0x_\n", "seed: 1__0\n",
            "name: !!float x\n", "training: &t {epochs: *t}\n", "seed: !!int ''\n", "seed: !!bool x\n", "{" * 400 + "\n",
            "- " * 400 + "x\n", "training:\n  epochs: !!timestamp x\n", "? {a: 1}\n: b\n", "seed: -:1\n", "=: 1\n", "seed: =\n",
        ]  # fmt: skip
        extra = random.choice(extras)
        text = extra + text if random.random() < 0.5 else text + extra
    return text.encode("utf-8", "surrogatepass")


def _use_config(folder: Path, random: Random) -> None:
    kind = random.choice([PretrainConfig, RelearnConfig])
    keys = ["training.epochs", "model.dim", "name", "data.domains", "tracking.uri", "a..b", "=", "training", "", "from"]
    value = mutations.some_value(random)
    overrides = [f"{random.choice(keys)}={value if isinstance(value, str) else json.dumps(value)}"]
    config = load_config(kind, folder / "run.yaml", overrides if random.random() < 0.4 else [])
    (folder / "again.yaml").write_text(dump_config(config))
    assert load_config(kind, folder / "again.yaml") == config


def _use_picture(folder: Path, random: Random) -> None:
    for name in ("a.png", "b.jpg"):
        data = (folder / name).read_bytes()
        with contextlib.suppress(BrokenImageError):
            read_picture(data)
        try:
            normalized = normalize_image(data)
        except BrokenImageError as error:
            raise UserError(str(error)) from None
        read_picture(normalized)


def other_targets() -> list[Target]:
    configs = PROJECT / "configs"
    pictures = {"a.png": picture(3, "P"), "b.jpg": picture(4, form="JPEG")}
    return [
        Target("config", {"run.yaml": (configs / "pretrain.yaml").read_bytes()}, _config_structure, _use_config),
        Target(
            "config of defaults", {"run.yaml": dump_config(RelearnConfig()).encode()}, _config_structure, _use_config
        ),
        Target(
            "pictures",
            pictures,
            lambda name, data, random: (
                mutations.mutate_png(data, random) if name == "a.png" else mutations.mutate_bytes(data, random)
            ),
            _use_picture,
        ),
    ]


# ------------------------------------------------------------------------------------------------------------- running


def fuzz(count: int, seed: int = 0, *, start: int = 0, say: Callable[[str], None] | None = None) -> Outcome:
    """Try inputs `start` to `start + count - 1` of a seed on all targets in turn."""
    outcome = Outcome()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        root = Path(temporary)
        targets = [*reader_targets(), *domain_targets(root), *other_targets()]
        folders = {}
        for target in targets:
            folders[target.name] = folder = root / "fixed" / target.name
            for name, data in target.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        sound = {name: _folder_files(folder) for name, folder in folders.items()}
        begun = reported = time.monotonic()
        shown = 0
        for n in range(start, start + count):
            target = targets[n // 2 % len(targets)]
            _try(
                target,
                folders[target.name],
                sound[target.name],
                Random(f"{seed}:{n}"),
                f"{seed}:{n}",
                n % 2 == 0,
                outcome,
            )
            if say is not None and len(outcome.findings) > shown:
                say("\n".join(outcome.findings[shown:]))
                shown = len(outcome.findings)
            if say is not None and time.monotonic() - reported > 30:
                reported = time.monotonic()
                say(
                    f"{outcome.inputs} inputs, {outcome.inputs / (reported - begun):.0f}/s, {len(outcome.findings)} findings"
                )
    return outcome


def _try(
    target: Target, folder: Path, sound: Files, random: Random, label: str, by_structure: bool, outcome: Outcome
) -> None:
    name = random.choice(list(target.files))
    data = target.files[name]
    changed = target.structure(name, data, random) if by_structure else mutations.mutate_bytes(data, random)
    (folder / name).write_bytes(changed)
    begin, ended = time.monotonic(), "accepted"
    try:
        if target.seal is not None:
            target.seal(folder, random)
        target.use(folder, random)
    except UserError:
        ended = "refused"
    except Exception:
        ended = "crashed"
        outcome.findings.append(f"{label} {target.name} {name}\n{traceback.format_exc()}")
    if time.monotonic() - begin > SLOW:
        outcome.findings.append(f"{label} {target.name} {name} took {time.monotonic() - begin:.1f} s")
    outcome.inputs += 1
    outcome.ended[target.name, ended] += 1
    shutil.rmtree(folder / "out", ignore_errors=True)
    for other in {name, "manifest.json", *(file for file in sound if file.startswith("features/"))} & sound.keys():
        (folder / other).write_bytes(sound[other])


# ------------------------------------------------------------------------------------------------------------ coverage


@contextlib.contextmanager
def lines_reached() -> Iterator[dict[str, set[int]]]:
    """Record which lines of the parsers' functions run within the block, by file."""
    reached: dict[str, set[int]] = {name: set() for name in PARSERS}
    by_path = {str(PROJECT / name): lines for name, lines in reached.items()}

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        lines = by_path.get(frame.f_code.co_filename)
        if lines is None:
            return None

        def step(frame: FrameType, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            return step

        lines.add(frame.f_lineno)
        return step

    sys.settrace(enter)
    try:
        yield reached
    finally:
        sys.settrace(None)


def lines_there(name: str) -> set[int]:
    """Return the executable lines of a file's functions."""
    path = PROJECT / name
    found: set[int] = set()

    def gather(code: CodeType, inside: bool) -> None:
        if inside and not (code.co_name == code.co_qualname and code.co_name[0].isupper()):
            found.update(line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                gather(constant, bool(constant.co_flags & 2))  # a function, not a class's body

    gather(compile(path.read_text(), str(path), "exec"), False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the readers, the manifest, shards, features and configuration.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="The first input: --count 1 --start N tries one again.")
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))  # exhausting memory is a finding, too
    with lines_reached() if options.coverage else contextlib.nullcontext({}) as reached:
        outcome = fuzz(options.count, options.seed, start=options.start, say=lambda line: print(line, flush=True))
    for target in dict.fromkeys(name for name, _ in outcome.ended):
        counts = {how: outcome.ended[target, how] for how in ("accepted", "refused", "crashed")}
        print(f"{target:20}" + "".join(f"{how} {count:7,}  " for how, count in counts.items()))
    total = hit = 0
    for name, lines in reached.items():
        there = lines_there(name)
        total, hit = total + len(there), hit + len(there & lines)
        missed = sorted(there - lines)
        print(f"{name:40} {len(there & lines):4} of {len(there):4} lines; not reached: {missed[:25]}")
    if total:
        print(f"coverage of the parsers: {hit} of {total} lines, {hit / total:.1%}")
    print(f"{outcome.inputs:,} inputs, half of them by structure; {len(outcome.findings)} findings")
    sys.exit(bool(outcome.findings))


if __name__ == "__main__":
    main()
