"""Adapter tensors as fp32 matrices, read whole or in parts."""

import math
from collections.abc import Iterator

import torch

from lorafuse.arithmetic.arena import Arena, host_view
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, TensorSpec

READ_NUMEL = 1 << 18


class Factor:
    """A 2-D adapter tensor as fp32, or some of its rows and evenly spaced columns, whole or in parts, perhaps
    transposed, perhaps each row times an element of another tensor, `row_scale`. Of a 3-D tensor, a stack of
    matrices, `matrix` is the one that is taken, or from which rows are.

    `rows` and `cols` choose from the stored matrix; `shape` is the logical one, after choosing and
    transposing, and it is the rows of that shape which are scaled.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        transposed: bool = False,
        rows: range | None = None,
        cols: range | None = None,
        row_scale: str | None = None,
        matrix: int | None = None,
    ) -> None:
        spec = store.tensors[key].spec
        if matrix is not None:
            n_rows, n_cols = spec.shape[1:]
            chosen = rows or range(n_rows)
            rows = range(matrix * n_rows + chosen.start, matrix * n_rows + chosen.stop)
            spec = TensorSpec(spec.dtype, (spec.shape[0] * n_rows, n_cols))
        self.store, self.key, self.transposed, self._row_scale = store, key, transposed, row_scale
        self._width = spec.n_cols
        self._rows, self._cols = rows or range(spec.shape[0]), cols or range(spec.n_cols)
        self._chosen = (len(self._rows), len(self._cols))
        self.shape = self._chosen[::-1] if transposed else self._chosen
        self._dtype = getattr(torch, spec.torch_name)
        self._itemsize = DTYPES[spec.dtype][0]
        self.nbytes = math.prod(self.shape) * 4

    def whole(self, arena: Arena) -> torch.Tensor:
        """float32 `shape`, on the arena's device, in memory of its own."""
        n_rows, n_cols = self._chosen
        stored = torch.empty(n_rows, n_cols, dtype=torch.float32, device=arena.device)
        step = max(READ_NUMEL // max(self._width, 1), 1)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            stored[start:stop] = self._stored_rows(start, stop, arena)
        return self._scaled(stored.T if self.transposed else stored, 0, arena)

    def rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        stored = (
            self._stored_cols(start, stop, arena).T
            if self.transposed
            else self._stored_rows(start, stop, arena)
        )
        return self._scaled(stored, start, arena)

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        stored = (
            self._stored_rows(start, stop, arena).T
            if self.transposed
            else self._stored_cols(start, stop, arena)
        )
        return self._scaled(stored, 0, arena)

    def _scaled(self, rows: torch.Tensor, first_row: int, arena: Arena) -> torch.Tensor:
        if self._row_scale is None:
            return rows
        scale = load(self.store, self._row_scale, arena.device).view(-1, 1)
        return rows.mul_(scale[first_row : first_row + rows.shape[0]])

    def _stored_rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        """One read of whole rows, since they lie together."""
        row_nbytes = self._width * self._itemsize
        raw = arena.fetch(
            "factor.raw", self.store, self.key, self._rows[start] * row_nbytes, (stop - start) * row_nbytes
        )
        return self._float(raw, stop - start, self._cols, arena)

    def _stored_cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        """One read for each row, from the first chosen column to the last."""
        cols = self._cols[start:stop]
        nbytes = (cols[-1] + 1 - cols[0]) * self._itemsize
        raw = arena.get("factor.raw", len(self._rows) * nbytes, torch.uint8, host=True)
        view = host_view(raw)
        for i, row in enumerate(self._rows):
            begin = (row * self._width + cols[0]) * self._itemsize
            self.store.read_into(self.key, begin, view[i * nbytes : (i + 1) * nbytes])
        return self._float(raw, len(self._rows), range(0, nbytes // self._itemsize, cols.step), arena)

    def _float(self, raw: torch.Tensor, n_rows: int, cols: range, arena: Arena) -> torch.Tensor:
        values = raw.view(self._dtype).view(n_rows, -1)[:, cols.start : cols.stop : cols.step]
        return arena.get("factor.float", values.numel(), torch.float32).view(values.shape).copy_(values)


class BlockDiagonal:
    """A matrix of `n_blocks` blocks along its diagonal, stored without the zeros: `blocks` holds them below
    each other."""

    def __init__(self, blocks: Factor, n_blocks: int) -> None:
        self._blocks, self._n_blocks = blocks, n_blocks
        n_rows, self._width = blocks.shape
        self._height = n_rows // n_blocks
        self.shape = (n_rows, self._width * n_blocks)
        self.nbytes = math.prod(self.shape) * 4

    def whole(self, arena: Arena) -> torch.Tensor:
        """float32 `shape`, on the arena's device, in memory of its own."""
        return self.rows(0, self.shape[0], arena)

    def rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        stored = self._blocks.rows(start, stop, arena)
        values = torch.zeros(stop - start, self.shape[1], dtype=torch.float32, device=arena.device)
        for block in range(start // self._height, -(-stop // self._height)):
            first, last = (
                max(block * self._height, start) - start,
                min((block + 1) * self._height, stop) - start,
            )
            values[first:last, block * self._width : (block + 1) * self._width] = stored[first:last]
        return values

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        values = torch.zeros(self.shape[0], stop - start, dtype=torch.float32, device=arena.device)
        for block in range(start // self._width, -(-stop // self._width)):
            left = block * self._width
            first, last = max(left, start), min(left + self._width, stop)
            stored = self._blocks.cols(first - left, last - left, arena)
            rows = slice(block * self._height, (block + 1) * self._height)
            values[rows, first - start : last - start] = stored[rows]
        return values


def pieces(
    store: Store, key: str, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element, elements) of a tensor or of its elements [start, stop), 1-D as they are stored,
    READ_NUMEL at a time; each is valid until the next."""
    spec = store.tensors[key].spec
    stop = spec.numel if stop is None else stop
    itemsize = DTYPES[spec.dtype][0]
    buffer = torch.empty(min(READ_NUMEL, stop - start) * itemsize, dtype=torch.uint8)
    for first in range(start, stop, READ_NUMEL):
        part = buffer[: (min(first + READ_NUMEL, stop) - first) * itemsize]
        store.read_into(key, first * itemsize, host_view(part))
        yield first, part.view(getattr(torch, spec.torch_name))


def _loaded_dtype(spec: TensorSpec) -> torch.dtype:
    return torch.float32 if getattr(torch, spec.torch_name).is_floating_point else torch.int64


def load(store: Store, key: str, device: torch.device) -> torch.Tensor:
    """A whole adapter tensor in its own shape: floats as fp32, integers as int64."""
    spec = store.tensors[key].spec
    values = torch.empty(spec.numel, dtype=_loaded_dtype(spec), device=device)
    for start, piece in pieces(store, key):
        values[start : start + len(piece)] = piece
    return values.view(spec.shape)


def loaded_nbytes(spec: TensorSpec) -> int:
    """Bytes of what `load` returns."""
    return spec.numel * _loaded_dtype(spec).itemsize


def same_tensor(a: Store, key_a: str, b: Store, key_b: str) -> bool:
    """Whether two tensors are equal to the bit, compared in pieces."""
    if a.tensors[key_a].spec != b.tensors[key_b].spec:
        return False
    pairs = zip(pieces(a, key_a), pieces(b, key_b), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in pairs)
