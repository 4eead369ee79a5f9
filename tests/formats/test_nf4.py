"""`--format nf4|fp4|int8`: what bitsandbytes on the CPU makes of the merged weights, and without bias on these
grids; with `--base-quant`, the grid that training saw."""

import pytest
import torch
from quantized_anew import assert_stored, by_bitsandbytes, linear_weights
from safetensors.torch import load_file

import lorafuse

TARGETS = ["q_proj", "v_proj", "down_proj"]


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def expected_of(dense, kind, **settings):
    """Every stored tensor of the result, given that of `--format dense`."""
    linears = linear_weights(dense)
    made = {name: t for name, t in dense.items() if name not in linears}
    for name in linears:
        made |= by_bitsandbytes(name, dense[name], kind, **settings)
    return made


@pytest.mark.parametrize(
    ("dense", "kind", "options"),
    [
        ("bf16", "nf4", {}),
        ("fp16", "nf4", {"double_quant": False}),
        ("fp32", "nf4", {"quant_blocksize": 256}),
        ("bf16_odd", "nf4", {"quant_blocksize": 4096}),
        ("bf16_odd", "fp4", {"quant_blocksize": 32}),
        ("bf16", "fp4", {}),
        ("fp32", "fp4", {"double_quant": False, "quant_blocksize": 128}),
        ("bf16", "int8", {}),
        ("fp32", "int8", {}),
        ("bf16_odd", "int8", {}),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_as_bitsandbytes_makes_it_of_the_dense_result(dense, kind, options, use_dora, base, adapter, tmp_path):
    lora = adapter(dense, target_modules=TARGETS, use_dora=use_dora)
    lorafuse.convert(base(dense), lora, tmp_path / "dense")
    lorafuse.convert(base(dense), lora, tmp_path / "out", format=kind, **options)
    settings = {name.removeprefix("quant_"): value for name, value in options.items()}
    assert_stored(stored(tmp_path / "out"), expected_of(stored(tmp_path / "dense"), kind, **settings))
