"""Deltas that stay in the bank's file, or in host memory, and are read ahead of their use.

A block is composed, and its gradient reduced, chunk by chunk: whatever the number of task vectors
and the size of a block, no more than a fixed number of chunks is in memory. A training step uses
the blocks in the same order every time, first forward, then backward; the stream learns which block
follows which, and keeps the disk busy with the next ones.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from mmap import mmap
from pathlib import Path
from queue import SimpleQueue
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import FileFormatError, crc, data_offsets, read_tensors
from ..ops import TILE, Layout, compose_with, dots_with, padded, tile_keys
from .low_rank_segment import LowRankSegment
from .segment import Segment, chunks
from .task_vector_bank import TaskVectorBank

# Chunks read ahead, being read and in use, together. Four threads: some wait for the disk while
# others check what has come. Two left the disk idle a third of the time.
SLOTS = 8
_THREADS = 4
# Bytes. What direct reads are made of: a multiple of every disk's own.
BLOCK = 4096


def check_streamable(bank: TaskVectorBank) -> None:
    """Raises ValueError if the bank's deltas are in memory already, where it composes."""
    if bank.path is None and bank.device.type == "cpu":
        raise ValueError(
            "memory='stream' reads the deltas from a file, but this bank is in memory: save it "
            "and use TaskVectorBank.load(path), or use memory='recompute'"
        )


