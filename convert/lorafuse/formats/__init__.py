"""Formats of the output: which encoder each weight gets, and what config.json says of it.

A format is added by one file and one word in FORMATS.
"""

from lorafuse.formats import as_stored, dense, quantized
from lorafuse.formats.compressed_tensors import PRESETS, CompressedTensors
from lorafuse.formats.format import MakeFormat

# The word of `--format` → what makes the format of a run.
FORMATS: dict[str, MakeFormat] = {
    "dense": dense.Dense,
    "base": as_stored.base,
    "light": as_stored.light,
    "mixed": as_stored.mixed,
    **dict.fromkeys(PRESETS, CompressedTensors),
    "nf4": quantized.Quantized,
    "fp4": quantized.Quantized,
    "int8": quantized.Quantized,
}
