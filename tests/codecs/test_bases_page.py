"""docs/bases.md says of each format how it is found, read and rounded, and who makes such checkpoints.

`python tests/codecs/test_bases_page.py` writes the tables between the page's marks from those below; README's
table has the titles.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from lorafuse.codecs import CODECS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "bases.md"
BETWEEN_MARKS = re.compile(r"(<!-- formats:begin -->\n)(.*?)(\n<!-- formats:end -->)", re.DOTALL)
TILES, BANDS = "tiles", "bands of outputs, 16 MB in all"
BNB = "bitsandbytes on the training machine; unsloth's `…-bnb-4bit`"
CT = "llm-compressor (RedHatAI and others)"


class Row(NamedTuple):
    """A format that a codec reads: whether `--format base` writes it, and whose checkpoints have it."""

    codec: str
    title: str
    found: str
    read: str
    values: str
    memory: str
    light: str
    made_by: str


ROWS = (
    Row(
        "bnb4",
        "bitsandbytes NF4, FP4 (`bitsandbytes`)",
        "`X.quant_state.bitsandbytes__nf4` or `…fp4`",
        "single and double quantization, any block size and storage dtype, HF Conv1D",
        "T of the quant_state; T(fp32 product)",
        TILES,
        "yes",
        BNB,
    ),
    Row(
        "bnb8",
        "bitsandbytes LLM.int8 (`bitsandbytes`)",
        "`M.SCB` beside `M.weight` I8",
        "HF Conv1D too",
        "fp32, not rounded to T first",
        TILES,
        "yes",
        "bitsandbytes on the training machine",
    ),
    Row(
        "fp8",
        "FP8 (`fp8`: DeepSeek-V3, Kimi-K2, Qwen3-FP8, MiniMax)",
        "`X_scale_inv`, `M.scale` or `M.qscale_weight` beside F8",
        "a scale for each block or tensor, ragged blocks, scales in F32, F16, BF16 or E8M0, all "
        "float8 dtypes, experts in stacks",
        "T(fp32 product)",
        TILES,
        "yes",
        "DeepSeek, Moonshot, Qwen, MiniMax, Mistral",
    ),
    Row(
        "fp8",
        "FP4 experts of FP8 (`fp8` with `expert_dtype: fp4`)",
        "the same beside I8",
        "groups of 32",
        "T(fp32 product)",
        TILES,
        "yes",
        "DeepSeek",
    ),
    Row(
        "mxfp4",
        "MXFP4 (`mxfp4`: gpt-oss)",
        "`P_blocks` and `P_scales`",
        "stacks of experts, transposed to (experts, in, out) as the dense model has them",
        "T(fp32 product)",
        "one expert whole, two at most at a time",
        "yes",
        "OpenAI",
    ),
    Row(
        "compressed_tensors",
        "compressed-tensors (`compressed-tensors`), FP8 and int8",
        "`M.weight_scale` beside F8 or I8",
        "a scale for each tensor, row, group or block; zero points; MXFP8",
        "S((code − zero) · scale), then T; S is the dtype of `weight_scale` (MXFP8: bfloat16)",
        TILES,
        "yes",
        CT,
    ),
    Row(
        "compressed_tensors",
        "compressed-tensors, packed integers",
        "`M.weight_packed` I32 with `M.weight_scale` and `M.weight_shape`",
        "1 to 8 bits, symmetric and asymmetric, `weight_g_idx`, words with padding as they were until 2026",
        "as above",
        TILES,
        "yes",
        f"{CT}, Moonshot (Kimi-K2-Thinking), auto-round",
    ),
    Row(
        "compressed_tensors",
        "compressed-tensors NVFP4, MXFP4, MXFP6",
        "`M.weight_packed` U8 with `M.weight_scale`",
        "with and without quantized activations",
        "bfloat16, then T",
        TILES,
        "yes",
        CT,
    ),
    Row(
        "modelopt",
        "ModelOpt (`modelopt`, `modelopt_mixed`, `modelopt_fp4`)",
        "`M.weight_scale` with a config of ModelOpt, or `M.weight_scale_2`, or shapes that only ModelOpt has",
        "FP8 and INT8 by tensor, row or block, NVFP4, MXFP4, MXFP8",
        "T(fp32 product)",
        TILES,
        "yes",
        "NVIDIA",
    ),
    Row(
        "fbgemm_fp8",
        "FBGEMM FP8 (`fbgemm_fp8`)",
        "`M.weight_scale` with its config; `X_scale` beside an F8 stack",
        "a scale for each output; Llama 4's experts",
        "T(fp32 product)",
        TILES,
        "yes",
        "Meta (Llama-3.1-405B-FP8)",
    ),
    Row(
        "gptq",
        "GPTQ (`gptq`, and `auto-round` in this layout)",
        "`M.qweight` I32 as wide as `M.scales`, with `M.qzeros`",
        "versions 1 and 2, 2, 3, 4 and 8 bit, act-order (`M.g_idx`), bits of single modules (`dynamic`), HF "
        "Conv1D",
        "S(scale · (code − zero)), then T; S is the dtype of `scales`",
        BANDS,
        "yes",
        "GPTQModel, AutoGPTQ, auto-round (Qwen, Intel, and many others)",
    ),
    Row(
        "awq",
        "AWQ (`awq`, and `auto-round` in this layout)",
        "`M.qweight` I32, an eighth as wide as `M.scales`",
        "`gemm` of 4 bit, with and without zero points",
        "T((code − zero) · T(scale))",
        BANDS,
        "yes",
        "AutoAWQ, auto-round (Qwen and many others)",
    ),
    Row(
        "mlx",
        "MLX (no `quant_method`; `quantization`)",
        "`M.scales` beside `M.weight` U32",
        "affine of 2, 3, 4, 5, 6 and 8 bit, mxfp4, mxfp8, nvfp4, bits of single modules, embeddings, stacks "
        "of experts",
        "affine: S(S(code · scale) + bias), S the dtype of `scales`; else T(fp32 product)",
        TILES,
        "yes",
        "mlx-lm (mlx-community)",
    ),
    Row(
        "torchao",
        "torchao (`torchao`)",
        "`M._weight_qdata` and `M._weight_scale`",
        "Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor, NVFP4Tensor, swizzled or not; T is the dtype in "
        "the header's metadata",
        "T(fp32 product)",
        TILES,
        "no",
        "torchao through transformers",
    ),
    Row(
        "hqq",
        "HQQ (`hqq`)",
        "`M.W_q`, `M.scale`, `M.zero` and what says how",
        "1, 2, 3, 4, 5, 6 and 8 bit, both axes",
        "C(C(code − zero) · scale), then T; C is `compute_dtype`",
        TILES,
        "no",
        "hqq through transformers 4",
    ),
    Row(
        "aqlm",
        "AQLM (`aqlm`)",
        "`M.codes`, `M.codebooks`, `M.scales`",
        "any number of codebooks and size of groups",
        "S(S(fp32 sum) · scale), then T; S is the dtype of `codebooks`",
        "the codebooks of a weight",
        "no",
        "ISTA-DASLab",
    ),
)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables() -> str:
    """What lies between the marks."""
    read = [(row.title, row.found, row.read, row.values) for row in ROWS]
    held = [(row.title, row.memory, row.light, row.made_by) for row in ROWS]
    return "\n\n".join(
        [
            table(("format (`quant_method`)", "found by", "what is read", "W, and how it is rounded"), read),
            table(("format", "held beside its tiles", "`--format base`", "made by"), held),
        ]
    )


def test_the_page_is_that_of_the_table():
    found = BETWEEN_MARKS.search(PAGE.read_text(encoding="utf-8"))
    assert found and found[2] == tables(), "python tests/codecs/test_bases_page.py writes it anew"


def test_every_codec_has_a_row():
    names = [codec.__name__.rpartition(".")[2] for codec in CODECS]
    assert {row.codec for row in ROWS} == set(names) - {"dense"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_readme_has_a_row_of_each(row):
    assert f"\n| {row.title} | " in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.__name__)
def test_the_page_names_every_quant_method(codec):
    titles = " ".join(row.title for row in ROWS)
    assert all(f"`{method}`" in titles or "/" in method for method in codec.QUANT_METHODS)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BETWEEN_MARKS.sub(lambda m: m[1] + tables() + m[3], text), encoding="utf-8")
