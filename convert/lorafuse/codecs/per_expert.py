"""gpt-oss with a linear layer for each expert, as Unsloth's bitsandbytes copies store it, as transformers
loads it: in stacks.

`experts.gate_up_projs.N.weight` (out, in) and `.bias` make `experts.gate_up_proj` (experts, in, out) and
`experts.gate_up_proj_bias`; `down_projs` alike. `router.linear.weight` is `router.weight`. Gate and up stay
interleaved, as both have them. The output has the names of the stacks, since transformers knows no others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch

from lorafuse.arithmetic.arena import Arena, host_view
from lorafuse.codecs.conv1d import ReadByColumns, Transposed
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import read_runs
from lorafuse.codecs.own_grid import GridSources
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import DTYPES, FLOATS, Box, TensorSpec

_EXPERT = re.compile(r"(?P<experts>.*experts)\.(?P<kind>gate_up|down)_projs\.(?P<n>\d{1,6})\.(?P<leaf>\w+)")
_ROUTER = re.compile(r"(?P<router>.*router)\.linear\.(?P<leaf>weight|bias)")
BY_COLUMNS = ("dense", "nf4", "fp4", "int8")  # kinds whose sources are ReadByColumns
_SUFFIX = {"weight": "", "bias": "_bias"}


class DenseColumns(ReadByColumns):
    """A dense matrix, of which columns are read."""

    column_multiple = 64

    def __init__(self, dense: Sources) -> None:
        self._dense = dense
        self.store, self.names, self.scheme = dense.store, dense.names, dense.scheme
        self.spec, self.out_dtype = dense.spec, dense.out_dtype
        self._itemsize = DTYPES[self.spec.dtype][0]

    def will_need(self, box: Box) -> None:
        self._dense.will_need(box)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return self._dense.fetch(box, arena)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        return self._dense.decode(raw, box, arena)

    def columns_nbytes(self, n_cols: int) -> int:
        return self.spec.shape[0] * n_cols * self._itemsize

    def fetch_columns(self, cols: range) -> Raw:
        n_rows, width = self.spec.shape
        starts = [(row * width + cols.start) * self._itemsize for row in range(n_rows)]
        return (read_runs(self.store, self.names[0], starts, len(cols) * self._itemsize),)

    def decode_columns(self, raw: Raw, window: range, box: Box, arena: Arena) -> torch.Tensor:
        stored = raw[0].view(getattr(torch, self.spec.torch_name))
        cols = slice(box.cols.start - window.start, box.cols.stop - window.start)
        values = arena.get("dense.columns", box.numel, torch.float32).view(len(box.rows), len(box.cols))
        return values.copy_(arena.place(stored[box.rows.start : box.rows.stop, cols].contiguous()))


class Stacked(Sources):
    """Weights of one spec, one after another: dense vectors, or matrices that hold what they read in memory
    of their own, as transposed ones do."""

    def __init__(self, members: Sequence[Sources]) -> None:
        first = members[0]
        self._members, self._vectors = members, len(first.spec.shape) == 1
        self.spec = TensorSpec(first.spec.dtype, (len(members), *first.spec.shape))
        self.out_dtype, self.store, self.scheme = first.out_dtype, first.store, first.scheme
        self.names = tuple(name for member in members for name in member.names)
        self.nbytes = first.nbytes
        # Tiles come in order, so those in the making are in one member, or in two next to each other.
        self.window_nbytes = 2 * max(member.window_nbytes for member in members)
        self._dtype = getattr(torch, self.spec.torch_name)

    @property
    def on_grids(self) -> list[GridSources]:
        """The members, where the codes of all of them can be written anew; else none."""
        members = [member for member in self._members if isinstance(member, GridSources) and member.grid_rows]
        return members if len(members) == len(self._members) and not self._vectors else []

    def tiles(self, tile: FinishedTile) -> Iterator[tuple[int, FinishedTile]]:
        """(the number of a member, its tile, whose elements are counted through the stack) of each member
        that a tile touches."""
        counts, rest, start = tile.raw[0].tolist(), tile.raw[1:], tile.start
        for (_, part), count in zip(self._parts(tile.box), counts, strict=True):
            of_part = slice(start - tile.start, start - tile.start + part.numel)
            values, base = tile.values[of_part], tile.base[of_part]
            number = start // self._members[0].spec.numel
            yield number, FinishedTile(start, start + part.numel, values, base, rest[:count], part)
            rest, start = rest[count:], start + part.numel

    def _parts(self, box: Box) -> list[tuple[Sources, Box]]:
        """The members that the box touches, each with its own part, as rows of its last dimension."""
        start, stop = box.run
        size = self._members[0].spec.numel
        parts = []
        for number in range(start // size, -(-stop // size)):
            member = self._members[number]
            first, last = max(start - number * size, 0), min(stop - number * size, size)
            width = member.spec.shape[-1]
            part = Box(range(first // width, last // width), range(width), size // width, width)
            parts.append((member, part))
        return parts

    def release(self) -> None:
        for member in self._members:
            member.release()

    def will_need(self, box: Box) -> None:
        for member, part in self._parts(box):
            member.will_need(part)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """The vectors' bytes; or what each matrix fetches, after the numbers of tensors of each."""
        if self._vectors:
            return (self._bytes(box, arena),)
        raws = [member.fetch(part, arena) for member, part in self._parts(box)]
        return (
            torch.tensor([len(raw) for raw in raws], dtype=torch.int64),
            *(tensor for raw in raws for tensor in raw),
        )

    def _bytes(self, box: Box, arena: Arena) -> torch.Tensor:
        itemsize = self._dtype.itemsize
        buffer = arena.get("stack.raw", box.numel * itemsize, torch.uint8, host=True)
        view, at = host_view(buffer), 0
        for member, part in self._parts(box):
            nbytes = part.numel * itemsize
            member.store.read_into(member.names[0], part.run[0] * itemsize, view[at : at + nbytes])
            at += nbytes
        return buffer

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        if self._vectors:
            return arena.place(raw[0]).view(self._dtype)
        counts, rest, parts = raw[0].tolist(), raw[1:], self._parts(box)
        if len(parts) == 1:
            member, part = parts[0]
            return member.decode(rest, part, arena)
        made = arena.get("stack.made", box.numel, self._dtype)
        at = 0
        for (member, part), count in zip(parts, counts, strict=True):
            made[at : at + part.numel].copy_(member.decode(rest[:count], part, arena))
            rest, at = rest[count:], at + part.numel
        return made


