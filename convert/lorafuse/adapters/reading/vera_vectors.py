"""What VeRA and PVeRA share: vectors of each module between two random matrices that all modules share.

With save_projection=False the matrices are not in the file; they are drawn again from `projection_prng_key`
as PEFT draws them (PEFT 0.21 vera/model.py, _init_vera_A_vera_B).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from lorafuse.adapters.reading.check_config import integer
from lorafuse.adapters.reading.check_tensors import check_shapes, is_transposed, misfit, unexpected
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import Modules
from lorafuse.adapters.reading.modules import (
    NAMED,
    SHARED,
    Leaves,
    Updates,
    Warn,
    each_module,
    read_modules,
    take,
)
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.arena import host_view
from lorafuse.errors import AdapterError, shown
from lorafuse.files.tensors import DTYPES
from lorafuse.patches.factor import READ_NUMEL
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, oriented, product_added
from lorafuse.patches.target import Target


def vector_updates(
    adapter: AdapterDir, scale: float, warn: Warn, prefix: str, *, n_halves: int = 1
) -> Updates:
    """VeRA under the names of `prefix`. Of `n_halves` equal parts of λ_d and A the first counts."""
    modules, ignored = read_modules(adapter, rf"{prefix}_(lambda_[bd]|[AB]){NAMED}")
    shared = _shared(adapter, modules, prefix, n_halves, warn)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        own = take(adapter, module, leaves, (f"{prefix}_lambda_b", f"{prefix}_lambda_d"))
        if own is None:
            return []
        n_out = check_shapes(adapter, (own[0], ("out",)), (own[1], (shared.rank * n_halves,)))["out"]
        make = partial(_patch, adapter, own, n_out, shared, scale)
        return [Update(f"{module}.weight", (*own, *shared.keys), make=make)]

    return each_module(adapter, modules, of_module, warn), ignored


@dataclass
class Projections:
    """A [n_halves · rank, widest in] and B [widest out, rank]: two keys of the file, or, without keys, drawn
    from the seed."""

    adapter: AdapterDir
    rank: int
    n_halves: int
    keys: tuple[str, ...]
    seed: int
    n_in: int = 0  # the widest of all modules, on which depends what is drawn
    n_out: int = 0

    def cover(self, n_in: int, n_out: int, target: Target) -> None:
        """Take note of a module. Raises AdapterError where the stored matrices are smaller than it."""
        if not self.keys:
            self.n_in, self.n_out = max(self.n_in, n_in), max(self.n_out, n_out)
        elif n_in > self.n_in:
            raise misfit(self.adapter, target, self.keys[0])
        elif n_out > self.n_out:
            raise misfit(self.adapter, target, self.keys[1])

    def load(self, n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 A [rank, n_in] and B [n_out, rank]."""
        A = torch.empty(self.rank, n_in, dtype=torch.float32)
        B = torch.empty(n_out, self.rank, dtype=torch.float32)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        for which, part in enumerate((A, B)):
            width = (self.n_in, self.rank)[which]
            n_rows = len(part) if self.keys else (self.n_halves * self.rank, self.n_out)[which]
            step = max(READ_NUMEL // width, 1)
            for start in range(0, n_rows, step):
                stop = min(start + step, n_rows)
                rows = (
                    self._read(which, start, stop, width)
                    if self.keys
                    else _drawn(stop - start, width, generator)
                )
                kept = part[start:stop]
                kept.copy_(rows[: len(kept), : part.shape[1]])
        return A, B

    def _read(self, which: int, start: int, stop: int, width: int) -> torch.Tensor:
        key, store = self.keys[which], self.adapter.store
        dtype = store.tensors[key].spec.dtype
        row_nbytes = width * DTYPES[dtype][0]
        raw = torch.empty((stop - start) * row_nbytes, dtype=torch.uint8)
        store.read_into(key, start * row_nbytes, host_view(raw))
        return raw.view(getattr(torch, DTYPES[dtype][1])).view(-1, width).float()


def _drawn(n_rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of a Kaiming-uniform matrix with fan-in `width`; drawing it in parts gives the numbers of drawing
    it whole."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(width))
    return torch.empty(n_rows, width, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _shared(adapter: AdapterDir, modules: Modules, prefix: str, n_halves: int, warn: Warn) -> Projections:
    where = adapter.folder / CONFIG
    keys = take(adapter, SHARED, modules.get(SHARED, {}), (f"{prefix}_A", f"{prefix}_B"))
    seed = integer(adapter, "projection_prng_key", 0, least=0)
    if keys is None:
        if adapter.config.get("save_projection", True):
            raise AdapterError(
                f"{adapter.file}: holds no base_model.{prefix}_A, though {shown(where)} says save_projection."
            )
        warn(
            f"{adapter.file}: {prefix}_A and {prefix}_B were not saved; they are drawn again from "
            "projection_prng_key, as PEFT does, which is exact where the random numbers of torch are those "
            "of the training."
        )
        return Projections(adapter, integer(adapter, "r", 256), n_halves, (), seed)
    r = "r" if n_halves == 1 else "2 r"
    n = check_shapes(adapter, (keys[0], (r, "in")))
    if n[r] % n_halves:
        raise unexpected(adapter, keys[0], f"[{r}, in]")
    rank = n[r] // n_halves
    n_out = check_shapes(adapter, (keys[1], ("out", rank)))["out"]
    return Projections(adapter, rank, n_halves, keys, seed, n["in"], n_out)


def _patch(
    adapter: AdapterDir, keys: tuple[str, ...], n_out: int, shared: Projections, scale: float, target: Target
) -> Patch:
    n_in = target.spec.numel // n_out
    transposed = is_transposed(adapter, keys[:1], (n_out, n_in), target)
    shared.cover(n_in, n_out, target)
    rank = shared.rank

    return RowFunction(
        adapter.store,
        dict(zip("bd", keys, strict=True)),
        partial(product_added, scale=scale),
        begin=partial(_begin, shared=shared, n_in=n_in, n_out=n_out, transposed=transposed),
        begin_nbytes=4 * rank * (n_in + n_out) + 12 * READ_NUMEL,
        facts={"rank": rank, "scale": scale},
    )


def _begin(t: Tensors, shared: Projections, n_in: int, n_out: int, transposed: bool) -> Tensors:
    A, B = (x.to(t["b"].device) for x in shared.load(n_in, n_out))
    return oriented(B.mul_(t["b"][:, None]), A.mul_(t["d"][: shared.rank, None]), transposed)
