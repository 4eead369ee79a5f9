"""The formats that keep what the base stores.

    base    every weight is stored as the base stores it; what changes is rounded onto the base's own grid
    light   the same, but value projections that change are dense: a little larger, and much nearer the sum
    mixed   what changes is dense, the rest is stored as it was

With all of them, an adapter's replacement of a weight is dense.
"""

from collections.abc import Mapping
from typing import Any

from lorafuse.codecs.encoder import Encoder
from lorafuse.codecs.own_grid import GridSources, OwnGridEncoder
from lorafuse.codecs.per_expert import Stacked
from lorafuse.codecs.plain import PlainEncoder
from lorafuse.codecs.run_time import serves
from lorafuse.codecs.sources import Sources
from lorafuse.codecs.stack_encoder import StackEncoder
from lorafuse.codecs.stored import StoredEncoder, stored_names
from lorafuse.errors import UsageError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.formats.format import Format, WeightToStore
from lorafuse.formats.keep_dense import KeepDense
from lorafuse.formats.not_converted import experts_together, with_dense_modules
from lorafuse.formats.quantized import on_simulated_base
from lorafuse.formats.whole_experts import WholeExperts
from lorafuse.settings import Settings


def base(ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> Format:
    """Of a base in full precision that is full precision, or with `--base-quant` what training saw.
    `--keep-dense` names modules that become dense."""
    if settings.base_quant:
        return on_simulated_base(ckpt, settings, weights)
    return AsStored(ckpt, settings, weights, KeepDense.asked_for(settings, ckpt.config))


def light(ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> Format:
    """Raises UsageError for a base in full precision without `--base-quant`."""
    if not settings.base_quant:
        _refuse_full_precision(ckpt, settings, weights)
    return base(ckpt, settings, weights)


def mixed(ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> Format:
    """Raises UsageError for a base in full precision too."""
    if settings.keep_dense or settings.rounding:
        raise UsageError(
            "--format mixed leaves all that changes dense: leave --keep-dense and --rounding out."
        )
    if settings.base_quant:
        raise UsageError(
            "--format mixed keeps what the base stores, which is full precision where --base-quant is given: "
            "leave --format out, or choose --format base."
        )
    _refuse_full_precision(ckpt, settings, weights)
    return AsStored(ckpt, settings, weights, KeepDense(("*",)))


def _refuse_full_precision(ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> None:
    if all(sources.as_stored for sources in weights.values()):
        raise UsageError(
            f"{shown(ckpt.folder)}: no weight of it is quantized, so that --format {settings.format} would "
            "keep nothing: leave --format out."
        )


class AsStored(Format):
    """Quantized weights that nothing changes are copied, with their companions; of those that change, some
    become dense."""

    def __init__(
        self,
        ckpt: Checkpoint,
        settings: Settings,
        weights: Mapping[str, Sources],
        keep_dense: KeepDense,
    ) -> None:
        word = settings.format
        if settings.dtype != "auto":
            raise UsageError(f"--format {word} keeps the base's own dtypes: leave --dtype out.")
        self._config, self._weights, self._keep_dense = ckpt.config, weights, keep_dense
        self._unbiased, self._word = settings.rounding != "nearest", word
        self._of_base: dict[int, str] = {}
        self._with_others = WholeExperts(ckpt.config, weights)
        self._quantized: set[str] = set()  # weights of the output
        self._dense: set[str] = set()  # weights that the base has quantized and the output has not

    def foresee(self, weights: Mapping[str, Sources], changing: Mapping[str, Sources]) -> None:
        if not experts_together(self._config):
            return
        quantized = {name: base for name, base in weights.items() if not base.as_stored}
        dense = [
            name
            for name, sources in changing.items()
            if name in quantized and (sources is not quantized[name] or self._keep_dense.names(name))
        ]
        self._with_others.take_beside(dense, {n: quantized[n] for n in quantized.keys() - set(dense)})

    def encoder_of(self, weight: WeightToStore) -> Encoder:
        base = weight.base
        if weight.name in self._with_others:
            self._dense.add(weight.name)
            return PlainEncoder(weight.name, weight.spec)
        if weight.untouched:
            if base is not None and not base.as_stored:
                self._quantized.add(weight.name)
            return StoredEncoder(weight.sources.store, self._names(weight.name, weight.sources))
        if base is None:
            return PlainEncoder(weight.name, weight.spec)
        if base.as_stored:
            [name] = self._names(weight.name, base)
            return PlainEncoder(name, weight.spec)
        if isinstance(base, Stacked):
            return self._in_stack(weight, base)
        if weight.sources is not base or self._keep_dense.names(weight.name):
            self._dense.add(weight.name)
            return PlainEncoder(weight.name, weight.spec)
        self._quantized.add(weight.name)
        return self._on_grid(weight.name, base)

    def _in_stack(self, weight: WeightToStore, base: Stacked) -> Encoder:
        dense = weight.sources is not base or self._keep_dense.names(weight.name)
        if dense or not base.on_grids:
            raise UsageError(
                f"--format {self._word}: {shown(weight.name)} is made from several weights of the base, "
                "which keeps them apart, and would be dense as a whole: leave --format out, or choose "
                "--format base without --keep-dense."
            )
        self._quantized.add(weight.name)
        names = self._names(weight.name, base)
        return StackEncoder(weight.name, names, base, unbiased=self._unbiased)

    def _on_grid(self, name: str, base: Sources) -> Encoder:
        if not isinstance(base, GridSources) or not base.grid_rows:
            raise UsageError(
                f"--format {self._word}: {shown(name)} is stored in {base.scheme}, whose codes cannot be "
                "written anew: --format mixed leaves what changes dense."
            )
        return OwnGridEncoder(name, self._names(name, base), base, unbiased=self._unbiased)

    def _names(self, name: str, sources: Sources) -> dict[str, str]:
        """{name in the output: name in the base} of what a weight of the base is stored as."""
        if self._weights.get(name) is sources:
            return stored_names(name, name, sources)
        if not self._of_base:  # layers are repeated
            self._of_base = {id(of_base): weight for weight, of_base in self._weights.items()}
        return stored_names(name, self._of_base[id(sources)], sources)

    def config(self) -> Mapping[str, Any]:
        if not self._quantized:
            return {}
        return with_dense_modules(self._config, self._dense, self._quantized, self._weights)

    def left_out(self, dropped: Mapping[str, str]) -> Mapping[str, str]:
        """A reader of weights that stay quantized takes their run-time tensors too; one of weights that are
        dense now knows none."""
        if not self._quantized:
            return dropped
        return {name: reason for name, reason in dropped.items() if serves(name, self._dense)}

    def warnings(self) -> list[str]:
        of_patterns = [] if self._word == "mixed" else self._keep_dense.warnings()
        return [*of_patterns, *self._with_others.warnings(self._word)]
