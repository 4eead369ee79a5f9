"""The formats that quantize a base in full precision: what transformers with bitsandbytes would make of the
result when it loads it, or, of a base that training saw quantized so, the grid that training saw.

    nf4, fp4, int8   the weights that transformers 5 quantizes on loading, in bitsandbytes' layout
    base             the same as the kind of --base-quant
    light            the same, but value projections that change are dense
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lorafuse.codecs.bnb4_quantizer import FourBitRows
from lorafuse.codecs.bnb8_quantizer import Int8Rows
from lorafuse.codecs.columns_quantizers import FourBitColumns, Int8Columns
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.codecs.encoder import Encoder
from lorafuse.codecs.quantizing import QuantizedOnLoad, QuantizingEncoder
from lorafuse.codecs.sources import Sources
from lorafuse.errors import UsageError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import FLOATS
from lorafuse.formats.dense import dense_encoder
from lorafuse.formats.format import Format, WeightToStore
from lorafuse.formats.keep_dense import KeepDense
from lorafuse.formats.not_converted import dense_modules, has_words_for_dense
from lorafuse.settings import BaseQuant, Settings
from lorafuse.trained_base.which_weights import quantized_on_load


def on_simulated_base(ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> "Quantized":
    """Onto the grid that training saw."""
    assert settings.base_quant
    return Quantized(ckpt, settings, weights, settings.base_quant)


class Quantized(Format):
    """Weights that transformers would quantize are quantized; of what the adapter changes, modules that
    --keep-dense names are not, nor is what it replaces or adds."""

    def __init__(
        self,
        ckpt: Checkpoint,
        settings: Settings,
        weights: Mapping[str, Sources],
        quant: BaseQuant | None = None,
    ) -> None:
        self._ckpt, self._settings, self._weights = ckpt, settings, weights
        self._quant = quant or settings.quantization
        self._own_grid = settings.base_quant is not None and settings.base_quant.kind == self._quant.kind
        self._keep_dense, self._warnings = KeepDense.asked_for(settings, ckpt.config), list[str]()
        self._refuse()
        self._chosen = {id(weights[name]) for name in self._on_load()}
        self._outputs: dict[str, Sources] = {}  # weights of the output
        self._quantized: set[str] = set()  # those that are quantized
        self._dtypes: Counter[str] = Counter()

    def _refuse(self) -> None:
        settings, word = self._settings, f"--format {self._settings.format}"
        if any(sources.scheme.kind != "dense" for sources in self._weights.values()):
            own_grid = "--format base keeps the update on the base's own grid"
            way_out = own_grid if has_words_for_dense(self._ckpt.config) else "leave --format out"
            raise UsageError(
                f"{shown(self._ckpt.folder)}: is quantized already, and {word} would quantize it again: "
                f"{way_out}."
            )
        if self._quant.experts:
            raise UsageError(
                f"{word}: transformers 5 does not load experts that are quantized one by one, as "
                "--quant-experts says they were: leave --format out."
            )
        if self._own_grid and settings.dtype != "auto":
            raise UsageError(f"{word} keeps the dtypes that training saw: leave --dtype out.")

    def _on_load(self) -> list[str]:
        """The weights of the base that transformers quantizes on loading."""
        if self._settings.base_quant:
            return [name for name, sources in self._weights.items() if isinstance(sources, QuantizedOnLoad)]
        chosen = quantized_on_load(self._weights, self._ckpt, self._quant, self._warnings.append)
        if not chosen:
            raise UsageError(
                f"{shown(self._ckpt.folder)}: transformers 5 quantizes no weight of it on loading; leave "
                "--format out."
            )
        return chosen

    def encoder_of(self, weight: WeightToStore) -> Encoder:
        self._outputs[weight.name] = weight.base or weight.sources
        if weight.spec.dtype in FLOATS:
            self._dtypes[weight.spec.torch_name] += weight.spec.nbytes
        whole = weight.sources is not weight.base  # what the adapter replaces or adds
        if whole or id(weight.base) not in self._chosen or not weight.spec.numel:
            return dense_encoder(weight)
        if not weight.untouched and self._keep_dense.names(weight.name):
            return dense_encoder(weight)
        self._quantized.add(weight.name)
        return self._encoder(weight)

    def _encoder(self, weight: WeightToStore) -> Encoder:
        quantizer = self._quantizer_of(weight)(weight.name, weight.spec, self._quant)
        rounding = None if weight.untouched else self._settings.rounding
        if not self._own_grid:
            return QuantizingEncoder(weight.name, quantizer, rounding if rounding == "unbiased" else None)
        assert isinstance(weight.base, QuantizedOnLoad)
        rounding = None if weight.untouched else rounding or "unbiased"
        return QuantizingEncoder(weight.name, quantizer, rounding, weight.base)

    def _quantizer_of(
        self, weight: WeightToStore
    ) -> type[FourBitRows] | type[FourBitColumns] | type[Int8Rows] | type[Int8Columns]:
        """Which quantizer it takes: bitsandbytes stores the weights of Conv1D transposed."""
        by_columns = is_conv1d(self._ckpt.config, weight.name)
        if self._quant.kind == "int8":
            return Int8Columns if by_columns else Int8Rows
        if by_columns and weight.spec.shape[0] % 2:
            raise UsageError(
                f"--format {self._settings.format}: {shown(weight.name)} is the weight of a Conv1D with an "
                "odd number of rows, whose 4-bit codes this version does not write: choose --format int8, or "
                "leave --format out."
            )
        return FourBitColumns if by_columns else FourBitRows

    def config(self) -> Mapping[str, Any]:
        """The fields that transformers 5 writes for a model that it has quantized so."""
        quant, int8 = self._quant, self._quant.kind == "int8"
        dtype = self._dtypes.most_common(1)[0][0]
        return {
            "quantization_config": {
                "_load_in_4bit": not int8,
                "_load_in_8bit": int8,
                "bnb_4bit_compute_dtype": "float32" if int8 else dtype,
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": "fp4" if int8 else quant.kind,
                "bnb_4bit_use_double_quant": quant.double_quant and not int8,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": self._list(),
                "llm_int8_threshold": 6.0,
                "load_in_4bit": not int8,
                "load_in_8bit": int8,
                "quant_method": "bitsandbytes",
            }
        }

    def warnings(self) -> list[str]:
        return [*self._warnings, *self._keep_dense.warnings()]

    def _list(self) -> list[str] | None:
        """Modules that are dense; None where a reader leaves these dense by itself."""
        default = BaseQuant(kind=self._quant.kind)
        if set(quantized_on_load(self._outputs, self._ckpt, default, lambda _: None)) == self._quantized:
            return None
        dense = [
            name
            for name, sources in self._outputs.items()
            if name not in self._quantized and len(sources.spec.shape) == 2 and name.endswith(".weight")
        ]
        return dense_modules(self._ckpt.config, dense, self._quantized, self._outputs)