class Stream:
    """The blocks of a bank, one at a time: what `on_use` composes with memory="stream".

    Composing a block reads its deltas once, and so does the gradient of its coefficients. Low-rank
    blocks are small: their factors stay in memory.

    Args:
        bank: whose base is where blocks are composed, and whose deltas are on the CPU. If it was
            loaded from a file, they are read from there.
        groups: K, if blocks are partitioned, else 0.
        seed: of the partition.

    Raises:
        ValueError: the bank is in memory already, and on the device that composes; or its file was
            replaced since it was loaded.
    """

    def __init__(self, bank: TaskVectorBank, groups: int = 0, seed: int = 0) -> None:
        check_streamable(bank)
        # Deltas are verified as they come.
        bank.verify(deltas=False)
        device = bank.device
        self._bank = bank
        self._device = device
        self.groups, self._seed = groups, seed
        self.coef_shape = (len(bank.names), 1, groups) if groups else (len(bank.names), 1)
        self._source: _Source = _Host(bank) if bank.path is None else _File(bank.path, bank)
        self._pieces = self._cut()
        self._base: list[Tensor] = [torch.empty(0)] * len(bank.blocks)
        self._keys: list[Tensor | None] = [None] * len(bank.blocks)
        self._low_rank: dict[int, LowRankSegment] = {}
        for segment in bank.segments:
            for block in segment.blocks():
                (column,) = block.columns
                if isinstance(block, LowRankSegment):
                    self._low_rank[column] = block
                self._base[column] = block.base
                if groups:
                    self._keys[column] = tile_keys([bank.blocks[column]], block.layout, seed)
        self._start()
        # The block that came after three others the last time. Three, because a weight and a bias
        # follow each other in a layer's forward pass, and in its backward pass.
        self._next: dict[tuple[int, ...], int] = {}
        self._last: tuple[int, ...] = (-1, -1, -1)

    def _start(self) -> None:
        self._process = os.getpid()
        self._turn = RLock()
        size = max((piece.nbytes for block in self._pieces for piece in block), default=0)
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(SLOTS):
            self._buffers.put(_Buffer(size, self._device))
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="atlas-kernels-stream")
        self._pending: dict[_Piece, Future[_Loan]] = {}

    def compose(self, column: int, coef: Tensor, /) -> Tensor:
        """``base + sum_i coef[i] * delta_i`` [P'] of a block; P' with padding.

        For coef (N,); (N, K) where blocks are partitioned.
        """
        if column in self._low_rank:
            key = self._keys[column]
            return self._low_rank[column].compose(coef.unsqueeze(1), tile_key=key)
        streamed = _StreamedComposition(self, column)
        return compose_with(streamed, coef.unsqueeze(1), self._base[column])

    def coef_grad(self, column: int, grad: Tensor, /) -> Tensor:
        """``<grad, delta_i>``, (N,) or (N, K), over a block for grad [P'].

        Chunks are summed in float64.
        """
        if column in self._low_rank:
            part, key = self._low_rank[column], self._keys[column]
            return part.coef_grad(grad, tile_key=key, groups=self.groups).squeeze(1)
        return dots_with(_StreamedComposition(self, column), grad).squeeze(1)

    def turn(self) -> AbstractContextManager[Any]:
        """Inside, a thread may `read`: all of them share the buffers."""
        if self._process != os.getpid():
            # A fork: the threads that read stayed behind, and with them whose turn it was.
            self._start()
        return self._turn

    def read(self, column: int) -> Iterator[tuple[slice, Segment, Tensor | None]]:
        """A block's elements piece by piece, with a segment that is valid until the next.

        And with the keys of their tiles, if blocks are partitioned.
        """
        keys = self._keys[column]
        self._next[self._last] = column
        self._last = (*self._last[1:], column)
        for k, piece in enumerate(self._pieces[column]):
            if piece not in self._pending:
                self._request(column, k)
            future = self._pending.pop(piece)
            self._request(column, k + 1)
            try:
                loan = future.result()
            except (OSError, FileFormatError):
                # It was read ahead, perhaps long ago: what was wrong may have passed.
                loan = self._filled(piece)
            # The loan's only holder from here on.
            del future
            try:
                elements = slice(piece.start, piece.end)
                key = None if keys is None else keys[piece.start // TILE : -(-piece.end // TILE)]
                yield elements, self._segment(piece, loan.buffer), key
            finally:
                loan.end()

    def __deepcopy__(self, memo: dict[int, object]) -> Stream:
        return Stream(self._bank, self.groups, self._seed)

    def __reduce__(self) -> Any:
        return Stream, (self._bank, self.groups, self._seed)

    def _cut(self) -> list[list[_Piece]]:
        pieces: list[list[_Piece]] = [[] for _ in self._bank.blocks]
        count = len(self._bank.names)

        # Few differ, and to make one for every chunk that is read takes longer than to compose it.
        @cache
        def layout_of(elements: int, alignment: int) -> Layout:
            return Layout.from_shapes(((elements,),), alignment).to(self._device)

        for index, segment in enumerate(self._bank.segments):
            if isinstance(segment, LowRankSegment):
                continue
            codec, offsets = segment.codec, segment.layout.offsets
            cuts = chunks(segment.layout, codec, count)
            for cut, checksum in zip(cuts, self._source.checksums(index, len(cuts)), strict=True):
                column, first = segment.columns[cut.block], offsets[cut.block]
                low, high = count * cut.start, count * cut.end
                items = codec.items(low), codec.items(high)
                scales = codec.scales(low), codec.scales(high)
                pieces[column].append(
                    _Piece(
                        column,
                        cut.start - first,
                        cut.end - first,
                        index,
                        tuple(n * codec.dtype.itemsize for n in items),
                        tuple(n * torch.bfloat16.itemsize for n in scales),
                        checksum,
                        segment.index[cut.block : cut.block + 1],
                        layout_of(cut.end - cut.start, codec.alignment),
                    )
                )
        return pieces

    def _request(self, column: int, k: int) -> None:
        """Has the pieces of a block read from the k-th on, and those that will probably follow."""
        # One slot is the caller's.
        wanted = list(islice(self._upcoming(column, k), SLOTS - 1))
        for piece in [piece for piece in self._pending if piece not in wanted]:
            self._discard(self._pending.pop(piece))
        for piece in wanted:
            if piece not in self._pending:
                self._pending[piece] = self._pool.submit(self._filled, piece)

    def _upcoming(self, column: int, k: int) -> Iterator[_Piece]:
        yield from self._pieces[column][k:]
        last = self._last
        # As far as a step that uses every block three times, so that empty blocks come to an end.
        for _ in range(3 * len(self._pieces)):
            following = self._next.get(last)
            if following is None:
                return
            yield from self._pieces[following]
            last = (*last[1:], following)

    def _discard(self, future: Future[_Loan]) -> None:
        # What was read all the same comes back when the future is gone.
        future.cancel()

    def _filled(self, piece: _Piece) -> _Loan:
        loan = _Loan(self._buffers)
        try:
            self._fill(loan.buffer, piece)
        except BaseException:
            # The error itself would keep it.
            loan.end()
            raise
        return loan

    def _fill(self, buffer: _Buffer, piece: _Piece) -> None:
        for name, (start, end) in (("deltas", piece.deltas), ("scales", piece.scales)):
            room = buffer.room(name, piece)
            found = self._source.read(f"{name}.{piece.segment}", start, end - start, room)
            buffer.found[name] = found
        if piece.checksum is not None and crc(*buffer.found.values()) != piece.checksum:
            raise FileFormatError(
                f"{self._bank.path}: a checksum of block {self._bank.blocks[piece.column]!r} "
                "fails: the file was damaged or changed since it was written. Pack it again"
            )

    def _segment(self, piece: _Piece, buffer: _Buffer) -> Segment:
        segment = self._bank.segments[piece.segment]
        codec, on_device = segment.codec, partial(Tensor.to, device=self._device, non_blocking=True)
        deltas, scales = map(on_device, (buffer.found["deltas"], buffer.found["scales"]))
        return Segment(
            (piece.column,),
            piece.index,
            piece.layout,
            codec,
            len(self._bank.names),
            self._base[piece.column][piece.start : piece.end],
            deltas.view(codec.dtype),
            scales.view(torch.bfloat16) if codec.bits else None,
        )


@dataclass(frozen=True)
class _StreamedComposition:
    """A block of a stream as what is differentiated.

    What is inside records nothing, and so saves nothing that lies in a buffer.

    Attributes:
        stream: where its pieces come from.
        column: the block's place in the bank.
    """

    stream: Stream
    column: int

    def composed(self, coef: Tensor, base: Tensor) -> Tensor:
        """[P'], for coef (N, 1) or (N, 1, K) and base [P']."""
        composed = torch.empty_like(base)
        with self.stream.turn():
            for elements, segment, key in self.stream.read(self.column):
                part = replace(segment, base=base[elements])
                composed[elements] = part.compose(coef, tile_key=key)
        return composed

    def dots(self, grad: Tensor) -> Tensor:
        """Shaped like coef, for grad [P']."""
        total = torch.zeros(self.stream.coef_shape, dtype=torch.float64, device=grad.device)
        with self.stream.turn():
            for elements, segment, key in self.stream.read(self.column):
                part = segment.coef_grad(grad[elements], tile_key=key, groups=self.stream.groups)
                total += part
        return total.float()


@dataclass(frozen=True)
class _Piece:
    """A chunk of a block.

    Attributes:
        column: the block's place in the bank.
        start, end: its elements within the block.
        segment: the block's segment.
        deltas, scales: first byte and end in the segment's arenas.
        checksum: of both, if they come from a file.
        index, layout: as a segment of its own has them, on the device that composes.
    """

    column: int
    start: int
    end: int
    segment: int
    deltas: tuple[int, ...]
    scales: tuple[int, ...]
    checksum: int | None
    index: Tensor = field(compare=False)
    layout: Layout = field(compare=False)

    @property
    def nbytes(self) -> int:
        return self.deltas[1] - self.deltas[0] + self.scales[1] - self.scales[0]


def _room(count: int) -> int:
    """Bytes of the blocks in which so many bytes may lie, wherever they start."""
    return padded(count, BLOCK) + BLOCK


class _Loan:
    """A buffer until nobody has it any more: no interrupt and no error can lose it.

    Waits for a free one.
    """

    def __init__(self, buffers: SimpleQueue[_Buffer]) -> None:
        self.buffer = buffers.get()
        self.end = weakref.finalize(self, _give_back, self.buffer, buffers)
        self.end.atexit = False


def _give_back(buffer: _Buffer, buffers: SimpleQueue[_Buffer]) -> None:
    buffer.release()
    buffers.put(buffer)


class _Buffer:
    """Host memory for one chunk; page-locked if a GPU copies from it.

    Attributes:
        found: the bytes of its deltas and of its scales.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        # Two rooms may take up to two blocks more than one, and the first block starts somewhere.
        memory = torch.empty(
            _room(size) + 3 * BLOCK, dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        first = -memory.data_ptr() % BLOCK
        self._bytes = memory[first:]
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self.found: dict[str, Tensor] = {}

    def room(self, name: str, piece: _Piece) -> Tensor:
        """Where the deltas or the scales of a chunk go: whole blocks."""
        deltas, scales = (_room(end - start) for start, end in (piece.deltas, piece.scales))
        return self._bytes[:deltas] if name == "deltas" else self._bytes[deltas : deltas + scales]

    def release(self) -> None:
        """Waits until the GPU has copied what it was told to."""
        if self._copied is not None:
            self._copied.record()
            self._copied.synchronize()


class _Source(Protocol):
    def checksums(self, segment: int, count: int) -> list[int] | list[None]: ...

    def read(self, name: str, offset: int, count: int, room: Tensor) -> Tensor:
        """Bytes [offset, offset + count) of an arena, somewhere in the room for them."""


class _Host:
    """A bank in host memory."""

    def __init__(self, bank: TaskVectorBank) -> None:
        self._arenas: dict[str, Tensor] = {}
        for index, segment in enumerate(bank.segments):
            if not isinstance(segment, LowRankSegment):
                for name, tensor in (("deltas", segment.deltas), ("scales", segment.scales)):
                    if tensor is not None:
                        self._arenas[f"{name}.{index}"] = tensor.view(torch.uint8)

    def checksums(self, segment: int, count: int) -> list[None]:
        return [None] * count

    def read(self, name: str, offset: int, count: int, room: Tensor) -> Tensor:
        found = room[:count]
        if count:
            found.copy_(self._arenas[name][offset : offset + count])
        return found


class _File:
    """A bank's file, kept open: a file of the same name that replaces it is not read.

    It is read around the system's cache, where the file system can: a bank that is larger than
    memory finds nothing there, and to put it there took half a second of a core for every GB.
    """

    def __init__(self, path: Path, bank: TaskVectorBank) -> None:
        self._path = path
        self._descriptor = open_direct(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._offsets = data_offsets(path)
        tensors, fields = read_tensors(path, "bank")
        self._checksums = {
            name: tensor.tolist()
            for name, tensor in tensors.items()
            if name.startswith("checksums.")
        }
        if (fields, self._checksums) != (bank.fields, bank.checksums):
            raise ValueError(
                f"{path} was replaced by another bank since it was loaded: load it again"
            )

    def checksums(self, segment: int, count: int) -> list[int]:
        found: list[int] = self._checksums[f"checksums.{segment}"]
        if len(found) != count:
            raise FileFormatError(
                f"{self._path}: {len(found)} checksums for {count} chunks of deltas: the file is "
                "damaged"
            )
        return found

    def read(self, name: str, offset: int, count: int, room: Tensor) -> Tensor:
        if not count:
            return room[:0]
        position = self._offsets[name][0] + offset
        first = position // BLOCK * BLOCK
        end = position + count
        view = memoryview(room.numpy().data)[: padded(end - first, BLOCK)]
        done = 0
        while first + done < end:
            # Direct reads start at a block.
            done -= done % BLOCK
            found = os.preadv(self._descriptor, [view[done:]], first + done)
            if found < BLOCK and first + done + found < end:
                raise FileFormatError(
                    f"{self._path}: ends at byte {first + done + found}, in the middle of the "
                    "deltas: it was shortened since it was loaded"
                )
            done += found
        return room[position - first : end - first]


def open_direct(path: Path) -> int:
    """A descriptor for reads of whole blocks around the system's cache, where there are such."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(descriptor, [mmap(-1, BLOCK)], 0)
        except OSError:
            os.close(descriptor)
            raise
    except (AttributeError, OSError):
        return os.open(path, os.O_RDONLY)
    return descriptor
