"""The walk of a tar's headers: what Python's tarfile finds, and an end to everything that would keep it for ever."""

import io
import itertools
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fasttrain.formats.tar_headers import MAX_EXTENDED, TarDamage, _usual, tar_headers

KINDS = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)


def walk(path: Path) -> list[tuple[str, int, int, bytes]]:
    with open(path, "rb") as file:
        return [(member.name, member.offset_data, member.size, member.type) for member in tar_headers(file)]


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, raw_size: bytes | None = None) -> bytes:
    """One block; raw_size: the field of 12 bytes as it stands."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    if raw_size is not None:
        block[124:136] = raw_size
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    content = b"".join(records)
    return header("pax", len(content), kind) + padded(content)


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = next(n for n in range(rest, rest + 12) if n == rest + len(str(n)))
    return b"%d %s=%s\n" % (length, key, value)


PICTURE = header("a/1.jpg", 700) + padded(b"x" * 700)
END = bytes(1024)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_tarfile_finds(tmp_path: Path, format: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    with tarfile.open(tmp_path / "a.tar", "w", format=format, pax_headers={"comment": "of all"}) as tar:
        for number in range(40):
            longest = 6 if format == tarfile.USTAR_FORMAT else 40
            folders = ["näme" * int(generator.integers(1, 4)) for _ in range(generator.integers(0, longest))]
            member = tarfile.TarInfo("/".join([*folders, f"{number}.jpg"]))
            member.type = KINDS[generator.integers(len(KINDS))]
            member.linkname = "ziel/" * int(generator.integers(1, 19 if format == tarfile.USTAR_FORMAT else 80))
            member.size = int(generator.integers(0, 3000)) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(member.name, member.offset_data, member.size, member.type) for member in tar]
    assert walk(tmp_path / "a.tar") == expected
    assert len(expected) == 40


@pytest.mark.parametrize("records", [
    (record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.minor", b"0"), record(b"GNU.sparse.name", b"a/2.jpg")),
    (record(b"GNU.sparse.map", b"0,junk"), record(b"path", b"a/2.jpg")),
])  # fmt: skip
def test_a_sparse_file_is_told_by_its_records(tmp_path: Path, records: tuple[bytes, ...]) -> None:
    (tmp_path / "a.tar").write_bytes(pax(*records) + PICTURE + PICTURE + END)
    (name, _, _, kind), last = walk(tmp_path / "a.tar")
    assert (name, kind) == ("a/2.jpg", tarfile.GNUTYPE_SPARSE)
    assert last == ("a/1.jpg", 3072, 700, tarfile.REGTYPE)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_old_file_is_no_folder_for_its_name_being_cut_behind_one(tmp_path: Path, format: int) -> None:
    member = tarfile.TarInfo("x" * 99 + "/ä/1.jpg")  # the header itself holds 100 bytes
    member.type, member.size = tarfile.AREGTYPE, 700
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.addfile(member, io.BytesIO(bytes(700)))
        tar.addfile(tarfile.TarInfo("last"))
    assert [(name, kind) for name, _, _, kind in walk(tmp_path / "a.tar")] == [
        (member.name, tarfile.AREGTYPE),
        ("last", tarfile.REGTYPE),
    ]


def test_an_old_sparse_file_has_further_blocks_before_its_data(tmp_path: Path) -> None:
    block = bytearray(header("a/2.jpg", 700, tarfile.GNUTYPE_SPARSE))
    block[482] = 1
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    more, last = bytearray(512), bytes(512)
    more[504] = 1
    (tmp_path / "a.tar").write_bytes(bytes(block + more) + last + padded(b"x" * 700) + PICTURE + END)
    assert [(name, start) for name, start, _, _ in walk(tmp_path / "a.tar")] == [("a/2.jpg", 1536), ("a/1.jpg", 3072)]


def test_a_long_name_of_many_headers_is_no_recursion(tmp_path: Path) -> None:
    names = b"".join(header("long", 8, kind) + padded(b"a/2.jpg\0") for kind in 3000 * (b"L", b"K"))
    records = 5000 * pax(record(b"path", b"a/3.jpg"))
    (tmp_path / "a.tar").write_bytes(names + PICTURE + records + PICTURE + END)
    assert [name for name, *_ in walk(tmp_path / "a.tar")] == ["a/2.jpg", "a/3.jpg"]


def test_records_that_nobody_reads_are_not_kept(tmp_path: Path) -> None:
    """Header after header of them could fill the memory before a member comes."""
    names = (b"%sk%06d" % (prefix, i) for i in range(10_000) for prefix in (b"", b"GNU.sparse."))
    headers = b"".join(pax(*(record(name, b"") for name in itertools.islice(names, 1000))) for _ in range(20))
    (tmp_path / "a.tar").write_bytes(headers + PICTURE + PICTURE + END)
    with open(tmp_path / "a.tar", "rb") as file:
        tracemalloc.start()
        found = [member.type for member in tar_headers(file)]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found == [tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE]
    assert most < 10 * len(headers) / 20


NEGATIVE = b"\xff" * 10 + b"\xfc\x00"  # in base 256: -1024, by which a walk comes back to this header


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (header("a/2.jpg", raw_size=NEGATIVE), "negative size"),
        (header("a/2.jpg", raw_size=b"\xff" * 12), "negative size"),
        (header("pax", 0, tarfile.XHDTYPE, NEGATIVE), "negative size"),
        (header("long", 0, b"L", NEGATIVE), "negative size"),
        (header("long", 0, b"L", b"\x80" + b"\0" * 6 + b"\x7f" + b"\0" * 4), "extended header of"),
        (header("pax", MAX_EXTENDED + 1, tarfile.XHDTYPE), "extended header of"),
        (header("pax", 5000, tarfile.XHDTYPE), "truncated"),
        (header("all", 0, tarfile.XGLTYPE, b"\x80" + b"\0" * 6 + b"\x7f" + b"\0" * 4), "truncated"),
        (header("a/2.jpg", raw_size=b"\x80" + b"\0" * 6 + b"\x7f" + b"\0" * 4), "truncated"),
        (header("a/2.jpg", raw_size=b"99999999999\0"), "damaged archive: .*what follows is lost"),
        (pax(record(b"size", b"-1024")) + PICTURE, "a size that is no number"),
        (pax(record(b"size", b"9" * 5000)) + PICTURE, "a size that is no number"),
        (pax(b"0 path=a\n") + PICTURE, "a pax header without records"),
        (pax(b"9999 path=a\n") + PICTURE, "a pax header without records"),
        (pax(b"junk") + PICTURE, "a pax header without records"),
        (pax(b"7 path=a\n") + PICTURE, "a pax header without records"),
        (b"junk" * 128, "damaged archive"),
        (b"", "no end mark"),
        (PICTURE[:1000], "no end mark"),
        (PICTURE[:200], "no end mark"),
    ],
)
def test_the_walk_ends_where_a_header_leads_nowhere(tmp_path: Path, damage: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(PICTURE + damage + (END if len(damage) >= 512 and len(damage) % 512 == 0 else b""))
    found = []
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(TarDamage, match=message) as error:
        found.extend(tar_headers(file))
    assert found[0].name == "a/1.jpg"
    assert error.value.at >= len(PICTURE)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("checked", [True, False])
def test_a_header_of_the_usual_kind_is_read_as_tarfile_reads_it(format: int, checked: bool) -> None:
    """Bytes of sound headers are replaced; checked: the checksum is made right again."""
    rng, usual = np.random.default_rng(format), 0
    for case in range(3000):
        member = tarfile.TarInfo(rng.choice(["a.jpg", "ä" * 50, "b" * 100, "c/" * 70 + "d.cls", "e/"]))
        member.size, member.mtime = int(rng.integers(0, 1 << 33)), int(rng.integers(0, 1 << 33))
        block = bytearray(member.tobuf(format, "utf-8", "surrogateescape")[-512:])
        places = (0, 99, 123, 124, 129, 135, 136, 147, 148, 153, 154, 155, 156, 345, 346, 500)
        for _ in range(case % 3):
            block[rng.choice(places)] = rng.choice([0, 32, 48, 49, 55, 56, 95, 128, 255])
        if checked:
            block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
        if (found := _usual(bytes(block))) is not None:
            usual += 1
            block[100:124], block[136:148] = b"0000000\0" * 3, bytes(12)  # nobody reads mode, owner and time
            block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
            wanted = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
            assert (found.name, found.size, found.type) == (wanted.name, wanted.size, wanted.type)
    assert usual > 500
