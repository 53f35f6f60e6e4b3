"""Pickles of arrays, read by opcodes: those of every protocol and of Python 2, and nothing that arrays do not need."""

import pickle
import struct

import numpy as np
import pytest

from fasttrain.dataprep.sources.pickled import unpickled
from fasttrain.formats.listing import SourceError

ROWS = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
DTYPE = b"cnumpy\ndtype\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"


def string(content: bytes) -> bytes:
    """As Python 2 pickles its `str` by protocol 2."""
    return (
        b"U%c%s" % (len(content), content) if len(content) < 256 else b"T" + struct.pack("<i", len(content)) + content
    )


def of_python_2(array: np.ndarray, kind: bytes) -> bytes:
    """An array as cPickle of Python 2 writes it by protocol 2: no Python 3 can."""
    sides = b"".join(b"M" + struct.pack("<H", side) for side in array.shape)
    made = ARRAY + b"q\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07"
    shape = b"(" + sides + b"tq\x08"
    dtype = (
        DTYPE
        + b"q\x09"
        + string(kind)
        + b"q\x0aK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\x0dNNN"
        + 2 * (b"J\xff\xff\xff\xff")
        + b"K\x00tq\x0eb"
    )
    return made + b"(K\x01" + shape + dtype + b"\x89" + string(array.tobytes()) + b"q\x0ftq\x10b"


def dictionary(content: bytes, key: bytes = b"data") -> bytes:
    return b"\x80\x02}q\x01(" + string(key) + content + b"u."


def test_an_array_as_python_2_wrote_it() -> None:
    labels = b"U\x06labelsq\x11]q\x12(K\x03K\x05e"
    content = dictionary(of_python_2(ROWS, b"u1") + labels + b"U\x0bbatch_labelq\x13U\x15training batch 1 of 5q\x14")
    found = unpickled(content)
    assert pickle.loads(content, encoding="bytes").keys() == found.keys()
    np.testing.assert_array_equal(found[b"data"], ROWS)
    assert found[b"labels"] == [3, 5]
    assert found[b"batch_label"] == b"training batch 1 of 5"


def test_text_as_python_2_wrote_it() -> None:
    meta = b"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp4\nS'airplane'\np5\naS'a\\xffb'\np6\nas."
    assert unpickled(meta) == {b"num_cases_per_batch": 10000, b"label_names": [b"airplane", b"a\xffb"]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("keys", [str, str.encode])
def test_what_python_3_pickles(protocol: int, keys: type) -> None:
    arrays = {
        "rows": ROWS,
        "empty": ROWS[:0],
        "columns": np.asfortranarray(ROWS),
        "numbers": np.arange(5, dtype=">i2"),
        "read only": np.frombuffer(b"abc", np.uint8),
    }
    others = {
        "numbers": [0, -1, 300, 1 << 40, True, None, 0.5],
        "names": ["ä", b"b", ""],
        "nested": {"a": ((1, 2, 3, 4),)},
    }
    content = {keys(name): value for name, value in {**arrays, **{f"other {k}": v for k, v in others.items()}}.items()}
    found = unpickled(pickle.dumps(content, protocol))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[keys(name)], array)
        assert found[keys(name)].dtype == array.dtype
    assert [found[keys(f"other {name}")] for name in others] == list(others.values())


POINTER = b"(K\x03U\x01|N(U\x01xq\x20t}U\x01xU\x01OK\x00\x86sK\x08K\x01K\x1ftb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # A data type with fields of objects would make pointers of the bytes that follow.
        (DTYPE + b"U\x02V8K\x00K\x01\x87R" + POINTER, "other than plain numbers"),
        (DTYPE + b"U\x02u8K\x00K\x01\x87R" + POINTER, "an array with fields"),
        (DTYPE + b"U\x01OK\x00K\x01\x87R", "other than plain numbers"),
        (DTYPE + b"U\x05u8,u8\x85R", "other than plain numbers"),
        (b"]" + b"(K\x01K\x05\x85tb", "changes what is no array"),
        (ARRAY + b")R(K\x01M\xff\xff\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x02abtb", "another size than its bytes"),
        (ARRAY + b")R(K\x01J\xff\xff\xff\xff\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x02abtb", "a shape that is none"),
        (ARRAY + b")R(K\x01K\x02\x85U\x02u1\x89U\x02abtb", "an array that is none"),
        (b"cposix\nsystem\nU\x04evil\x85R", "posix.system, which no array needs"),
        (b"cnumpy\nndarray\nM\xff\xff\x85R", "calls what no array needs"),
        (b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R", "calls bytes"),
        (b"K\x01K\x02\x85R", "calls what no array needs"),
        (b"(iposix\nsystem\n", "opcode b'i'"),
        (b"(cposix\nsystem\no", "posix.system"),
        (b"cnumpy\ndtype\n)\x81", r"opcode b'\\x81'"),
        (b"\x82\x01", r"opcode b'\\x82'"),
        (b"Pname\n", "opcode b'P'"),
        (b"NQ", "opcode b'Q'"),
        (b"\x97", r"opcode b'\\x97'"),
        (b"\x8b\x00\x00\x00\x7f", "damaged pickle|opcode"),
        (b"\x8a\xff" + bytes(255), "a number of 255 bytes"),
        (b"I" + 5000 * b"9" + b"\n", "damaged pickle"),
        (b"}" + 200 * b"\x85" + b"Ns", "a dictionary whose keys are no names"),
        (b"}" + b"N\x85" + 40 * b"q\x00h\x00\x86" + b"Ns", "a dictionary whose keys are no names"),
        (20_000 * b"]", "more steps than arrays need"),
        (b"\x8e" + struct.pack("<Q", 1 << 60) + b"ab", "damaged pickle"),
        (b"\x96" + struct.pack("<Q", 1 << 60) + b"ab", "damaged pickle"),
        (b"\x95" + struct.pack("<Q", 1 << 60) + b"e", "damaged pickle|appends"),
        (b"", "damaged pickle"),
    ],
)
def test_what_no_array_needs_is_not_done(content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        unpickled(dictionary(content))


def test_a_memo_of_any_number_takes_no_memory() -> None:
    assert unpickled(dictionary(b"Nr\xff\xff\xff\xff")) == {b"data": None}
    with pytest.raises(SourceError, match="damaged pickle: KeyError"):
        unpickled(dictionary(b"j\xff\xff\xff\xff"))


@pytest.mark.parametrize("content", [b"", b"]", b"\x80\x02].", b"}", b".", dictionary(b"N")[:-1]])
def test_what_is_no_dictionary_is_refused(content: bytes) -> None:
    with pytest.raises(SourceError, match=r"no dictionary|damaged pickle"):
        unpickled(content)
