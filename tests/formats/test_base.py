"""`--format base`: what changes stays on the base's own grid, without bias; all else is the base's own bytes."""

import json

import numpy as np
import own_grid
import pytest
import torch
from safetensors.torch import load_file

import lorafuse

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "": ["q_proj", "v_proj", "down_proj"]}
KINDS = [
    "nf4",
    "nf4_dq",
    "nf4_fp16",
    "fp4_dq",
    "nf4_bs256",
    "nf4_bf16storage",
    "fp4_fp32storage",
    "nf4_odd",
    "int8",
]
GPT2 = ["gpt2_nf4", "gpt2_int8"]


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())
    )


@pytest.fixture
def merged(base, adapter, tmp_path):
    """merged(kind, …) → the base, the adapter, what the sums are in fp32, and the receipt of tmp_path/out."""

    def make(kind, **options):
        targets = TARGETS["gpt2" if kind.startswith("gpt2") else ""]
        lora = adapter(kind, target_modules=targets, fan_in_fan_out=kind.startswith("gpt2"))
        lorafuse.convert(base(kind), lora, tmp_path / "sums", dtype="float32", adapter_scale=0.1)
        receipt = lorafuse.convert(
            base(kind), lora, tmp_path / "out", format="base", adapter_scale=0.1, **options
        )
        return stored(base(kind)), lora, stored(tmp_path / "sums"), receipt

    return make


@pytest.mark.parametrize("kind", KINDS + GPT2)
def test_codes_are_those_of_the_definition(kind, merged, base, tmp_path):
    was, _, sums, receipt = merged(kind)
    found = stored(tmp_path / "out")
    assert found.keys() == was.keys()
    changed = [name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"]
    assert changed
    for name in was.keys() - set(changed):
        assert same(found[name], was[name]), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config["quantization_config"]
        == json.loads((base(kind) / "config.json").read_text())["quantization_config"]
    )
    for name in changed[:3]:
        codes, values = own_grid.grid_of(was, name)
        x, u = sums[name].double(), own_grid.uniform(name, sums[name].numel())
        if kind in GPT2:  # stored (out, in): indexes are those of (in, out)
            x, u = x.T.contiguous(), np.ascontiguousarray(u.reshape(x.shape).T).reshape(-1)
        expected, n_clipped = own_grid.rounded(codes, values, x.reshape(-1), u)
        made, _ = own_grid.grid_of(found, name)
        assert torch.equal(values.gather(1, made[:, None]), values.gather(1, expected[:, None])), name
        entry = receipt["tensors"][name]
        assert entry["clipped"] == pytest.approx(n_clipped / len(codes))
        w, s = (values.gather(1, of[:, None]).view(-1) for of in (codes, made))
        delta = x.reshape(-1) - w
        assert entry["kept"] == pytest.approx(float((s - w) @ delta / (delta @ delta)), rel=1e-3)
        assert entry["changed"] == pytest.approx(float((s != w).double().mean()))
