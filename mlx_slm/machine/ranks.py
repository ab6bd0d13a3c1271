"""Ranks: processes that train one model together, each on its rows of every step.

`mlx.launch` starts them, `mx.distributed` connects them. With one rank, the usual case, everything here returns what it
was given.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

from mlx_slm.errors import SlmError
from mlx_slm.machine import runtime, watch
from mlx_slm.machine.trees import flat, nested

BUFFER = 8 * 2**20
"""Bytes of gradients that are summed at once."""
T = TypeVar("T")


@dataclass
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1
    group: Any = None
    hosts: list[str] = field(default_factory=list)
    """The host of each rank."""
    stream: Any = None
    """Where collectives run, beside what computes; None: where MLX puts them."""
    sent: int = 0
    """Bytes that this rank has handed to collectives."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and reports."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of them are on this host."""
        return self.hosts.count(self.hosts[self.rank]) if self.hosts else 1

    def own(self, items):
        """This rank's part of a step's rows or groups: every `size`-th."""
        return items[self.rank :: self.size]

    def by_rank(self, items):
        """The parts of all ranks, one behind the other, as `gathered` has them."""
        return np.concatenate([items[rank :: self.size] for rank in range(self.size)])

    def summed(self, array: mx.array) -> mx.array:
        """The sum over ranks, the same to the bit on each."""
        if self.size == 1:
            return array
        self.sent += array.nbytes
        return mx.distributed.all_sum(array, group=self.group, stream=self.stream)

    def gathered(self, array: mx.array) -> mx.array:
        """The arrays of all ranks, [size * n, ...] of [n, ...], in their order."""
        if self.size == 1:
            return array
        self.sent += array.nbytes
        return mx.distributed.all_gather(array, group=self.group, stream=self.stream)

    def summed_tree(self, tree: dict, dtype: mx.Dtype = mx.float32) -> dict:
        """The sum over ranks of a tree of fp32 arrays, in few large buffers of `dtype`.

        What a backward pass makes first, the end of the tree, is on its way while the rest is computed: each buffer is
        asked for by itself, since one evaluation of all would begin with everything that is computed.
        """
        if self.size == 1:
            return tree
        arrays = flat(tree)
        whole: dict[str, mx.array] = {}
        for names in _buffers(arrays, dtype.size):
            joined = mx.concatenate([arrays[name].reshape(-1) for name in names]).astype(dtype)
            ends = np.cumsum([arrays[name].size for name in names]).tolist()
            summed = self.summed(joined)
            mx.async_eval(summed)
            parts = mx.split(summed.astype(mx.float32), ends[:-1])
            whole |= {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}
        return tree_map_with_path(lambda name, _: whole[name], tree)

    def from_first(self, value: T) -> T:
        """What the first rank has, JSON, on all of them."""
        if self.size == 1:
            return value
        data = np.frombuffer(json.dumps(value).encode(), np.uint8) if self.is_first else np.zeros(0, np.uint8)
        length = self.sum_of_all(np.array([len(data)], np.int32))
        buffer = np.zeros(length, np.uint8)
        buffer[: len(data)] = data
        return json.loads(self.sum_of_all(buffer).tobytes())

    def of_all(self, value: T) -> list[T]:
        """What each rank has, JSON, by rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        longest = _values(self.gathered(mx.array([len(data)], mx.int32))).max()
        padded = np.frombuffer(data.ljust(int(longest)), np.uint8)
        rows = _values(self.gathered(mx.array(padded)[None]))
        return [json.loads(row.tobytes()) for row in rows]

    def sum_of_all(self, values: np.ndarray) -> np.ndarray:
        """The sum over ranks, in the array's own dtype."""
        return _values(self.summed(mx.array(values)))

    def values_of_all(self, values: np.ndarray) -> np.ndarray:
        """[size, ...]: the arrays of all ranks, of one shape, in their order."""
        return _values(self.gathered(mx.array(values)[None]))

    def tree_from_first(self, tree: dict | None) -> dict:
        """The arrays that the first rank has, bit for bit, on all of them; the others need not have any."""
        if self.size == 1:
            assert tree is not None
            return tree
        arrays = flat(tree) if self.is_first else {}
        forms = self.from_first([(name, a.shape, str(a.dtype).removeprefix("mlx.core.")) for name, a in arrays.items()])
        received = {}
        for name, shape, kind in forms:
            dtype = getattr(mx, kind)
            bits = getattr(mx, f"uint{8 * dtype.size}")
            mine = arrays[name].reshape(-1).view(bits) if self.is_first else mx.zeros(math.prod(shape), bits)
            received[name] = self.summed(mine).view(dtype).reshape(shape)
            mx.eval(received[name])
        return nested(received)

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, JSON, on all of them; where it fails, all end."""
        if self.size == 1:
            return make()
        if not self.is_first:
            answer: dict[str, Any] = self.from_first({})
            if "error" in answer:
                raise SlmError(f"rank 0 ({self.hosts[0]}): {answer['error']}")
            return answer["made"]
        try:
            made = make()
        except SlmError as error:
            self.from_first({"error": str(error)})
            raise
        self.from_first({"made": made})
        return made

    def in_turn(self, make: Callable[[], T]) -> T:
        """make() on the first rank, then on the others, which find what it has written where they share its files."""
        if self.size == 1:
            return make()
        made: list[T] = []
        with apart():
            self.by_first(lambda: made.append(make()))
            self._after_the_first(lambda: made.append(make()))
        return made[0]

    def made_by_first(self, make: Callable[[], T], seen: Callable[[], Any]) -> T | None:
        """make() on the first rank, and on each other to which `seen`, JSON, then shows other things than to the first:
        those that do not share its files. None where it was not called."""
        made: list[T] = []
        with apart():
            self.by_first(lambda: made.append(make()))
            whole = self.from_first(seen())
            self._after_the_first(lambda: None if seen() == whole else made.append(make()))
        return made[0] if made else None

    def _after_the_first(self, make: Callable[[], None]) -> None:
        """make() on all ranks but the first, one after another on each host; all wait until that is done."""
        turn = self.hosts[: self.rank].count(self.hosts[self.rank]) if self.hosts else 0
        for now in range(max(map(self.hosts.count, self.hosts), default=0)):
            if now == turn and not self.is_first:
                make()
            self.of_all(None)

    def share_out(self, count: int, is_there: Callable[[int], bool], make: Callable[[int], None]) -> None:
        """make(i) for each i below `count` that is not there: every `size`-th by each rank, and what is still missing
        after that, where files are not shared, by each for itself."""
        for part in (self.own(range(count)), range(count)):
            for each in part:
                if not is_there(each):
                    make(each)
            self.of_all(None)

    def agree(self, fact: bool) -> bool:
        """Whether it is so on all of them."""
        return all(self.of_all(fact))

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise SlmError, on all ranks, that names the first rank whose facts, or versions of the packages, are others
        than those of rank 0."""
        if self.size == 1:
            return
        facts = {f"version of {name}": metadata.version(name) for name in ("mlx-slm", "mlx")} | facts
        every = self.of_all(facts)
        for rank, theirs in enumerate(every):
            for key in facts:
                if theirs.get(key) != every[0].get(key):
                    raise SlmError(
                        f"rank {rank} ({self.hosts[rank]}) has another {key} than rank 0 ({self.hosts[0]}): "
                        f"{_short(theirs.get(key))}, not {_short(every[0].get(key))}: make them equal, and start again"
                    )


