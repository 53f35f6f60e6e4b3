"""Pickled arrays, lists and text, read without Python's pickle: nothing that a pickle names is ever called.

Its opcodes run here, on lists, dictionaries, text and numbers; what it calls is looked up among a few functions of this
file. Arrays are views of the bytes that it holds, and of plain numbers alone. So memory and time are a small multiple
of its size.
"""

from __future__ import annotations

import codecs
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from fasttrain.formats.listing import SourceError

_FREE_STEPS, _BYTES_A_STEP = 10_000, 32  # a pickle of images has hundreds of bytes for each of its opcodes
_LONGEST_NUMBER = 24  # characters of one that is written as text
_LARGEST_NUMBER = 16  # bytes
_MOST_SIDES = 8
_PLAIN_TYPE = re.compile(r"b1|[iu][1248]|f[248]")
_READERS = {opcode.code.encode("latin-1"): opcode.arg and opcode.arg.reader for opcode in pickletools.opcodes}


class _Type:
    """A data type, which the pickle may give a byte order later."""

    def __init__(self, name: object, *_: object) -> None:
        if not (isinstance(name, str | bytes) and _PLAIN_TYPE.fullmatch(_text(name))):
            raise SourceError("the pickle holds an array of other than plain numbers: not loaded")
        self.dtype = np.dtype(_text(name))

    def fill(self, state: object) -> None:
        """Take the byte order out of a pickled state, which says nothing else of a plain type."""
        if not (isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)):
            raise SourceError("the pickle holds an array with fields: not loaded")
        orders: dict[str, Literal["<", ">", "=", "|"]] = {"<": "<", ">": ">", "=": "=", "|": "|"}
        self.dtype = self.dtype.newbyteorder(orders[_text(state[1])])


