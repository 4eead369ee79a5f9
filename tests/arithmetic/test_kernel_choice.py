"""Whether the compiled kernel is used: LORAFUSE_KERNEL, and what there is. The bytes are the same."""

import json
import shutil

import pytest
from build import files_of
from compiled_kernel import at_every_level

import lorafuse
from lorafuse.arithmetic import kernel
from lorafuse.cli import lorafuse as command
from lorafuse.errors import UsageError


@pytest.fixture
def installed(kernel_path, monkeypatch):
    """The kernel of these sources, as if it were installed."""
    best = at_every_level(kernel_path)[-1]
    monkeypatch.setattr(kernel, "installed", lambda: best)
    return best


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(kernel, "installed", lambda: None)


@pytest.mark.parametrize("wish", [None, "", "auto", "on"])
def test_it_is_used_where_it_is_there(wish, installed, monkeypatch):
    monkeypatch.delenv(kernel.SWITCH, raising=False)
    if wish is not None:
        monkeypatch.setenv(kernel.SWITCH, wish)
    assert kernel.chosen() is installed
    assert kernel.described() in kernel.LEVELS


def test_it_is_not_used_where_it_is_not_wanted(installed, monkeypatch):
    monkeypatch.setenv(kernel.SWITCH, "off")
    assert kernel.chosen() is None
    assert kernel.described() == "none"


def test_without_one_torch_does_all(none_installed, monkeypatch):
    monkeypatch.setenv(kernel.SWITCH, "auto")
    assert kernel.chosen() is None


@pytest.mark.parametrize(("wish", "word"), [("on", "installed without"), ("yes", "off, on or auto")])
def test_a_wish_that_cannot_be_met_is_refused(
    wish, word, none_installed, base, adapter, monkeypatch, tmp_path
):
    lora = adapter("nf4")
    monkeypatch.setenv(kernel.SWITCH, wish)
    for options in ({}, {"format": "base"}, {"dry_run": True}):
        with pytest.raises(UsageError, match=word):
            lorafuse.convert(base("nf4"), lora, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exited:
        command.main(["--version"], prog_name="lorafuse")
    assert exited.value.code == 2


def test_what_is_no_kernel_of_this_version_is_none(kernel_path, tmp_path, monkeypatch):
    assert kernel.load(str(tmp_path / "missing.so")) is None
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert kernel.load(str(broken)) is None
    other = shutil.copy(kernel_path, tmp_path / "other.so")
    monkeypatch.setattr(kernel, "INTERFACE", kernel.INTERFACE + 1)
    assert kernel.load(str(other)) is None


@pytest.mark.parametrize("format", ["dense", "base"])
@pytest.mark.parametrize("kind", ["nf4_dq", "fp4_fp32storage", "nf4_fp16", "nf4_odd", "int8", "gpt2_nf4"])
def test_a_merge_has_the_same_bytes(kind, format, installed, base, adapter, monkeypatch, tmp_path):
    """With the kernel and without; and the measures to 1e-6."""
    gpt2 = kind.startswith("gpt2")
    lora = adapter(kind, target_modules=["c_attn"] if gpt2 else ["q_proj", "down_proj"], fan_in_fan_out=gpt2)
    receipts, files = [], []
    for wish in ("on", "off"):
        monkeypatch.setenv(kernel.SWITCH, wish)
        out = tmp_path / wish
        receipts.append(lorafuse.convert(base(kind), lora, out, format=format))
        files.append({name: data for name, data in files_of(out).items() if "receipt" not in name})
    assert files[0] == files[1]
    assert [receipt["tool"]["kernel"] for receipt in receipts] == [str(installed), "none"]
    assert receipts[0]["plan_id"] == receipts[1]["plan_id"]
    assert json.dumps(receipts[0]["outputs"]) == json.dumps(receipts[1]["outputs"])
    for name, entry in receipts[1]["tensors"].items():
        for measure, expected in entry.items():
            found = receipts[0]["tensors"][name][measure]
            if isinstance(expected, float):
                assert found == pytest.approx(expected, rel=1e-6), (name, measure)
            else:
                assert found == expected, (name, measure)
