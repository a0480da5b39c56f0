"""The states of all sessions: on the device by slot, in host memory by page for those that are evicted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from serve_app.engine.columns import HostColumn, device_column
from serve_app.errors import InvalidInput
from serve_app.models.interface import RecurrentModel, State

CHUNK_BYTES = 64 * 2**20
"""Of host memory, that is taken at a time for states that are evicted."""
READINGS = 4
"""Of the largest size, that are on their way at the same time."""
MIN_CHUNK_PAGES, MAX_CHUNK_PAGES = 64, 8192
STATE_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
"""Of a client's initial state; it is cast to what the model has."""


class StatePool:
    """One tensor for each tensor of the model's state, with a slot for each row of its batch dimension.

    Evicted states lie in host memory, which grows by chunks of pages; a page is one session's whole state. All moves
    are of many sessions at once.
    """

    def __init__(self, model: RecurrentModel, num_slots: int, device: torch.device) -> None:
        self._device = device
        #: Slots beside those that are lent: for what fills a step up, and for a state on its way to a page.
        self.padding_slot, self._passing_slot = num_slots, num_slots + 1
        self._aside, self._out = (_stream(device) for _ in range(2))  # that moves states, that brings some to the host
        like = model.initial_state(1)
        one, two = pytree.tree_flatten(like), pytree.tree_flatten(model.initial_state(2))
        self._initial: list[torch.Tensor] = [leaf.detach().to(device) for leaf in one[0]]
        self._structure = one[1]
        #: A state as it is built, where that is of tuples and dicts only: pytree takes ten times as long for it.
        self._like = like if _is_plain(like) else None
        self._dims = [_batch_dim(a, b) for a, b in zip(one[0], two[0], strict=True)]
        kind = HostColumn if device.type == "cpu" else device_column
        self._columns = [kind(leaf, dim, num_slots + 2) for leaf, dim in zip(self._initial, self._dims, strict=True)]
        self._last_due: tuple[int, list[Any]] = 0, []  # the form of a batched state, by its batch
        #: Of the last step in host memory: its slots, and their states, which are not there yet.
        self._held: tuple[np.ndarray, Sequence[torch.Tensor]] | None = None
        self._chunk_pages = min(max(CHUNK_BYTES // max(1, self.state_bytes), MIN_CHUNK_PAGES), MAX_CHUNK_PAGES)
        #: Pages that are free, at its start; as long as there are pages.
        self._free = np.empty(0, np.int64)
        self._num_free = 0
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream(device))  # which has yet to fill the slots

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's state."""
        return sum(leaf.nbytes for leaf in self._initial)

    @property
    def num_pages_used(self) -> int:
        """Pages of host memory that hold a state."""
        return len(self._free) - self._num_free

    def index(self, slots: np.ndarray) -> Any:
        """These slots, as `gather` and `scatter` take them: an array in host memory, else a tensor on the device."""
        if self._aside is None:
            return slots
        return torch.from_numpy(slots).pin_memory().to(self._device, non_blocking=True)

    def states(self) -> State:
        """The states of all slots, as one batch: what lies there, not a copy."""
        self._write_back()
        return pytree.tree_unflatten([column.tensor for column in self._columns], self._structure)

    def gather(self, index: Any) -> State:
        """The states in the slots of `index`, batched in that order: a copy, or what was just scattered there."""
        if self._held is not None and np.array_equal(self._held[0], index):
            leaves = self._held[1]
        else:
            self._write_back()
            leaves = [column.select(index) for column in self._columns]
        if self._like is None:
            return pytree.tree_unflatten(leaves, self._structure)
        return _built(self._like, iter(leaves))

    def scatter(self, index: Any, state: State) -> None:
        """Write a batched state to these slots. ValueError, with nothing written, unless it is shaped as it came.

        In host memory it is kept as it is until others are asked for: the next step is often of the same sessions.
        """
        leaves, structure = self._flatten(state)
        found = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if len(index) != self._last_due[0]:
            self._last_due = len(index), [column.form(len(index)) for column in self._columns]
        due = self._last_due[1]
        if structure != self._structure or found != due:
            raise ValueError(
                f"the model returned a state of {found} as {structure}, expected {due} as {self._structure}"
            )
        if self._aside is None:
            if self._held is not None and not np.array_equal(self._held[0], index):
                self._write_back()
            self._held = index, [leaf.contiguous() for leaf in leaves]
            return
        for column, leaf in zip(self._columns, leaves, strict=True):
            column.put(index, leaf)

    @contextmanager
    def as_before(self, index: Any) -> Iterator[None]:
        """What is raised within leaves the states in these slots as they were. Nothing else may move within."""
        self._write_back()
        before = [column.select(index) for column in self._columns]
        try:
            yield
        except BaseException:
            self._held = None
            for column, leaf in zip(self._columns, before, strict=True):
                column.put(index, leaf)
            raise

    def _write_back(self) -> None:
        if self._held is not None:
            (index, leaves), self._held = self._held, None
            for column, leaf in zip(self._columns, leaves, strict=True):
                column.put(index, leaf)

    @contextmanager
    def moving(self, *, after_steps: bool) -> Iterator[None]:
        """Within, states move: on a GPU beside the steps launched before, and in time for those launched later.

        after_steps: a step launched before uses these slots, so they come first.
        """
        if self._aside is None:
            yield
            return
        steps = torch.cuda.current_stream()
        if after_steps:
            self._aside.wait_stream(steps)
        torch.cuda.set_stream(self._aside)
        try:
            yield
        finally:
            torch.cuda.set_stream(steps)
        steps.wait_stream(self._aside)

    def reset(self, slots: np.ndarray) -> None:
        """Put the model's initial state into `slots`."""
        self._write_back()
        index = self.index(slots)
        for column, initial in zip(self._columns, self._initial, strict=True):
            column.put(index, initial.expand(column.form(len(slots))[0]))

    def exchange(self, slots: np.ndarray, num_evicted: int, pages: np.ndarray) -> np.ndarray:
        """Copy the states in the last `num_evicted` of `slots` to host memory, and what is in `pages` to `slots`.

        pages: as many, -1 where nothing comes; they are free then. Returns the page of each that was evicted.
        """
        self._write_back()
        taken, out = self._take_pages(num_evicted), np.full(len(slots), -1)
        out[len(slots) - num_evicted :] = taken
        index = self.index(np.stack([slots, out, pages]))
        for column in self._columns:
            column.exchange(index[0], index[1], index[2])
        self.free_pages(pages[pages >= 0])
        return taken

    def prepare(self, batch: int) -> None:
        """Take the memory that it needs on a GPU to read the states of `batch` sessions while others are on their way.

        Pinned memory is kept for the next of the same size, and the device stands still while it is taken.
        """
        if self._aside is not None:
            on_their_way = [self.read(np.zeros(batch, np.int64)) for _ in range(READINGS)]
            del on_their_way

    def read(self, slots: np.ndarray) -> "Reading":
        """Copies of the states in `slots` [n], which no step on its way may use; later steps may."""
        self._write_back()
        with self.moving(after_steps=False):
            index = self.index(slots)
            leaves = self._batch_first([column.select(index) for column in self._columns])
            if self._aside is None:
                return Reading(leaves, self._dims)
            leaves = [leaf.contiguous() for leaf in leaves]  # here, where that takes no time
        self._out.wait_stream(self._aside)
        steps = torch.cuda.current_stream()
        torch.cuda.set_stream(self._out)
        try:
            copies = [torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True) for leaf in leaves]
            for leaf, copied in zip(leaves, copies, strict=True):
                copied.copy_(leaf, non_blocking=True)
                leaf.record_stream(self._out)
        finally:
            torch.cuda.set_stream(steps)
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record(self._out)
        return Reading(copies, self._dims, landed)

    def read_pages(self, pages: np.ndarray) -> "Reading":
        """The same of the states in `pages` [n]."""
        if self._aside is not None:
            self._aside.synchronize()  # which writes there
        return Reading(self._batch_first([column.read(pages) for column in self._columns]), self._dims)

    def _batch_first(self, leaves: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [leaf.movedim(dim, 0) for leaf, dim in zip(leaves, self._dims, strict=True)]

    def free_pages(self, pages: np.ndarray) -> None:
        """The states in `pages` are not needed any more."""
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def admit(self, state: Sequence[np.ndarray]) -> int:
        """Keep a client's initial state, its tensors in the model's order and shaped as for a batch of 1, in a page.

        Raises InvalidInput when the tensors do not fit the model's.
        """
        self.check_initial(state)
        slots = np.array([self._passing_slot])
        index = self.index(slots)
        for column, array, leaf in zip(self._columns, state, self._initial, strict=True):
            column.put(
                index, torch.from_numpy(np.array(array, array.dtype.newbyteorder("="))).to(leaf.device, leaf.dtype)
            )
        return int(self.exchange(slots, 1, np.array([-1]))[0])

    def check_initial(self, state: Sequence[np.ndarray]) -> None:
        """Raise InvalidInput unless `state` is one session's state."""
        expected = [list(leaf.shape) for leaf in self._initial]
        if [list(array.shape) for array in state] != expected:
            raise InvalidInput(
                f"an initial state of shapes {[list(a.shape) for a in state]} arrived, the model's state is {expected}"
            )
        if not all(a.dtype.name in STATE_DTYPES and (a.dtype.kind != "f" or np.isfinite(a).all()) for a in state):
            raise InvalidInput("the initial state holds NaN, infinity or values that are not numbers")

    def _flatten(self, state: State) -> tuple[Sequence[torch.Tensor], pytree.TreeSpec]:
        found: list[torch.Tensor] = []
        if self._like is not None and _add_leaves(state, self._like, found):
            return found, self._structure
        try:
            leaves = self._structure.flatten_up_to(state)  # by name, in whatever order the model has put them
        except ValueError:
            return pytree.tree_flatten(state)
        return (leaves, self._structure) if all(map(torch.is_tensor, leaves)) else pytree.tree_flatten(state)

    def _take_pages(self, count: int) -> np.ndarray:
        while self._num_free < count:
            first = len(self._free)
            self._free = np.concatenate([self._free, np.zeros(self._chunk_pages, np.int64)])
            self.free_pages(np.arange(first, first + self._chunk_pages)[::-1])
            for column in self._columns:
                column.grow(self._chunk_pages)
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()


class Reading:
    """States on their way to host memory, beside the steps."""

    def __init__(self, leaves: Sequence[torch.Tensor], dims: Sequence[int], landed: Any = None) -> None:
        """leaves: the states, the batch first, which the model has at `dims`.

        landed: an event on the device; None: they are there.
        """
        self._leaves, self._dims, self._landed = leaves, dims, landed

    @property
    def is_here(self) -> bool:
        """Whether `arrays` waits for nothing."""
        return self._landed is None or self._landed.query()

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Each tensor as [n, *shape for a batch of 1]. bfloat16, which numpy has not, comes as float32."""
        if self._landed is not None:
            self._landed.synchronize()
        arrays = [(leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy() for leaf in self._leaves]
        return tuple(np.expand_dims(array, dim + 1) for array, dim in zip(arrays, self._dims, strict=True))


def _is_plain(like: State) -> bool:
    """Whether a state is built of tuples, dicts and tensors only."""
    if type(like) is tuple:
        return all(map(_is_plain, like))
    return all(map(_is_plain, like.values())) if type(like) is dict else isinstance(like, torch.Tensor)


def _built(like: State, leaves: Iterator[torch.Tensor]) -> State:
    """The next leaves, built as `like` is."""
    if type(like) is tuple:
        return tuple([_built(part, leaves) for part in like])
    return {key: _built(part, leaves) for key, part in like.items()} if type(like) is dict else next(leaves)


def _add_leaves(state: State, like: State, found: list[torch.Tensor]) -> bool:
    """Add the tensors of a state to `found`, in the order of `like`; False unless it is built like that."""
    if isinstance(like, torch.Tensor):
        found.append(state)
        return isinstance(state, torch.Tensor)
    if type(state) is not type(like) or len(state) != len(like):
        return False
    if type(like) is tuple:
        return all(map(_add_leaves, state, like, repeat(found)))
    return state.keys() == like.keys() and all(map(_add_leaves, map(state.get, like), like.values(), repeat(found)))


def _stream(device: torch.device) -> Any:
    """Beside the steps, on a GPU; None on the CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _batch_dim(one: torch.Tensor, two: torch.Tensor) -> int:
    """The dimension in which the states of one and of two sessions differ."""
    dims = [dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if (a, b) == (1, 2)]
    if len(dims) != 1:
        raise InvalidInput(
            f"initial_state(1) has a tensor of shape {list(one.shape)}, initial_state(2) of {list(two.shape)}: "
            "exactly one dimension must be the batch"
        )
    return dims[0]