class _Array:
    """An array, which the pickle fills later."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray | None = None

    def fill(self, state: object) -> None:
        """Take type, shape and content from a pickled state."""
        if not (isinstance(state, tuple) and len(state) == 5):
            raise SourceError("the pickle fills an array with what is none: not loaded")
        _, shape, kind, fortran, content = state
        self.values = _array(content, kind, shape, "F" if fortran else "C")


def _array(content: Any, kind: Any, shape: Any, order: Any = "C", *_: object) -> np.ndarray:  # noqa: ANN401
    """Return a view of bytes; SourceError where they, type and shape do not agree, or are none at all."""
    if not (
        isinstance(content, bytes) and isinstance(kind, _Type) and isinstance(shape, tuple) and order in ("C", "F")
    ):
        raise SourceError("the pickle holds an array that is none: not loaded")
    if len(shape) > _MOST_SIDES or any(type(side) is not int or side < 0 for side in shape):
        raise SourceError("the pickle holds an array of a shape that is none: not loaded")
    if math.prod(shape) * kind.dtype.itemsize != len(content):
        raise SourceError("the pickle holds an array of another size than its bytes: not loaded")
    flat = np.frombuffer(content, kind.dtype) if content else np.empty(0, kind.dtype)
    return flat.reshape(shape, order=order)


def _scalar(kind: object, content: object) -> int | float | bool:
    if not isinstance(kind, _Type) or not isinstance(content, bytes):
        raise SourceError("the pickle holds a number that is none: not loaded")
    if len(content) != kind.dtype.itemsize:
        raise SourceError(f"the pickle holds a number of {len(content)} bytes: not loaded")
    return np.frombuffer(content, kind.dtype)[0].item()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


class _Function(NamedTuple):
    """What a pickle names; call is None where it is but an argument."""

    call: Callable[..., Any] | None


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): None,
    # Which of the places a function lies in depends on NumPy's version.
    **{(f"numpy.{core}.{part}", name): call for core in ("core", "_core") for part in ("multiarray", "numeric")
       for name, call in (("_reconstruct", _Array), ("scalar", _scalar), ("_frombuffer", _array))},
    **{(module, "bytes"): bytes for module in ("builtins", "__builtin__")},  # see _call
}  # fmt: skip


class _Machine:
    """Runs the opcodes of one pickle."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._encoded_left = len(content)
        self._steps_left = _FREE_STEPS + len(content) // _BYTES_A_STEP

    def run(self) -> object:
        while (code := self._file.read(1)) != pickle.STOP:
            self._steps_left -= 1
            if self._steps_left < 0:
                raise SourceError("the pickle takes more steps than arrays need: not loaded")
            if code in _VALUES:
                self._stack.append(_VALUES[code](self._argument(code)))
            elif code in _STEPS:
                _STEPS[code](self, self._argument(code))
            else:
                uses = f"the pickle uses opcode {code!r}, which no array needs: not loaded"
                raise SourceError(uses if code else "damaged pickle: it has no end")
        return self._stack.pop()

    def _argument(self, code: bytes) -> Any:  # noqa: ANN401 - numbers, text and bytes
        """Read what follows an opcode. Numbers are read here, as long ones take pickletools for ever."""
        if code in (pickle.INT, pickle.LONG, pickle.GET, pickle.PUT):
            line = self._file.readline(_LONGEST_NUMBER)
            if not line.endswith(b"\n"):
                raise ValueError("a number without end")
            return line == b"01\n" if line in (b"00\n", b"01\n") else int(line.rstrip(b"\nL"))
        if code == pickle.STRING:  # it may hold any bytes, which pickletools does not take
            return codecs.escape_decode(self._file.readline().rstrip(b"\r\n")[1:-1])[0]
        if code == pickle.LONG1:
            size = self._file.read(1)[0]
            if size > _LARGEST_NUMBER:
                raise SourceError(f"the pickle holds a number of {size} bytes: not loaded")
            return pickle.decode_long(self._file.read(size))
        reader = _READERS.get(code)
        return reader(self._file) if reader else None

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _above_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _pop(self, count: int) -> list[Any]:
        """Take the upper items, in their order; IndexError where there are fewer."""
        return [self._stack.pop() for _ in range(count)][::-1]

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise SourceError("the pickle appends to what is no list: not loaded")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        # The hash of a tuple of tuples, each of them shared, takes for ever.
        if type(self._stack[-1]) is not dict or any(type(key) not in (str, bytes) for key in items[::2]):
            raise SourceError("the pickle holds a dictionary whose keys are no names: not loaded")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _dictionary(self, _: None) -> None:
        items = self._above_mark()
        self._stack.append({})
        self._set(items)

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _find(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise SourceError("the pickle names a function by what is no text: not loaded")
        if (module, name) == ("_codecs", "encode"):
            self._stack.append(_Function(self._encode))
        elif (module, name) in _FUNCTIONS:
            self._stack.append(_Function(_FUNCTIONS[module, name]))
        else:
            raise SourceError(f"the pickle names {module}.{name}, which no array needs: not loaded")

    def _encode(self, text: object, codec: object) -> bytes:
        """Encode text that stands for bytes: in all no more than the pickle holds, as it may ask again and again."""
        if codec not in ("latin1", b"latin1") or not isinstance(text, str):
            raise SourceError("the pickle encodes by another codec than latin1, which no array needs: not loaded")
        self._encoded_left -= len(text)
        if self._encoded_left < 0:
            raise SourceError("the pickle unpacks to much more than its size: not loaded")
        return text.encode("latin-1")

    def _call(self, _: None) -> None:
        function, arguments = self._pop(2)
        if not (isinstance(function, _Function) and function.call and type(arguments) is tuple):
            raise SourceError("the pickle calls what no array needs: not loaded")
        if function.call is bytes and arguments:  # no bytes are a call without arguments; with a number, it is a bomb
            raise SourceError("the pickle calls bytes, which no array needs: not loaded")
        self._stack.append(function.call(*arguments))

    def _build(self, _: None) -> None:
        (state,) = self._pop(1)
        if not isinstance(self._stack[-1], _Type | _Array):
            raise SourceError("the pickle changes what is no array: not loaded")
        self._stack[-1].fill(state)


def _itself(argument: Any) -> Any:  # noqa: ANN401 - numbers, text and bytes
    return argument


_VALUES: dict[bytes, Callable[[Any], Any]] = {
    **dict.fromkeys((pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1), _itself),
    **dict.fromkeys((pickle.FLOAT, pickle.BINFLOAT), _itself),
    **dict.fromkeys((pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8), _itself),
    **dict.fromkeys((pickle.STRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8), _itself),
    # Text of Python 2 is bytes here, whatever it holds.
    **dict.fromkeys((pickle.BINSTRING, pickle.SHORT_BINSTRING), lambda text: text.encode("latin-1")),
    pickle.BYTEARRAY8: bytes,
    pickle.NONE: lambda _: None,
    pickle.NEWTRUE: lambda _: True,
    pickle.NEWFALSE: lambda _: False,
    pickle.EMPTY_TUPLE: lambda _: (),
    pickle.EMPTY_LIST: lambda _: [],
    pickle.EMPTY_DICT: lambda _: {},
}
_STEPS: dict[bytes, Callable[[_Machine, Any], None]] = {
    pickle.PROTO: lambda machine, _: None,
    pickle.FRAME: lambda machine, _: None,
    pickle.MARK: _Machine._mark,
    pickle.TUPLE: lambda machine, _: machine._stack.append(tuple(machine._above_mark())),
    pickle.TUPLE1: lambda machine, _: machine._stack.append(tuple(machine._pop(1))),
    pickle.TUPLE2: lambda machine, _: machine._stack.append(tuple(machine._pop(2))),
    pickle.TUPLE3: lambda machine, _: machine._stack.append(tuple(machine._pop(3))),
    pickle.LIST: lambda machine, _: machine._stack.append(machine._above_mark()),
    pickle.DICT: _Machine._dictionary,
    pickle.APPEND: lambda machine, _: machine._extend(machine._pop(1)),
    pickle.APPENDS: lambda machine, _: machine._extend(machine._above_mark()),
    pickle.SETITEM: lambda machine, _: machine._set(machine._pop(2)),
    pickle.SETITEMS: lambda machine, _: machine._set(machine._above_mark()),
    **dict.fromkeys((pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT), _Machine._put),
    pickle.MEMOIZE: lambda machine, _: machine._put(len(machine._memo)),
    **dict.fromkeys(
        (pickle.GET, pickle.BINGET, pickle.LONG_BINGET), lambda machine, at: machine._stack.append(machine._memo[at])
    ),
    pickle.GLOBAL: lambda machine, names: machine._find(*names.split(" ", 1)),
    pickle.STACK_GLOBAL: lambda machine, _: machine._find(*machine._pop(2)),
    pickle.REDUCE: _Machine._call,
    pickle.BUILD: _Machine._build,
}


def unpickled(content: bytes) -> dict[str | bytes, Any]:
    """Return a pickled dictionary of arrays, lists, text and numbers (NumPy's as Python's own), of any protocol.

    Text of Python 2 is bytes.

    Raises:
        SourceError: damaged, no dictionary, or it does anything that arrays do not need.
    """
    try:
        found = _Machine(content).run()
    except SourceError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, AttributeError) as error:
        raise SourceError(f"damaged pickle: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise SourceError("the pickle holds no dictionary")
    return {key: value.values if isinstance(value, _Array) else value for key, value in found.items()}
