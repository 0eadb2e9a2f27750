"""``docs/format.md`` is complete: a reader written from it alone restores what the library does.

`Reader` knows nothing of dbmodule. It is slow, plain and strict, and keeps to the names and the
order of that page, whose sections are given in brackets.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

RELATION, CONTENT, DIRECTORY, SYMLINK = range(4)
IDENTITY, OVERLAY, WAL, UNCHANGED = 1, 2, 4, 8
PAGE = 8192
ZERO = 0xFFFFFFFF

FILE_COLUMNS = "BBHQqqQQQIQI"
COLUMNS = {"extents": "IIIIB", "marks": "QH", "hashes": ("16s",)}


class FormatError(Exception):
    """The repository is not as the page says."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(what)


# -- encryption [18] ----------------------------------------------------------------------------


def derive(context: str, data: bytes, length: int = 32) -> bytes:
    return blake3(data, derive_key_context="dbmodule format 1: " + context).digest(length)


def unwrap(key: bytes, wrapped: str) -> bytes:
    data = bytes.fromhex(wrapped)
    return AESGCM(key).decrypt(data[:12], data[12:], None)


class Vault:
    def __init__(self, data_key: bytes) -> None:
        self.data_key = data_key
        self.objects = derive("objects", data_key)
        self.names = AESSIV(derive("names", data_key, 64))

    def stored_name(self, name: str) -> str:
        if name.startswith("packs/"):
            return name
        parts = name.split("/")
        stored = [parts[0]]
        for i, part in enumerate(parts[1:], 1):
            padded = part.encode()
            padded += bytes(-len(padded) % 48)
            stored.append(self.names.encrypt(padded, ["/".join(parts[:i]).encode()]).hex())
        return "/".join(stored)

    def plain_part(self, folder: str, stored: str) -> str:
        padded = self.names.decrypt(bytes.fromhex(stored), [folder.encode()])
        return padded.rstrip(b"\0").decode()

    def gcm(self, name: str, salt: bytes) -> AESGCM:
        return AESGCM(blake3(salt + name.encode(), key=self.objects).digest())

    def opened(self, name: str, stored: bytes, *, salted: bool) -> bytes:
        salt, stored = (stored[:32], stored[32:]) if salted else (b"", stored)
        gcm, out = self.gcm(name, salt), b""
        count = -(-len(stored) // 32784)
        expect(count > 0, f"{name} has a last piece")
        for number in range(count):
            nonce = struct.pack("<Q3xB", number, number == count - 1)
            out += gcm.decrypt(nonce, stored[number * 32784 : (number + 1) * 32784], None)
        return out

    def range(self, name: str, file: BinaryIO, offset: int, length: int) -> bytes:
        """Part of a pack, from no more pieces than it is in."""
        gcm, out = self.gcm(name, b""), b""
        first, last = offset // 32768, (offset + length - 1) // 32768
        for number in range(first, last + 1):
            file.seek(number * 32784)
            piece = file.read(32784)
            try:
                out += gcm.decrypt(struct.pack("<Q3xB", number, 0), piece, None)
            except InvalidTag:
                out += gcm.decrypt(struct.pack("<Q3xB", number, 1), piece, None)
        return out[offset - first * 32768 :][:length]


@dataclasses.dataclass
class Row:
    path: str
    target: str
    kind: int
    flags: int
    mode: int
    size: int
    mtime: int
    ctime: int
    inode: int
    device: int
    first_extent: int
    extents: int
    first_print: int
    prints: int


class Reader:
    def __init__(self, root: Path, cluster: str, master_key: str = "") -> None:
        self.root, self.cluster = root, cluster
        self.key: bytes | None = None
        self.vault: Vault | None = None
        description, digest = self.document("repository.json")
        if "cipher" in description:
            expect(set(description) == {"format", "id", "cipher", "salt"}, "description")
            expect(description["cipher"] == "aes-256-gcm", "cipher")
            master = bytes.fromhex(master_key) + bytes.fromhex(digest)
            name = f"keys/{derive('key id', master, 16).hex()}.json"
            wrapped = self.document(name)[0]
            self.vault = Vault(unwrap(derive("wrap", master), wrapped["wrapped"]))
            self.key_info = json.loads(
                self.vault.opened(name, bytes.fromhex(wrapped["info"]), salted=True)
            )
            self.key = derive("hashes", self.vault.data_key)
        else:
            self.key = bytes.fromhex(description["hash_key"])
        self.footers: dict[str, list[tuple[int, int, int, int, bytes, list[bytes]]]] = {}

    # -- objects, encrypted or not [18] ---------------------------------------------------------

    def object(self, name: str) -> bytes:
        if self.vault is None:
            return (self.root / name).read_bytes()
        stored = (self.root / self.vault.stored_name(name)).read_bytes()
        return self.vault.opened(name, stored, salted=not name.startswith("packs/"))

    # -- hashes and documents [2, 3] ------------------------------------------------------------

    def hash(self, data: bytes) -> bytes:
        return (blake3(data) if self.key is None else blake3(data, key=self.key)).digest()

    def document(self, name: str) -> tuple[dict[str, Any], str]:
        line, digest, nothing = self.object(name).split(b"\n")
        expect(nothing == b"" and digest.decode() == self.hash(line).hex(), f"hash of {name}")
        body: dict[str, Any] = json.loads(line)
        expect(body["format"] == 1, f"version of {name}")
        return body, digest.decode()

    # -- packs [4] ------------------------------------------------------------------------------

    def husk(self, pack: str) -> dict[str, Any] | None:
        """What is left of a pack that is not there [17]."""
        if (self.root / "packs" / pack[:2] / pack).exists():
            return None
        return self.document(f"husks/{pack[:2]}/{pack}")[0]

    def moved_frame(self, husk: dict[str, Any], pack: str, number: int) -> bytes:
        data = base64.b64decode(husk["footer"])
        expect(self.hash(data).hex() == pack, f"footer in the husk of {pack}")
        raw, digest = struct.unpack_from("<4xI4x32s", data, 48 + 44 * number)
        for first, count, row, target in husk["moved"]:
            if first <= number < first + count:
                found = self.frame(tuple(husk["packs"][row]), target + number - first)
                expect(len(found) == raw and self.hash(found) == digest, "hash of a moved frame")
                return found
        raise FormatError(f"frame {number} of {pack} is gone")

    def read(self, pack: str, offset: int, length: int) -> bytes:
        name = f"packs/{pack[:2]}/{pack}"
        if self.vault is None:
            with (self.root / name).open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        else:
            with (self.root / name).open("rb") as file:
                data = self.vault.range(name, file, offset, length)
        expect(len(data) == length, f"pack {pack} is cut off")
        return data

    def footer(
        self, pack: str, size: int, length: int
    ) -> list[tuple[int, int, int, int, bytes, list[bytes]]]:
        """(offset, stored, raw, encoding, hash, page hashes) of each frame."""
        if pack in self.footers:
            return self.footers[pack]
        data = self.read(pack, size - 16 - length, length)
        expect(self.hash(data).hex() == pack, f"footer of {pack}")
        frames, hashes, body_length, body_hash = struct.unpack_from("<IIQ32s", data)
        expect(48 + 44 * frames + 16 * hashes == length, "length of the footer")
        expect(body_length + length + 16 == size, "size of the pack")
        expect(self.hash(self.read(pack, 0, body_length)) == body_hash, "hash of the body")
        header = self.read(pack, 0, 32)
        expect(header[:16] == b"DBMPACK1" + struct.pack("<II", 1, 0), "header")
        trailer = self.read(pack, size - 16, 16)
        expect(trailer == struct.pack("<II8s", length, 1, b"DBMPKEND"), "trailer")
        found, offset, at = [], 32, 48 + 44 * frames
        for number in range(frames):
            stored, raw, encoding, pages, zero, digest = struct.unpack_from(
                "<IIBBH32s", data, 48 + 44 * number
            )
            expect(zero == 0 and pages in (0, -(-raw // PAGE)), "frame entry")
            slots = [data[i : i + 16] for i in range(at, at + 16 * pages, 16)]
            found.append((offset, stored, raw, encoding, digest, slots))
            offset, at = offset + stored, at + 16 * pages
        expect(offset == body_length and at == length, "frames fill the body")
        self.footers[pack] = found
        return found

    def frame(self, ref: tuple[str, int, int], number: int) -> bytes:
        husk = self.husk(ref[0])
        if husk is not None:
            return self.moved_frame(husk, ref[0], number)
        offset, stored, length, encoding, digest, slots = self.footer(*ref)[number]
        data = self.read(ref[0], offset, stored)
        expect(encoding in (0, 1), "encoding")
        raw = data if encoding == 0 else zstandard.decompress(data, max_output_size=length)
        expect(len(raw) == length and self.hash(raw) == digest, "hash of the frame")
        for slot, expected in enumerate(slots):
            part = raw[slot * PAGE : (slot + 1) * PAGE]
            expect(self.hash(part)[:16] == expected, "hash of a page")
        return raw

    # -- manifests and chains [8] ---------------------------------------------------------------

    def chain(self, backup: str) -> list[Backup]:
        found: list[Backup] = []
        wanted: str | None = backup
        expected: str | None = None
        while wanted is not None:
            name = f"manifests/{self.cluster}/{wanted}.json"
            manifest, digest = self.document(name)
            expect(manifest["backup_id"] == wanted, name)
            expect(expected in (None, digest), f"{name} is not the baseline that was built on")
            found.append(Backup(self, manifest))
            wanted, expected = manifest["baseline_id"], manifest["baseline_hash"]
        expect(found[-1].manifest["type"] == "full", "the chain begins with a full")
        return found[::-1]

    # -- restoring a file [10] ------------------------------------------------------------------

    def restore(self, chain: list[Backup], path: str) -> bytes:
        layers: list[tuple[Backup, Row]] = []
        for backup in reversed(chain):
            row = backup.files[path]
            if row.flags & UNCHANGED:
                expect(bool(row.flags & OVERLAY) and row.extents == row.prints == 0, "UNCHANGED")
                continue
            layers.insert(0, (backup, row))
            if not row.flags & OVERLAY:
                break
        else:
            raise FormatError(f"{path} has no beginning")
        kinds = {row.kind for _, row in layers}
        expect(kinds == {chain[-1].files[path].kind}, "an overlay has its baseline's kind")
        blocks: list[tuple[tuple[str, int, int], int, int] | None] = []
        prints: list[tuple[Any, ...] | None] = []
        for backup, row in layers:
            count = -(-row.size // PAGE)
            unnamed: Any = ("unnamed",)
            blocks = blocks[:count] + [unnamed] * (count - len(blocks))
            prints = prints[:count] + [None] * (count - len(prints))
            table = "marks" if row.kind == RELATION else "hashes"
            fresh = iter(backup.rows(table, row.first_print, row.prints))
            last = -1
            for block, run, pack, frame, slot in backup.rows(
                "extents", row.first_extent, row.extents
            ):
                expect(block > last and block + run <= count, "extents ascend within the file")
                last = block + run - 1
                for i in range(run):
                    blocks[block + i] = (
                        None if frame == ZERO else (backup.packs[pack], frame, slot + i)
                    )
                    if not row.flags & WAL:
                        prints[block + i] = next(fresh)
            expect(next(fresh, None) is None, "one fingerprint per block")
            expect(unnamed not in blocks, f"{path} has a block without bytes")
        size = chain[-1].files[path].size
        out = bytearray(size)
        for number, place in enumerate(blocks):
            length = min(PAGE, size - PAGE * number)
            if place is not None:
                ref, frame, slot = place
                data = self.cached(ref, frame)[slot * PAGE : (slot + 1) * PAGE]
                expect(len(data) == length, "a slot has the length of its block")
                out[number * PAGE : number * PAGE + length] = data
            self.check_print(
                chain[-1].files[path], prints[number], bytes(out[number * PAGE :][:length])
            )
        return bytes(out)

    def check_print(self, row: Row, value: tuple[Any, ...] | None, data: bytes) -> None:
        """Fingerprints [7] are those of the bytes."""
        if row.flags & WAL:
            return
        expect(value is not None, "every block has a fingerprint")
        if row.kind == CONTENT:
            expect(value == (self.hash(data)[:16],), "hash of a block")
        else:
            high, low, checksum, flags = struct.unpack_from("<IIHH", data)
            expect(value == (high << 32 | low, checksum ^ flags & 4), "mark of a page")

    def cached(self, ref: tuple[str, int, int], frame: int) -> bytes:
        if getattr(self, "_last", None) != (ref, frame):
            self._last, self._raw = (ref, frame), self.frame(ref, frame)
        return self._raw

    # -- the content index [9] ------------------------------------------------------------------

    def check_segment(self, name: str) -> int:
        """Every entry leads to the frame or page with its hash; gives their number."""
        data = self.object(f"index/{name}")
        expect(
            self.hash(data[:-32]) == data[-32:] and data[-32:].hex() == name, "hash of the index"
        )
        magic, version, packs, entries, first, last, replaced, zero, table = struct.unpack_from(
            "<8sIIQIIII16s", data
        )
        expect(magic == b"DBMINDX2" and version == 1 and zero == 0, "header of the index")
        blocks = -(-entries // 256)
        directory = struct.unpack_from(f"<{blocks}I", data, 56)
        at = 56 + 4 * blocks + 16 * replaced
        expect(data[at : at + 16] == self.hash(data[:at])[:16], "hash of the head")
        at += 16
        expect(table == self.hash(data[at : at + 44 * packs])[:16], "hash of the pack table")
        refs = []
        for number in range(packs):
            identity, size, length = struct.unpack_from("<32sQI", data, at + 44 * number)
            refs.append((identity.hex(), size, length))
        at += 44 * packs
        expect(len(data) == at + 24 * entries + 32 and entries > 0, "length of the index")
        listed = [struct.unpack_from("<16sII", data, at + 24 * n) for n in range(entries)]
        order = [(digest, place & 255 == 255) for digest, _, place in listed]
        expect(order == sorted(set(order)), "order of the index")
        prefixes = [int.from_bytes(digest[:4], "big") for digest, _, _ in listed]
        expect(first <= prefixes[0] and prefixes[-1] <= last, "range of the segment")
        expect(list(directory) == prefixes[::256], "directory")
        for digest, pack, place in listed:
            _, _, _, _, whole, slots = self.footer(*refs[pack])[place >> 8]
            expect(digest == (whole[:16] if place & 255 == 255 else slots[place & 255]), "entry")
        everything = {
            (digest, kind)
            for ref in refs
            for frame in self.footer(*ref)
            for digest, kind in [(frame[4][:16], True), *((slot, False) for slot in frame[5])]
            if first <= int.from_bytes(digest[:4], "big") <= last
        }
        expect(set(order) == everything, "complete")
        return int(entries)


class Backup:
    """A manifest and its tables [5]."""

    def __init__(self, reader: Reader, manifest: dict[str, Any]) -> None:
        self.reader, self.manifest = reader, manifest
        root = manifest["root"]
        body = json.loads(reader.frame((root["pack"], root["size"], root["footer"]), 0))
        expect(body["format"] == 1, "version of the root frame")
        self.packs: list[tuple[str, int, int]] = [tuple(ref) for ref in body["packs"]]
        self.tables = body["tables"]
        expect(set(self.tables) - {"relations"} == {"files", *COLUMNS}, "tables")
        self.groups: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
        self.files: dict[str, Row] = {}
        for number in range(len(self.tables["files"]["groups"])):
            for row in self.file_group(number):
                expect(row.path not in self.files, f"{row.path} occurs twice")
                self.files[row.path] = row
        expect(len(self.files) == self.tables["files"]["rows"], "rows of the file table")

    def group(self, table: str, number: int) -> tuple[bytes, int]:
        described = self.tables[table]
        pack, frame = described["groups"][number]
        count = min(described["group_rows"], described["rows"] - number * described["group_rows"])
        return self.reader.frame(self.packs[pack], frame), count

    @staticmethod
    def columns(data: bytes, types: Any, count: int) -> tuple[list[tuple[Any, ...]], int]:
        offset, columns = 0, []
        for kind in types:
            form = struct.Struct("<" + kind)
            columns.append([v for (v,) in form.iter_unpack(data[offset:][: form.size * count])])
            offset += form.size * count
        return list(zip(*columns, strict=True)), offset

    def file_group(self, number: int) -> list[Row]:
        data, count = self.group("files", number)
        rows, at = self.columns(data, FILE_COLUMNS, count)
        lengths = struct.unpack_from(f"<{2 * count}I", data, at)
        ends = list(itertools.accumulate(lengths, initial=at + 8 * count))
        expect(ends[-1] == len(data), "text part")
        texts = [
            data[start:end].decode("utf-8", "surrogateescape")
            for start, end in itertools.pairwise(ends)
        ]
        return [Row(texts[i], texts[count + i], *rows[i]) for i in range(count)]

    def relations(self) -> list[list[Any]]:
        found: list[list[Any]] = []
        for number in range(len(self.tables["relations"]["groups"])):
            data, count = self.group("relations", number)
            rows = json.loads(data)
            expect(len(rows) == count, "rows of a group of relations")
            found += rows
        expect(len(found) == self.tables["relations"]["rows"], "rows of relations")
        return found

    def rows(self, table: str, first: int, count: int) -> list[tuple[Any, ...]]:
        size = self.tables[table]["group_rows"]
        out: list[tuple[Any, ...]] = []
        while count:
            number, start = divmod(first, size)
            if (table, number) not in self.groups:
                data, length = self.group(table, number)
                found, at = self.columns(data, COLUMNS[table], length)
                expect(at == len(data), f"length of a group of {table}")
                self.groups[table, number] = found
            part = self.groups[table, number][start : start + count]
            expect(bool(part), f"rows of {table}")
            out += part
            first, count = first + len(part), count - len(part)
        return out


# -- the test -----------------------------------------------------------------------------------


def test_a_reader_written_from_the_page_restores_every_file(
    long_chain: tuple[Path, list[str]], library_restore: Path
) -> None:
    repository, backups = long_chain
    reader = Reader(repository, "main")
    chain = reader.chain(backups[-1])
    assert [backup.manifest["backup_id"] for backup in chain] == backups
    kinds = {RELATION: 0, CONTENT: 0, DIRECTORY: 0, SYMLINK: 0}
    for path, row in chain[-1].files.items():
        kinds[row.kind] += 1
        place = library_restore / path
        if row.kind == SYMLINK:
            assert place.is_symlink()
            assert chain[-1].manifest["tablespaces"][path.rpartition("/")[2]] == row.target
        elif row.kind == DIRECTORY:
            assert place.stat().st_mode & 0o7777 == row.mode
        else:
            expected = place.read_bytes()
            if path == "postgresql.auto.conf":  # the restore appends its settings
                expected = expected[: row.size]
            assert reader.restore(chain, path) == expected, path
            assert place.stat().st_mode & 0o7777 == row.mode
    assert min(kinds.values()) > 0
    flags = [row.flags for backup in chain for row in backup.files.values()]
    assert any(f & OVERLAY and not f & UNCHANGED for f in flags)
    assert any(f & UNCHANGED for f in flags)
    assert any(f & WAL for f in flags)
    made_by_the_restore = {"backup_label", "backup_manifest", "recovery.signal"}
    restored = _files(library_restore)
    assert restored - made_by_the_restore == {
        path for path, row in chain[-1].files.items() if row.kind in (RELATION, CONTENT)
    }
    label = chain[-1].manifest["backup_label"]
    assert (library_restore / "backup_label").read_text() == label


def _files(root: Path) -> set[str]:
    """Regular files below `root`, through the links of tablespaces."""
    found: set[str] = set()
    for entry in root.iterdir():
        name = entry.relative_to(root)
        if entry.is_dir():
            found.update(str(name / below) for below in _files(entry))
        else:
            found.add(str(name))
    return found


def test_the_table_of_relations_agrees_with_the_file_table(
    long_chain: tuple[Path, list[str]],
) -> None:
    repository, backups = long_chain
    for backup in Reader(repository, "main").chain(backups[-1]):
        pages: Counter[tuple[str, int, str]] = Counter()
        for row in backup.files.values():
            match = re.fullmatch(r"(.*)/(\d+)(?:_(fsm|vm|init))?(?:\.\d+)?", row.path)
            if match and match[1].startswith(("global", "base/", "pg_tblspc/")) and row.prints:
                pages[match[1], int(match[2]), match[3] or "main"] += row.prints
        told = backup.relations()
        assert Counter((r[2], r[3], r[4]) for r in told) == Counter(
            (number, fork, count) for (_, number, fork), count in pages.items()
        )
        assert [r[4] for r in told] == sorted((r[4] for r in told), reverse=True)
        assert any(r[5:] == ["postgres", *["pg_catalog.pg_class"] * 2] for r in told)


def test_every_index_entry_is_what_the_page_says(long_chain: tuple[Path, list[str]]) -> None:
    repository, backups = long_chain
    segments = list((repository / "index").iterdir())
    assert 1 <= len(segments) < len(backups)  # they are merged
    reader = Reader(repository, "main")
    assert sum(reader.check_segment(segment.name) for segment in segments) > 0


def test_frames_that_were_moved_are_found_by_husks(
    long_chain: tuple[Path, list[str]], moved_chain: Path
) -> None:
    repository, backups = long_chain
    before = Reader(repository, "main").chain(backups[-1])
    after = Reader(moved_chain, "main").chain(backups[-1])
    for backup in after:
        assert not any((moved_chain / "packs" / p[:2] / p).exists() for p, _, _ in backup.packs)
    paths = [p for p, row in after[-1].files.items() if row.kind in (RELATION, CONTENT)]
    for path in paths[::10]:
        found = after[0].reader.restore(after, path)
        assert found == before[0].reader.restore(before, path)


def test_an_encrypted_repository_is_read_from_the_page(
    encrypted_chain: tuple[Path, list[str], str], encrypted_restore: Path
) -> None:
    repository, backups, master_key = encrypted_chain
    reader = Reader(repository, "main", master_key)
    assert reader.vault is not None
    assert (reader.key_info["kind"], reader.key_info["label"]) == ("key", "")
    chain = reader.chain(backups[-1])
    assert [backup.manifest["backup_id"] for backup in chain] == backups
    for path, row in chain[-1].files.items():
        if row.kind in (RELATION, CONTENT):
            expected = (encrypted_restore / path).read_bytes()
            if path == "postgresql.auto.conf":  # the restore appends its settings
                expected = expected[: row.size]
            assert reader.restore(chain, path) == expected, path
    for folder in ("index", "clusters", "manifests", "manifests/main"):
        stored = Path(repository, reader.vault.stored_name(folder))
        for entry in stored.iterdir():
            name = reader.vault.plain_part(folder, entry.name)
            if folder == "index":
                assert reader.check_segment(name) > 0
            elif name != "main":
                assert reader.document(f"{folder}/{name}")[0]["format"] == 1
    with pytest.raises(FileNotFoundError):
        Reader(repository, "main", "ab" * 32)


@pytest.mark.parametrize("name", ["repository.json", "manifest"])
def test_an_unknown_version_is_refused(
    long_chain: tuple[Path, list[str]], tmp_path: Path, name: str
) -> None:
    repository, backups = long_chain
    copy = tmp_path / "repository"
    copy.mkdir()
    reader = Reader(repository, "main")
    for source in ("repository.json", f"manifests/main/{backups[0]}.json"):
        line = (repository / source).read_bytes().split(b"\n")[0]
        key = None if source == "repository.json" else reader.key
        if (name in source) or (name == "manifest" and source.startswith("manifests")):
            line = line.replace(b'"format":1', b'"format":2')
        digest = (blake3(line) if key is None else blake3(line, key=key)).hexdigest()
        (copy / source).parent.mkdir(parents=True, exist_ok=True)
        (copy / source).write_bytes(line + b"\n" + digest.encode() + b"\n")
    with pytest.raises(FormatError, match="version"):
        Reader(copy, "main").chain(backups[0])
