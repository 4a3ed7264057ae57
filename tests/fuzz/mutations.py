"""Mutate bytes blindly and documents by structure; all randomness comes from the given generator."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import tarfile
import zlib
from random import Random
from typing import Any

DEEP: Any = "leaf"
for _ in range(200):
    DEEP = [DEEP]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "0", "-1", "1e5", "1e999", "nan", "true", "null", "a", "../x", "/etc/passwd",
    "..", "x/y", "C:\\x", "a\0b", "\ud800", "\udc80", "é", "\u202e", "١٢", "\ufeff", "x" * 3000, "9" * 5000, "$1,299.00",
    "$5 - $10", "<b>x", "&amp;lt;", "line\nbreak", "tab\tbed", '"quoted"', "'", "[1, 2]", "{}", "!!python/name:os.system",
    "http://u:p@h/x", [], [None], [[]], [1, "a"], {}, {"a": 1}, {"": None}, DEEP, [0] * 300,
]  # fmt: skip


def some_value(random: Random) -> Any:
    return copy.deepcopy(random.choice(VALUES))  # later changes may modify it


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """One to four blind changes: bits flipped, bytes cut out, put in, repeated or moved, the end cut off."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if not changed:
            return random.randbytes(random.randint(0, 40))
        at, n = random.randrange(len(changed)), random.choice([1, 1, 2, 4, 8, 64, 512, 700])
        kind = random.randrange(8)
        if kind < 2:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            changed[at : at + n] = random.randbytes(n)
        elif kind == 3:
            del changed[at : at + n]
        elif kind == 4:
            changed[at:at] = changed[at : at + n] * random.randint(1, 3)
        elif kind == 5:
            changed[at:at] = random.choice(
                [b"\0", b"\n", b"\r", b'"', b"\xff", b"\xef\xbb\xbf", b"{", b"[", b",", b"\t"]
            )
        elif kind == 6:
            del changed[at:]
        else:
            other = random.randrange(len(changed))
            changed[at : at + n] = changed[other : other + n]
    return bytes(changed)


def mutate_tree(tree: Any, random: Random, changes: int | None = None) -> Any:
    """A copy of nested mappings and lists with values exchanged, and keys removed, renamed, doubled or added."""
    tree = copy.deepcopy(tree)
    for _ in range(changes or random.choice([1, 1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        _walk(tree, places)
        if not places:
            return some_value(random)
        holder, key = random.choice(places)
        kind = random.randrange(8)
        if kind < 3:
            holder[key] = some_value(random)
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            with contextlib.suppress(OverflowError):  # an integer too large for a float
                holder[key] += random.choice([-1, 1, 0.5, 2**33])
        elif kind == 4:
            del holder[key]
        elif kind == 5:
            other, place = random.choice(places)
            holder[key] = copy.deepcopy(other[place]) if place in _keys(other) else None
        elif isinstance(holder, dict):
            holder[random.choice(["a", "", str(key).upper(), f"{key} ", "__class__", "type"])] = some_value(random)
        else:
            holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(random.choice(holder)) if holder else None)
    return tree


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _walk(tree: Any, places: list[tuple[Any, Any]], depth: int = 0) -> None:
    if depth > 12:
        return
    for key in list(_keys(tree)) if isinstance(tree, dict | list) else []:
        places.append((tree, key))
        _walk(tree[key], places, depth + 1)


def to_json(tree: Any, random: Random) -> bytes:
    """Encode as JSON, escaped or not; lone surrogates become invalid UTF-8."""
    text = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def mutate_table(rows: list[list[str]], random: Random, mark: str) -> bytes:
    """Delimited text with fields exchanged, added, taken away, and lines doubled, moved or broken."""
    rows = [list(row) for row in rows]
    for _ in range(random.choice([1, 1, 2, 3])):
        row = random.choice(rows)
        kind = random.randrange(7)
        if kind < 3 and row:
            value = some_value(random)
            row[random.randrange(len(row))] = value if isinstance(value, str) else repr(value)[:3000]
        elif kind == 3 and row:
            row.pop(random.randrange(len(row)))
        elif kind == 4:
            row.insert(random.randrange(len(row) + 1), random.choice(["", "x", '"', '"a', 'b"']))
        elif kind == 5:
            rows.insert(random.randrange(len(rows) + 1), list(random.choice(rows)))
        else:
            rows.remove(row)
            if not rows:
                break
    end = random.choice(["\n", "\n", "\n", "\r\n", "\r"])
    return end.join(mark.join(row) for row in rows).encode("utf-8", "surrogatepass") + end.encode()


Members = list[tuple[str, bytes]]


def tar_members(data: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def mutate_tar(members: Members, random: Random) -> bytes:
    """A tar whose members are renamed, doubled, moved, dropped, damaged inside, or of another kind."""
    members = list(members)
    kinds: dict[int, bytes] = {}
    for _ in range(random.choice([1, 1, 2])):
        at = random.randrange(len(members))
        name, data = members[at]
        kind = random.randrange(9)
        if kind < 3:
            members[at] = name, _mutate_member(name, data, random)
        elif kind == 3:
            value = some_value(random)
            members[at] = (value if isinstance(value, str) else "x").replace("\0", "") or "y", data
        elif kind == 4:
            stem, _, suffix = name.partition(".")
            members[at] = random.choice([f"{stem}.{suffix}.x", suffix, f"/{name}", f"../{name}", name.upper()]), data
        elif kind == 5:
            members.insert(random.randrange(len(members) + 1), members[at])
        elif kind == 6 and len(members) > 1:
            members.pop(at)
        elif kind == 7:
            members.insert(random.randrange(len(members)), members.pop(at))
        else:
            kinds[at] = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"])
    out = io.BytesIO()
    form = random.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if form is None else form) as tar:
        for at, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name.encode("utf-8", "replace").decode()[:90])
            info.size = len(data)
            if at in kinds:
                info.type, info.linkname, info.size = kinds[at], "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data[: info.size]))
    return out.getvalue()


def _mutate_member(name: str, data: bytes, random: Random) -> bytes:
    if name.endswith("json") and random.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):  # mutated once already
            return to_json(mutate_tree(json.loads(data), random), random)
    if name.endswith("npy") and random.random() < 0.6:
        return mutate_npy(data, random)
    return mutate_bytes(data, random)


