"""How weights are stored: what every encoder promises, results that keep a base's own quantized tensors, and
a new format."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorafuse
from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
from lorafuse.codecs.plain import PlainEncoder
from lorafuse.codecs.stored import StoredEncoder
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box, StoredTensor, TensorSpec
from lorafuse.formats import FORMATS
from lorafuse.formats.dense import Dense

CPU = torch.device("cpu")


def stored_files(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as f:
            tensors |= {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    return tensors


@pytest.fixture
def formats(monkeypatch):
    """Formats by word, as a later version would add them."""
    return lambda word, make: monkeypatch.setitem(FORMATS, word, make)


@pytest.mark.parametrize("kind", ["nf4_dq", "int8"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_what_nothing_changes_can_stay_as_it_is_stored(kind, max_shard_size, base, adapter, tmp_path):
    """Every companion with it, in the same file or another; what the adapter changes is as in a dense
    result."""
    ckpt, lora = base(kind), adapter(kind, target_modules=["q_proj"])
    dense = lorafuse.convert(ckpt, lora, tmp_path / "dense")
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "mixed", format="mixed", max_shard_size=max_shard_size)
    was, full, found = (
        {k: v for p in d.glob("*.safetensors") for k, v in load_file(p).items()}
        for d in (ckpt, tmp_path / "dense", tmp_path / "mixed")
    )
    changed = {name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"}
    modules = tuple(w.removesuffix("weight") for w in changed)
    companions = {name for name in was if name.startswith(modules) and not name.endswith(".bias")}
    assert changed and found.keys() == (was.keys() - companions) | changed
    for name, tensor in found.items():
        expected = full[name] if name in changed else was[name]
        assert torch.equal(tensor.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)), name
    assert {n: receipt["tensors"][n]["kept"] for n in changed} == {
        n: dense["tensors"][n]["kept"] for n in changed
    }
    assert "quantization_config" in json.loads((tmp_path / "mixed/config.json").read_text())
    assert any("stored" in entry for entry in receipt["tensors"].values())
    assert lorafuse.verify(tmp_path / "mixed")["files"] == len(receipt["outputs"])


def test_a_run_of_bytes_may_span_tensors(base, tmp_path):
    """Whatever the runs, every byte of every tensor comes once, at its place."""
    with_store = Checkpoint(LocalFolder(base("nf4_dq")))
    weight = next(name for name in with_store.tensors if name.endswith("q_proj.weight"))
    names = {n: n for n in with_store.tensors if n.startswith(weight)}
    encoder = StoredEncoder(with_store, names)
    size = sum(tensor.nbytes for tensor in encoder.tensors)
    for step in (1, 7, 100, 1 << 20):
        made = {tensor.name: bytearray(tensor.nbytes) for tensor in encoder.tensors}
        for start in range(0, size, step):
            stop = min(start + step, size)
            buffer = torch.empty(step, dtype=torch.uint8)
            for piece in encoder.copy(start, stop, buffer):
                part = buffer[piece.start : piece.start + piece.nbytes]
                made[piece.tensor][piece.at : piece.at + piece.nbytes] = bytes(part.tolist())
        for name, data in made.items():
            stored = bytearray(with_store.tensors[name].spec.nbytes)
            with_store.read_into(name, 0, stored)
            assert data == stored
    with_store.close()


class ScaledEncoder(Encoder):
    """int8 with one scale for the whole weight, which needs a pass over it; the scale is the file's first
    tensor and is written with the last tile."""

    needs_pass = True

    def __init__(self, weight) -> None:
        self.name, self.numel = weight.name, weight.spec.numel
        scale = StoredTensor(f"{weight.name}.scale", TensorSpec("F32", ()))
        self.tensors = (scale, StoredTensor(weight.name, TensorSpec("I8", weight.spec.shape)))
        self.scale = None

    @property
    def key(self):
        return ("toy",)

    def tile_nbytes(self, n):
        return n + 4

    def prepare(self, tiles):
        self.scale = max(float(values.abs().max()) for _, values in tiles()) / 127

    def encode(self, tile, buffer, arena):
        start, stop = tile.start, tile.stop
        codes = (tile.values.float() / self.scale).round_().to(torch.int8)
        buffer[: stop - start].view(torch.int8).copy_(codes)
        pieces = [Piece(self.name, start, 0, stop - start)]
        if stop == self.numel:
            buffer[stop - start : stop - start + 4].copy_(torch.tensor([self.scale]).view(torch.uint8))
            pieces.append(Piece(f"{self.name}.scale", 0, stop - start, 4))
        return Encoded(tuple(pieces), (codes,))

    def decode(self, encoded, arena):
        return encoded.raw[0].float() * self.scale


class Toy(Dense):
    """What an adapter changes is scaled."""

    def encoder_of(self, weight):
        return super().encoder_of(weight) if weight.untouched else ScaledEncoder(weight)

    def config(self):
        return {"quantization_config": {"quant_method": "toy"}}


@pytest.mark.parametrize("tile_numel", [1 << 19, 640])
def test_a_new_format_is_an_encoder_and_a_word(tile_numel, base, adapter, formats, tmp_path, monkeypatch):
    """It makes several tensors of a weight, out of order, after a pass over what the adapter makes of it; the
    receipt's figures are those of what a reader decodes."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", tile_numel)
    ckpt, lora = base("bf16"), adapter("bf16", target_modules=["q_proj", "down_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "dense", dtype="float32")
    formats("toy", Toy)
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "toy", format="toy")
    (full,) = (load_file(p) for p in (tmp_path / "dense").glob("*.safetensors"))
    (found,) = (load_file(p) for p in (tmp_path / "toy").glob("*.safetensors"))
    (was,) = (load_file(p) for p in ckpt.glob("*.safetensors"))
    merged = [name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"]
    assert merged
    for name in merged:
        scale, entry = found[f"{name}.scale"], receipt["tensors"][name]
        assert scale == full[name].abs().max() / 127
        decoded, w, v = (t.double().numpy() for t in (found[name].float() * scale, was[name], full[name]))
        delta = v - w
        assert np.abs(decoded - v).max() <= float(scale) / 2 + 1e-9
        assert entry["kept"] == pytest.approx(((decoded - w) * delta).sum() / (delta**2).sum(), rel=1e-3)
        assert entry["stored"] == {
            f"{name}.scale": {"dtype": "float32", "shape": []},
            name: {"dtype": "int8", "shape": list(w.shape)},
        }
    assert json.loads((tmp_path / "toy/config.json").read_text())["quantization_config"] == {
        "quant_method": "toy"
    }


def test_the_plain_encoder_rounds_to_nearest_even(tmp_path):
    spec = TensorSpec("BF16", (2, 3))
    values = torch.tensor([1.0, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    buffer = torch.empty(12, dtype=torch.uint8)
    tile = FinishedTile(0, 6, values, values, (), Box.whole(spec))
    encoded = PlainEncoder("w", spec).encode(tile, buffer, Arena(CPU))
    assert encoded.pieces == (Piece("w", 0, 0, 12),)
    expected = [1.0, 1.0, 1 + 2**-7, 1.0, 1 + 2**-6, -1.0]
    assert buffer.view(torch.bfloat16).tolist() == expected
    assert PlainEncoder("w", spec).decode(encoded, Arena(CPU)).tolist() == expected
