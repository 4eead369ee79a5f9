"""What each quantized format stores of a weight, with random codes: for bases.py."""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bench.support.synthetic import (
    Draw,
    Entry,
    bfloat16,
    codes,
    exactly,
    llama_config,
    nf4_entries,
    normal,
    uniform,
)

HIDDEN, INTER, KV, LAYERS, VOCAB = 2048, 8192, 512, 2, 64
GROUP = 128

# (module, rows, columns) → what is stored of its weight.
Stored = Callable[[str, int, int], list[Entry]]


class Kind(NamedTuple):
    """A format: the section of config.json, what is stored of a weight, and the header's metadata."""

    section: dict[str, object]
    stored: Stored
    key: str = "quantization_config"
    metadata: Callable[[list[str]], dict[str, str]] = lambda names: {"format": "pt"}


def float16(draw: Draw) -> Draw:
    return lambda generator, n: draw(generator, n).astype(np.float16)


def below(stop: int, start: int = 0, dtype: type = np.uint8) -> Draw:
    return lambda generator, n: generator.integers(start, stop, n, dtype=dtype)


def words(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.integers(0, 1 << 32, n, dtype=np.uint32)


def e4m3(generator: np.random.Generator, n: int) -> np.ndarray:
    """No NaN."""
    return codes(generator, n) & 0xF7


SMALL = uniform(0.001, 0.002)
OF_DTYPE = {
    "F32": SMALL,
    "BF16": bfloat16(SMALL),
    "F16": float16(SMALL),
    "U8": below(122, 116),
    "F8_E4M3": below(64, 40),
}


def scales(name: str, dtype: str, *shape: int) -> Entry:
    return Entry(name, dtype, shape, OF_DTYPE[dtype])


def of(*parts: tuple[str, str, Callable[[int, int], tuple[int, ...]], Draw | None]) -> Stored:
    """Tensors by their ending, dtype, shape from (rows, columns), and draw; small scales where it is None."""

    def stored(module: str, rows: int, cols: int) -> list[Entry]:
        return [
            Entry(f"{module}.{leaf}", dtype, shape(rows, cols), draw or OF_DTYPE[dtype])
            for leaf, dtype, shape, draw in parts
        ]

    return stored


def rows_by(width: int) -> Callable[[int, int], tuple[int, ...]]:
    return lambda n, k: (n, k // width)


def by_rows(n: int, k: int) -> tuple[int, ...]:
    return n, 1


def whole(n: int, k: int) -> tuple[int, ...]:
    return n, k


def one(n: int, k: int) -> tuple[int, ...]:
    return (1,)


def packed_integers(bits: int, *, asymmetric: bool = False) -> Stored:
    """compressed-tensors' pack-quantized."""

    def stored(module: str, n: int, k: int) -> list[Entry]:
        entries = [
            Entry(f"{module}.weight_packed", "I32", (n, k * bits // 32), words),
            scales(f"{module}.weight_scale", "BF16", n, k // GROUP),
            Entry(f"{module}.weight_shape", "I64", (2,), exactly(np.array([n, k]))),
        ]
        if asymmetric:
            entries.append(Entry(f"{module}.weight_zero_point", "I32", (n * bits // 32, k // GROUP), words))
        return entries

    return stored


def gptq(bits: int, *, act_order: bool = False) -> Stored:
    def stored(module: str, n: int, k: int) -> list[Entry]:
        groups = np.arange(k, dtype=np.int32) // GROUP
        if act_order:
            groups = np.random.default_rng(1).permutation(groups)
        return [
            Entry(f"{module}.qweight", "I32", (k * bits // 32, n), words),
            Entry(f"{module}.qzeros", "I32", (k // GROUP, n * bits // 32), words),
            scales(f"{module}.scales", "F16", k // GROUP, n),
            Entry(f"{module}.g_idx", "I32", (k,), exactly(groups)),
        ]

    return stored


def hqq(bits: int, axis: int, size: int = 64) -> Stored:
    packing = "3bit_32" if bits == 3 else f"{bits}bit_u8"

    def stored(module: str, n: int, k: int) -> list[Entry]:
        groups = n * k // size
        height, width = (size, groups) if axis == 0 else (groups, size)
        grid = (1, groups) if axis == 0 else (groups, 1)
        unit = ("I32", 10, words) if bits == 3 else ("U8", 8 // bits, codes)
        numbers = {"nbits": [bits], "axis": [axis], "shape": [n, k]}
        texts = {"packing": packing, "compute_dtype": "bfloat16"}
        return [
            Entry(f"{module}.W_q", unit[0], (-(-height // unit[1]), width), unit[2]),
            scales(f"{module}.scale", "BF16", *grid),
            Entry(f"{module}.zero", "BF16", grid, bfloat16(uniform(0, 1 << bits))),
            *(
                Entry(f"{module}.{x}", "I32", (len(v),), exactly(np.array(v, np.int32)))
                for x, v in numbers.items()
            ),
            *(
                Entry(f"{module}.{x}", "U8", (len(v),), exactly(np.frombuffer(v.encode(), np.uint8)))
                for x, v in texts.items()
            ),
        ]

    return stored


def aqlm(n_books: int, bits: int) -> Stored:
    dtype = "I16" if bits > 8 else "I8"
    return of(
        ("codes", dtype, lambda n, k: (n, k // 8, n_books), words16 if bits > 8 else codes),
        ("codebooks", "F16", lambda n, k: (n_books, 1 << bits, 1, 8), float16(normal(0.02))),
        ("scales", "F16", lambda n, k: (n, 1, 1, 1), None),
    )


def words16(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.integers(0, 1 << 16, n, dtype=np.uint16)


def mlx(mode: str, bits: int) -> Kind:
    width = 64 if mode == "affine" else 16 if mode == "nvfp4" else 32
    dtype = "BF16" if mode == "affine" else "U8"
    parts = [("weight", "U32", lambda n, k: (n, k * bits // 32), words)]
    if mode == "mxfp8":
        parts = [("weight", "U32", lambda n, k: (n, k // 4), lambda g, n: words(g, n) & 0xF7F7F7F7)]
    parts.append(("scales", dtype, rows_by(width), below(64, 40) if mode == "nvfp4" else None))
    if mode == "affine":
        parts.append(("biases", dtype, rows_by(width), None))
    return Kind({"mode": mode, "bits": bits, "group_size": width}, of(*parts), key="quantization")


def torchao(*parts: tuple[str, str, Callable[[int, int], tuple[int, ...]], Draw | None], kind: str) -> Kind:
    attributes = {"dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    said = json.dumps({"_type": kind, "_data": attributes, "_tensor_data_names": []})

    def metadata(names: list[str]) -> dict[str, str]:
        modules = sorted({name.rpartition("._weight_")[0] for name in names if "._weight_" in name})
        weights = [f"{module}.weight" for module in modules]
        return {"format": "pt", "tensor_names": json.dumps(weights)} | dict.fromkeys(weights, said)

    return Kind({"quant_method": "torchao"}, of(*parts), metadata=metadata)


def nf4(module: str, n: int, k: int) -> list[Entry]:
    return nf4_entries(f"{module}.weight", n, k)


CT = {"quant_method": "compressed-tensors"}


def ct_groups(bits: int) -> dict[str, object]:
    """compressed-tensors' section for integers in groups."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP}
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def of_hqq(bits: int, size: int = 64) -> dict[str, object]:
    """HQQ's section."""
    said = {"weight_quant_params": {"nbits": bits, "group_size": size}}
    return {"quant_method": "hqq", "quant_config": said}


GPTQ = {"quant_method": "gptq", "checkpoint_format": "gptq", "group_size": GROUP}
NVFP4 = (("weight_packed", "U8", rows_by(2), codes), ("weight_scale", "F8_E4M3", rows_by(16), None))
FP8_ROWS = (("weight", "F8_E4M3", whole, e4m3), ("weight_scale", "BF16", by_rows, None))
BITSANDBYTES = dict(llama_config(HIDDEN, INTER, LAYERS, VOCAB)["quantization_config"])  # type: ignore[call-overload]
KINDS = {
    "NF4": Kind(BITSANDBYTES, nf4),
    "LLM.int8": Kind(
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        of(("weight", "I8", whole, codes), ("SCB", "F32", lambda n, k: (n,), uniform(0.05, 0.1))),
    ),
    "FP8, blocks": Kind(
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        of(
            ("weight", "F8_E4M3", whole, e4m3),
            ("weight_scale_inv", "F32", lambda n, k: (n // 128, k // 128), None),
        ),
    ),
    "compressed-tensors FP8, rows": Kind(CT, of(*FP8_ROWS)),
    "compressed-tensors int8, rows": Kind(
        CT, of(("weight", "I8", whole, codes), ("weight_scale", "BF16", by_rows, None))
    ),
    "compressed-tensors W4A16": Kind(ct_groups(4), packed_integers(4)),
    "compressed-tensors W4A16, asymmetric": Kind(ct_groups(4), packed_integers(4, asymmetric=True)),
    "compressed-tensors W8A16": Kind(ct_groups(8), packed_integers(8)),
    "compressed-tensors W3A16": Kind(ct_groups(3), packed_integers(3)),
    "compressed-tensors NVFP4": Kind(CT, of(*NVFP4, ("weight_global_scale", "F32", one, uniform(90, 99)))),
    "compressed-tensors MXFP4": Kind(
        CT, of(("weight_packed", "U8", rows_by(2), codes), ("weight_scale", "U8", rows_by(32), None))
    ),
    "compressed-tensors MXFP8": Kind(
        CT, of(("weight", "F8_E4M3", whole, e4m3), ("weight_scale", "U8", rows_by(32), None))
    ),
    "ModelOpt NVFP4": Kind(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        of(
            ("weight", "U8", rows_by(2), codes),
            ("weight_scale", "F8_E4M3", rows_by(16), None),
            ("weight_scale_2", "F32", lambda n, k: (), SMALL),
        ),
    ),
    "FBGEMM FP8": Kind(
        {"quant_method": "fbgemm_fp8"},
        of(("weight", "F8_E4M3", whole, e4m3), ("weight_scale", "F32", by_rows, None)),
    ),
    **{f"MLX, {bits} bit": mlx("affine", bits) for bits in (2, 3, 4, 5, 6, 8)},
    **{f"MLX, {mode}": mlx(mode, bits) for mode, bits in (("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4))},
    "torchao int8": torchao(
        ("_weight_qdata", "I8", whole, codes), ("_weight_scale", "F32", by_rows, None), kind="Int8Tensor"
    ),
    "torchao NVFP4": torchao(
        ("_weight_qdata", "U8", rows_by(2), codes),
        ("_weight_scale", "F8_E4M3", rows_by(16), None),
        kind="NVFP4Tensor",
    ),
    "HQQ, 4 bit": Kind(of_hqq(4), hqq(4, 1)),
    "HQQ, 4 bit, axis 0": Kind(of_hqq(4), hqq(4, 0)),
    "HQQ, 3 bit": Kind(of_hqq(3), hqq(3, 1)),
    "HQQ, 8 bit": Kind(of_hqq(8), hqq(8, 1)),
    "AQLM, 2 × 8 bit": Kind({"quant_method": "aqlm"}, aqlm(2, 8)),
    "AQLM, 1 × 16 bit": Kind({"quant_method": "aqlm"}, aqlm(1, 16)),
    **{f"GPTQ, {bits} bit": Kind(GPTQ, gptq(bits)) for bits in (2, 3, 4, 8)},
    "GPTQ, 4 bit, act-order": Kind(GPTQ, gptq(4, act_order=True)),
    "AWQ": Kind(
        {"quant_method": "awq", "version": "gemm"},
        of(
            ("qweight", "I32", lambda n, k: (k, n // 8), words),
            ("qzeros", "I32", lambda n, k: (k // GROUP, n // 8), words),
            ("scales", "F16", lambda n, k: (k // GROUP, n), None),
        ),
    ),
}
GPT_OSS = "MXFP4 of gpt-oss"
TRANSPOSED = (GPT_OSS, *(name for name in KINDS if name.startswith(("GPTQ", "AWQ"))))
FORMATS = (*KINDS, GPT_OSS)
