"""Weights that were trained beside an adapter and lie in files of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from safetensors.torch import load_file

import lorafuse
from lorafuse.adapters.reading.beside import TRAINED_BESIDE
from lorafuse.errors import AdapterError

NORM = "model.norm.weight"


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def warnings_of(ckpt: Path, lora: Path, out: Path) -> list[str]:
    events: list[dict[str, Any]] = []
    lorafuse.convert(ckpt, lora, out, on_event=events.append)
    return [event["message"] for event in events if event["event"] == "warning"]


@pytest.mark.parametrize("file", TRAINED_BESIDE)
@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.norm.weight",
        NORM,
        "base_model.model.model.norm.modules_to_save.default.weight",
        "module.base_model.model.model.norm.weight",
    ],
)
def test_they_replace_weights(file: str, key: str, ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """To the bit, and the adapter's update of other weights is as without them."""
    trained = torch.randn(16).to(torch.bfloat16)
    plain = tmp_path / "plain"
    assert warnings_of(ckpt, lora, plain) == []
    torch.save({key: torch.nn.Parameter(trained)}, lora / file)
    assert warnings_of(ckpt, lora, tmp_path / "out") == []
    expected = load_file(plain / "model.safetensors") | {NORM: trained}
    made = load_file(tmp_path / "out/model.safetensors")
    assert (
        all(torch.equal(made[name], expected[name]) for name in expected) and made.keys() == expected.keys()
    )
    receipt = json.loads((tmp_path / "out/lorafuse_receipt.json").read_text())
    assert receipt["tensors"][NORM]["action"] == "replaced" and key in receipt["adapter_tensors"]["used"]
    assert f"{lora}/{file}" in [entry["path"] for entry in receipt["inputs"]]
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])
    assert lorafuse.inspect(str(lora))["beside"] == [file]


def test_what_finds_no_place_is_refused(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    torch.save({"model.mm_projector.0.weight": torch.ones(2)}, lora / "mm_projector.bin")
    with pytest.raises(AdapterError, match=r"mm_projector\.bin: .*model\.mm_projector\.0"):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    torch.save({NORM: torch.ones(17)}, lora / "mm_projector.bin")
    with pytest.raises(
        AdapterError, match=r"model\.norm\.weight is \[17\], but model\.norm\.weight is \[16\]"
    ):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    torch.save({NORM: torch.full((16,), torch.nan)}, lora / "mm_projector.bin")
    with pytest.raises(AdapterError, match=r"16 of 16 values of model\.norm\.weight are not finite"):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    (lora / "mm_projector.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AdapterError, match=r"mm_projector\.bin: is a git-LFS pointer"):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_tensor_in_two_files(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    for file in TRAINED_BESIDE[:2]:
        torch.save({NORM: torch.ones(16)}, lora / file)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight is also in .*; which is meant\?"):
        lorafuse.convert(ckpt, lora, tmp_path / "out")


def test_other_weights_are_said(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """Training state and intermediate adapters of MLX-LM are no weights of the result."""
    for file in ("optimizer.pt", "rng_state.pth", "training_args.bin", "0000100_adapters.safetensors"):
        (lora / file).touch()
    assert warnings_of(ckpt, lora, tmp_path / "out") == []
    for file in ("value_head.safetensors", "lm_head.pt"):
        (lora / file).touch()
    assert warnings_of(ckpt, lora, tmp_path / "out 2") == [
        f"{lora}: lm_head.pt, value_head.safetensors are not read; what training changed there is not in the "
        "result."
    ]


def test_beside_a_bin_adapter(ckpt: Path, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "bin")
    (lora / "adapter_model.safetensors").unlink()
    torch.save(adapter_tensors(checkpoint_tensors()), lora / "adapter_model.bin")
    torch.save({NORM: torch.ones(16)}, lora / "non_lora_trainables.bin")
    assert warnings_of(ckpt, lora, tmp_path / "out") == []
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[NORM].float(), torch.ones(16))