def _values(array: mx.array) -> np.ndarray:
    """Of an array that a collective made. It is evaluated first: where a rank is lost that raises, while NumPy, which
    would evaluate it as well, goes on with whatever lies in the memory."""
    mx.eval(array)
    return np.array(array)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 30 else f"{text[:12]}..."


def _buffers(arrays: dict[str, mx.array], itemsize: int) -> Iterator[list[str]]:
    """Names of arrays that are summed together, the last first."""
    names: list[str] = []
    size = 0
    for name in reversed(arrays):
        if names and size + arrays[name].size * itemsize > BUFFER:
            yield names
            names, size = [], 0
        names.append(name)
        size += arrays[name].size * itemsize
    yield names


LOST = ("[ring]", "[jaccl]", "[nccl]", "NCCL")
"""How MLX's engines begin what they say of a connection."""


def is_lost(error: Exception) -> bool:
    """Whether an error says that another rank is gone."""
    return any(sign in str(error) for sign in LOST)


ALONE = Ranks()


def are_several() -> bool:
    """Whether this process was started as one of several, without connecting to them."""
    if not os.environ.get("MLX_RANK"):
        return False
    if file := os.environ.get("MLX_HOSTFILE"):
        return not Path(file).exists() or bool(Path(file).read_text().strip())  # empty for one rank alone
    return bool(os.environ.get("MLX_WORLD_SIZE") or os.environ.get("MLX_IBV_DEVICES"))


_apart = contextvars.ContextVar("apart", default=False)


def ranks() -> Ranks:
    """Those that were started together, connected at the first call, or this process alone; raises SlmError where the
    others are not reached."""
    return ALONE if _apart.get() else _connected()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, each rank works for itself, on what the others do not."""
    before = _apart.set(True)
    watch.alone += 1
    try:
        yield
    finally:
        watch.alone -= 1
        _apart.reset(before)


@functools.cache
def _connected() -> Ranks:
    if not are_several():
        return ALONE
    with watch.connecting():
        try:
            group = mx.distributed.init(strict=True)
            if group.size() == 1:
                return ALONE
            found = Ranks(group.rank(), group.size(), group)
            found.stream = None if runtime.on_gpu() else mx.new_stream(mx.cpu)
            found.hosts = found.of_all(socket.gethostname())
            watch.start(found)
        except (RuntimeError, ValueError) as error:
            here = f"rank {os.environ['MLX_RANK']} ({socket.gethostname()})"
            raise SlmError(
                f"{here} does not reach {watch.others()}: {error}; check "
                f"the names of the hosts, and that its port is free{watch.own_place()}"
            ) from error
        return found
