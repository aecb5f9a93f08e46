"""Interpreter of the pickles in PyTorch files; results are plain values and descriptions of tensors.

It knows the opcodes that `torch.save` writes (pickle protocol 2). It looks names up in the tables of `allowed`, never
imports them, and calls only the functions there.

torch's own reader of weights is too permissive, and the names that it allows cannot be reduced: `bytearray` and
`torch.Tensor` allocate any size that a pickle asks for, and a key of deeply nested tuples ends the process.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from cogview_pl.checkpoints.safe_pickle.allowed import (
    FUNCTIONS,
    INERT,
    STORAGES,
    Array,
    Budget,
    Malformed,
    Name,
    NumberType,
    Refused,
    Storage,
    Value,
    fill,
    is_count,
    set_byte_order,
)

_MAX_KEY = 2**31


def read_pickle(stream: BinaryIO) -> tuple[Value, dict[str, Storage]]:
    """The value and the storages of the next pickle in a stream; the stream then stands at its end.

    The stream should hold few megabytes: values take up to a hundred times the size of their pickle.

    Raises:
        Refused: the pickle uses a name that is not allowed.
        Malformed: the pickle is not one that torch.save writes.
        Exception: pickletools meets bytes that are no opcodes.
    """
    machine = _Machine()
    return machine.run(stream), machine.storages


class _Machine:
    """Runs one pickle."""

    def __init__(self) -> None:
        self.stack: list[Value] = []
        self.below: list[list[Value]] = []
        """Stacks under the marks."""
        self.memo: dict[int, Value] = {}
        self.storages: dict[str, Storage] = {}
        self.budget = Budget()

    def run(self, stream: BinaryIO) -> Value:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            name = opcode.name
            if name in _LITERALS:
                self.push(argument)
            elif name in _CONSTANTS:
                self.push(_CONSTANTS[name])
            elif name in _OPCODES:
                _OPCODES[name](self, argument)
            elif name != "STOP":  # the last opcode
                raise Malformed(f"opcode {name}, which torch.save does not write")
        return self.pop()

    def push(self, value: Value) -> None:
        self.stack.append(value)

    def pop(self) -> Value:
        if not self.stack:
            raise Malformed("an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Value]:
        if not self.below:
            raise Malformed("no mark")
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self) -> Value:
        if not self.stack:
            raise Malformed("an empty stack")
        return self.stack[-1]

    # --- opcodes; the argument is None if an opcode has none ---

    def protocol(self, argument: int) -> None:
        if argument != 2:
            raise Malformed(f"pickle protocol {argument}; torch.save writes 2")

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def put(self, argument: int) -> None:
        self.memo[argument] = self.top()

    def get(self, argument: int) -> None:
        if argument not in self.memo:
            raise Malformed(f"no value {argument} to refer to")
        self.push(self.memo[argument])

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise Malformed("an empty stack")
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def extend(self, items: list[Value]) -> None:
        target = self.top()
        if type(target) is not list:
            raise Malformed(f"items of a {type(target).__name__}")
        target.extend(items)

    def update(self, items: list[Value]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise Malformed(f"entries of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Keys are hashed; the hash of nested tuples could take for ever or overflow the C stack.
            if type(key) is not str and not (type(key) is int and abs(key) < _MAX_KEY):
                raise Malformed(f"a {type(key).__name__} as key of a dictionary")
            target[key] = value

    def name(self, argument: str) -> None:
        dotted = argument.replace(" ", ".", 1)
        if dotted not in FUNCTIONS and dotted not in INERT:
            raise Refused(f"to run {dotted}")
        self.push(Name(dotted))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.dotted not in FUNCTIONS:
            raise Refused(f"to run {function.dotted if isinstance(function, Name) else type(function).__name__}")
        if type(arguments) is not tuple:
            raise Malformed(f"arguments of {function.dotted}")
        self.push(FUNCTIONS[function.dotted](self.budget, *arguments))

    def build(self) -> None:
        """Sets the state of a value."""
        state, target = self.pop(), self.top()
        if isinstance(target, NumberType):
            set_byte_order(target, state)
        elif isinstance(target, Array):
            fill(self.budget, target, state)
        elif type(target) is not dict:  # attributes of an OrderedDict, such as _metadata, are ignored
            raise Refused(f"to set the state of a {type(target).__name__}")

    def persistent(self) -> None:
        """A storage: `("storage", type, key, device, numel)`, followed by None in old files."""
        identity = self.pop()
        if type(identity) is not tuple or identity[:1] != ("storage",):
            raise Refused("for an object that is no storage")
        if len(identity) not in (5, 6) or identity[5:] not in ((), (None,)):
            raise Malformed("a reference to a storage")
        _, kind, key, _, numel = identity[:5]
        dtype = STORAGES.get(kind.dotted.removeprefix("torch.")) if isinstance(kind, Name) else None
        if dtype is None or type(key) is not str or not is_count(numel):
            raise Malformed("a reference to a storage")
        known = self.storages.setdefault(key, Storage(key, dtype, numel))
        if (known.dtype, known.numel) != (dtype, numel):
            raise Malformed(f"storage {key[:20]} in two forms")
        self.push(known)


_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("SHORT_BINSTRING", "BINSTRING"),  # text of Python 2, in older files (LPIPS)
}
_CONSTANTS: dict[str, Value] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "MARK": lambda machine, _: machine.mark(),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_to_mark()),
    "GLOBAL": _Machine.name,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
}