def mutate_npy(data: bytes, random: Random) -> bytes:
    """An array file with another header, or other numbers."""
    if len(data) < 10:  # mutated once already
        return mutate_bytes(data, random)
    size = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + size], bytearray(data[10 + size :])
    if random.random() < 0.5 and body:
        for _ in range(random.choice([1, 1, 5])):
            at = random.randrange(len(body))
            body[at] = random.choice([0, 1, 127, 128, 255])
        return data[: 10 + size] + bytes(body)
    found, other = random.choice(
        [
            (b"'<i", b"'>i"), (b"<i8", b"<f8"), (b"<i4", b"<i2"), (b"<f4", b"|O8"), (b"<i8", b"|O"), (b"False", b"True"),
            (b"(", b"(-"), (b",)", b", 1)"), (b",)", b"0,)"), (b"shape", b"shap3"), (b"descr", b"desc"), (b"}", b""),
            (b"{", b"{{"), (b"'<", b"b'<"), (b"(", b"[" * 90), (b", ", b",\n"), (b"'<f4'", b"[('a','<f4')]"),
            (b"(", b"(True+"), (b"'", b'"'), (b",)", b"e3,)"),
        ]
    )  # fmt: skip
    header = header.replace(found, other, random.choice([1, -1]))[:60000]
    version = random.choice([b"\x01\0", b"\x01\0", b"\x01\0", b"\x02\0", b"\x03\0", b"\x09\0"])
    length = struct.pack("<I" if version[0] in (2, 3) else "<H", len(header))
    return data[:6] + version + length + header + bytes(body)


def mutate_png(data: bytes, random: Random) -> bytes:
    """A PNG with a chunk damaged, doubled, dropped or of another size, its checksum right."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    which = random.randrange(len(chunks))
    tag, content = chunks[which]
    kind = random.randrange(5)
    if kind == 0 and tag == b"IHDR":
        sides = [random.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1, 40]) for _ in range(2)]
        content = struct.pack(">II", *sides) + content[8:]
        chunks[which] = tag, content
    elif kind == 1:
        chunks.insert(which, chunks[which])
    elif kind == 2:
        chunks.pop(which)
    elif kind == 3:
        chunks.insert(1, (random.choice([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"eXIf", b"tRNS"]), content[:99]))
    else:
        chunks[which] = tag, mutate_bytes(content, random)
    body = b"".join(struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    return data[:8] + body
