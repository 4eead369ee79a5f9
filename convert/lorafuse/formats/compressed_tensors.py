"""The formats of compressed-tensors, which vLLM loads: new codes and scales for every linear layer.

    fp8     float8_e4m3fn, a scale for each row; activations are quantized on the fly, by token
    w8a16   8-bit integers in groups of 32
    w4a16   4-bit integers in groups of 128; of 32, where 128 does not divide the rows of all of them

The codes are those that compressed-tensors makes of the merged weights in full precision. What no adapter
changes is quantized too. In full precision stay, as in the recipes of llm-compressor, embeddings, heads and
whatever else lies outside of the layers, routers of mixtures, towers of vision and audio; and stacks of
experts, which are not linear layers. All of them are listed in config.json.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lorafuse.arithmetic.symmetric import E4M3, INT4, INT8, Levels
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.codecs.encoder import Encoder
from lorafuse.codecs.sources import Sources
from lorafuse.codecs.symmetric import SymmetricEncoder
from lorafuse.errors import UsageError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import FLOATS, TensorSpec
from lorafuse.formats.dense import dense_encoder
from lorafuse.formats.format import Format, WeightToStore
from lorafuse.formats.vllm_names import VllmNames, siblings, whole_of
from lorafuse.settings import Settings

VERSION = "0.20.1"  # the release of compressed-tensors whose layout this is


class Preset(NamedTuple):
    """`groups`: the sizes to choose from, the first that divides all rows; None where a row has one scale."""

    levels: Levels
    groups: tuple[int, ...] | None
    layout: str
    activations: Mapping[str, Any] | None = None


_BY_TOKEN = {
    "dynamic": True,
    "group_size": None,
    "num_bits": 8,
    "strategy": "token",
    "symmetric": True,
    "type": "float",
}
PRESETS = {
    "fp8": Preset(E4M3, None, "float-quantized", _BY_TOKEN),
    "w8a16": Preset(INT8, (32,), "pack-quantized"),
    "w4a16": Preset(INT4, (128, 32), "pack-quantized"),
}


class CompressedTensors(Format):
    """`--keep-dense` names modules that stay dense, and with them what vLLM makes one matrix of with them."""

    def __init__(self, ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> None:
        """Raises UsageError for weights that the format cannot hold."""
        self._word, self._preset = settings.format, PRESETS[settings.format]
        if settings.rounding == "unbiased":
            raise UsageError(
                f"--format {self._word} makes scales of its own, and rounds to the nearest: --rounding "
                "unbiased is for formats on the base's grid."
            )
        self._names, self._patterns = VllmNames(weights, ckpt.config), settings.keep_dense
        modules = (name.removesuffix(".weight") for name in weights)
        self._unmatched = set(self._patterns)
        self._kept = {whole_of(module) for module in modules if self._matches(module)}
        rows = {
            name: sources.spec.shape[-1]
            for name, sources in weights.items()
            if self._quantizes(name, sources.spec)
        }
        if not rows:
            raise UsageError(
                f"{shown(ckpt.folder)}: no weight of it would be quantized with --format {self._word}: leave "
                "--format out."
            )
        for name in rows:
            if is_conv1d(ckpt.config, name):
                raise UsageError(
                    f"--format {self._word}: {shown(name)} belongs to a Conv1D, which compressed-tensors "
                    "cannot store: choose another --format."
                )
        self._group = self._common_group(rows)
        self._dense: dict[str, TensorSpec] = {}

    def _matches(self, module: str) -> bool:
        matching = {pattern for pattern in self._patterns if fnmatchcase(module, pattern)}
        self._unmatched -= matching
        return bool(matching)

    def _quantizes(self, name: str, spec: TensorSpec) -> bool:
        if len(spec.shape) != 2 or not spec.numel or spec.dtype not in FLOATS:
            return False
        module = name.removesuffix(".weight")
        kept = whole_of(module) in self._kept or any(map(self._matches, siblings(module)))
        return self._names.is_quantized(name) and not kept

    def _common_group(self, rows: Mapping[str, int]) -> int | None:
        """vLLM joins matrices, and has one method for all experts of a layer: no two of a model may differ.
        Raises UsageError."""
        groups = self._preset.groups
        if groups is None:
            return None
        fitting = [group for group in groups if not any(n % group for n in rows.values())]
        if fitting:
            return fitting[0]
        name = next(name for name, n in rows.items() if n % groups[-1])
        raise UsageError(
            f"--format {self._word}: {shown(name)} has rows of {rows[name]} elements, which groups of "
            f"{groups[-1]} do not divide: leave it in full precision, --keep-dense "
            f"{shown(name.removesuffix('.weight'))!r}, or choose --format fp8, which has no groups."
        )

    def encoder_of(self, weight: WeightToStore) -> Encoder:
        if self._quantizes(weight.name, weight.spec):
            return SymmetricEncoder(weight.name, weight.spec, self._preset.levels, self._group)
        self._dense[weight.name] = weight.spec
        return dense_encoder(weight)

    def config(self) -> Mapping[str, Any]:
        """As compressed-tensors writes it."""
        levels, group = self._preset.levels, self._group
        weights = {
            "dynamic": False,
            "group_size": group,
            "num_bits": levels.bits,
            "strategy": "group" if group else "channel",
            "symmetric": True,
            "type": "int" if levels.whole else "float",
        }
        scheme = {
            "format": self._preset.layout,
            "input_activations": self._preset.activations,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        quantization = {
            "config_groups": {"group_0": scheme},
            "format": self._preset.layout,
            "global_compression_ratio": None,
            "ignore": self._names.ignored(self._listed()),
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }
        return {"quantization_config": quantization}

    def _listed(self) -> Iterator[str]:
        """The weights that stay dense and might be taken for those of linear layers, or of experts."""
        for name, spec in self._dense.items():
            if spec.dtype in FLOATS and (len(spec.shape) == 2 or len(spec.shape) == 3):
                yield name

    def warnings(self) -> list[str]:
        if not self._unmatched:
            return []
        return [f"--keep-dense {listed(sorted(self._unmatched))}: matches no module."]