def as_stacks(weights: dict[str, Sources], ckpt: Checkpoint) -> dict[str, Sources]:
    """The weights, those of experts in stacks where a gpt-oss checkpoint has them one by one. Raises
    CheckpointError where one of a stack is missing or unlike the others."""
    if ckpt.config.get("model_type") != "gpt_oss":
        return weights
    found = {name: match for name in weights if (match := _EXPERT.fullmatch(name)) and _is_known(match)}
    if not found:
        return weights
    result: dict[str, Sources] = {}
    for name, sources in weights.items():
        router = _ROUTER.fullmatch(name)
        if name not in found:
            result[f"{router['router']}.{router['leaf']}" if router else name] = sources
    for stack, names in groupby(
        sorted(found, key=lambda name: _place(found[name])), lambda n: _name(found[n])
    ):
        if stack in result:
            raise CheckpointError(f"{shown(ckpt.folder)}: {shown(stack)} is stored in two ways.")
        result[stack] = _stacked(stack, list(names), weights, ckpt)
    return result


def _is_known(match: re.Match[str]) -> bool:
    return match["leaf"] in _SUFFIX


def _name(match: re.Match[str]) -> str:
    return f"{match['experts']}.{match['kind']}_proj{_SUFFIX[match['leaf']]}"


def _place(match: re.Match[str]) -> tuple[str, int]:
    return _name(match), int(match["n"])


def _stacked(stack: str, names: list[str], weights: Mapping[str, Sources], ckpt: Checkpoint) -> Sources:
    for number, name in enumerate(names):
        match = _EXPERT.fullmatch(name)
        if match is None or int(match["n"]) != number:
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(stack)} is made from {shown(names[0])} and others, but that "
                f"of expert {number} is missing."
            )
    n_experts = ckpt.config.get("num_local_experts", len(names))
    if n_experts != len(names):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(stack)} is made from {len(names)} experts, but num_local_experts "
            f"in config.json is {shown(n_experts)}."
        )
    members = [weights[name] for name in names]
    n_dims, spec = 1 if stack.endswith("_bias") else 2, members[0].spec
    for name, member in zip(names, members, strict=True):
        if member.spec != spec or len(spec.shape) != n_dims or spec.dtype not in FLOATS or not spec.numel:
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(stack)} cannot be made from {shown(names[0])}, which is "
                f"{spec}, and {shown(name)}, which is {member.spec}."
            )
    if n_dims == 1:
        return Stacked(members)
    if members[0].scheme.kind not in BY_COLUMNS:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(stack)} cannot be made from {shown(names[0])} and others, "
            f"which are stored in {members[0].scheme}: of experts one by one, only bitsandbytes and full "
            "precision are read. Dequantize the checkpoint first."
        )
    return Stacked([Transposed(_by_columns(member)) for member in members])


def _by_columns(sources: Sources) -> ReadByColumns:
    # What no quantized codec made is one dense tensor.
    return DenseColumns(sources) if sources.as_stored else sources  # type: ignore[return-value]
