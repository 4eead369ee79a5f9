"""PEFT's Super-Tuning: a few elements of the weight get a value of their own, and in its Supra form a LoRA
update beside it.

W.flat[indices] += values; with `r`, ΔW = B A · lora_alpha / r too (arXiv 2607.09287; PEFT 0.21
supertuning/layer.py, get_delta_weight). Only Linear exists. Without saved indices PEFT takes the largest
elements of the base, in an order that equal magnitudes leave open, so the value of each is not known.
"""

from functools import partial

from lorafuse.adapters.reading.check_config import number
from lorafuse.adapters.reading.check_tensors import check_positions, check_shapes, is_transposed, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, sparse_added
from lorafuse.patches.target import Target

SUPPORTED = "Linear, with and without a low-rank part; saved indices only"
MEMORY = "the sparse values of a weight"

_LEAVES = r"supertuning_(indices|values)|supertuning_lora_[AB]\.weight"
_LORA = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One or two for the weight of each module."""

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        return _sparse(adapter, scale, module, leaves) + _low_rank(adapter, scale, module, leaves)

    return collect(adapter, _LEAVES, of_module, warn)


def _sparse(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    if "supertuning_values" in leaves and "supertuning_indices" not in leaves:
        raise AdapterError(
            f"{adapter.file}: {shown(module)} has supertuning_values but no supertuning_indices "
            "(save_precomputed_indices was off), so it is not known which elements they belong to."
        )
    keys = take(adapter, module, leaves, ("supertuning_indices", "supertuning_values"))
    if keys is None:
        return []
    n = check_shapes(adapter, *((key, ("n",)) for key in keys), integers=keys[:1])["n"]

    def make(target: Target) -> Patch:
        if len(target.spec.shape) != 2 or target.is_conv1d:
            raise misfit(adapter, target, keys[0])
        check_positions(
            adapter, keys[0], target.spec.numel, f"elements of {shown(target.name)}", in_base=True
        )
        return RowFunction(
            adapter.store,
            {"indices": keys[0], "values": keys[1]},
            partial(sparse_added, scale=1.0),
            begin=partial(_begin, scale=scale),
            begin_nbytes=40 * n,  # the order, its sorted copies, and both tensors in that order
            scratch_nbytes=8 * n,
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors, scale: float) -> Tensors:
    """By position, so that a tile's elements are neighbours."""
    positions, order = tensors["indices"].sort(stable=True)
    return {"positions": positions, "values": tensors["values"][order].mul_(scale)}


def _low_rank(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    keys = take(adapter, module, leaves, _LORA)
    if keys is None:
        return []
    n = check_shapes(adapter, (keys[0], ("r", "in")), (keys[1], ("out", "r")))
    scaling = scale * number(adapter, "lora_alpha", 2 * n["r"], null=True) / n["r"]

    def make(target: Target) -> Patch:
        if is_transposed(adapter, keys, (n["out"], n["in"]), target):
            raise misfit(adapter, target, *keys)
        return LowRank(Factor(adapter.store, keys[1]), Factor(adapter.store, keys[0]), scaling)

    return [Update(f"{module}.weight", keys, make=make)]
