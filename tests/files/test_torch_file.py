"""pytorch_model.bin: what is read of it is what torch.load loads, and what is no plain file of torch.save is
refused."""

import math
import zipfile
from contextlib import closing

import pytest
import torch
from build import checkpoint_tensors, files_of, write_adapter, write_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafuse
from lorafuse.errors import CheckpointError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.stores import read_all

AGAIN = "Load it with transformers and save it with save_pretrained, which makes safetensors."
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool)


def write_bin(path, tensors, n_files=1, **kwargs):
    """A checkpoint of .bin files, sharded as transformers did it."""
    write_checkpoint(path)
    for file in path.glob("model*.safetensors*"):
        file.unlink()
    names = [f"pytorch_model-{number:05d}-of-{n_files:05d}.bin" for number in range(1, n_files + 1)]
    names = ["pytorch_model.bin"] if n_files == 1 else names
    weight_map = {name: names[number % n_files] for number, name in enumerate(tensors)}
    for file in names:
        torch.save({k: t for k, t in tensors.items() if weight_map[k] == file}, path / file, **kwargs)
    if n_files > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        write_json(path / "pytorch_model.bin.index.json", index)
    return path


def read_whole(path):
    with closing(Checkpoint(LocalFolder.at(str(path)))) as ckpt:
        return {
            name: (info.spec.torch_name, info.spec.shape, bytes(read_all(ckpt, name)))
            for name, info in ckpt.tensors.items()
        }


def in_bytes(tensors):
    return {
        name: (
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"",
        )
        for name, t in tensors.items()
    }


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    n_files=st.integers(1, 3),
)
def test_every_tensor_is_what_torch_loads(tmp_path_factory, seed, shapes, n_files):
    torch.manual_seed(seed)
    tensors = {
        f"model.w{number}": torch.randint(0, 100, shape).to(DTYPES[(seed + number) % len(DTYPES)])
        for number, shape in enumerate(shapes)
    }
    path = write_bin(tmp_path_factory.mktemp("bin") / "ckpt", tensors, min(n_files, len(tensors)))
    loaded = {k: t for file in path.glob("*.bin") for k, t in torch.load(file, weights_only=True).items()}
    assert read_whole(path) == in_bytes(loaded)


def test_views_of_one_storage_and_parameters(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    tensors = {
        "all": whole,
        "tied": whole,
        "rows": whole[2:4],
        "trained": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
    }
    assert read_whole(write_bin(tmp_path / "ckpt", tensors)) == in_bytes(
        {name: tensor.detach() for name, tensor in tensors.items()}
    )


@pytest.mark.parametrize("n_files", [1, 3])
def test_a_merge_into_it_is_that_into_safetensors(tmp_path, n_files):
    tensors = checkpoint_tensors()
    same, lora = write_checkpoint(tmp_path / "safetensors"), write_adapter(tmp_path / "lora")
    ckpt = write_bin(tmp_path / "bin", tensors, n_files)
    lorafuse.convert(same, lora, tmp_path / "a")
    lorafuse.convert(ckpt, lora, tmp_path / "b")
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} == {"lorafuse_receipt.json"}
    assert lorafuse.verify(tmp_path / "b", ckpt=ckpt, adapters=[lora])["weights"] == len(tensors)
    assert lorafuse.inspect(ckpt)["kind"] == "checkpoint"


@pytest.mark.parametrize("stream", [False, True])
def test_a_base_on_the_hub(hub, tmp_path, stream):
    ckpt = write_bin(tmp_path / "ckpt", checkpoint_tensors(), 3)
    hub.add("org/base", ckpt)
    lora = write_adapter(tmp_path / "lora")
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    lorafuse.convert("org/base", lora, tmp_path / "fetched", stream=stream)
    local, fetched = files_of(tmp_path / "local"), files_of(tmp_path / "fetched")
    assert local["model.safetensors"] == fetched["model.safetensors"]
    assert lorafuse.inspect("org/base")["kind"] == "checkpoint"


def test_safetensors_beside_it_are_taken(tmp_path):
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(2)})
    write_checkpoint(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(ckpt / "model.safetensors")
    assert "w" not in read_whole(ckpt)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_whole(path)
    return str(caught.value).removeprefix(f"{path / 'pytorch_model.bin'}: ")


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"w": torch.zeros(3, 4).t()}, f"w is not stored row after row. {AGAIN}"),
        (
            {"w": torch.zeros(3, dtype=torch.complex128)},
            "w has the dtype torch.complex128, which is not supported.",
        ),
        ({3: torch.zeros(3)}, "has the key 3, which is no name of a tensor."),
        ({"w": [1, 2]}, "does not hold a dict of tensors."),
        ([torch.zeros(3)], "does not hold a dict of tensors."),
        ({"w": torch.zeros(3, 4).to_sparse_csr()}, f"w is not stored row after row. {AGAIN}"),
        ({"w": torch.zeros(3).to_sparse()}, f"w is not stored row after row. {AGAIN}"),
    ],
)
def test_what_is_no_dict_of_plain_tensors(tmp_path, saved, message):
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(1)})
    torch.save(saved, ckpt / "pytorch_model.bin")
    assert refusal(ckpt) == message


def test_code_is_not_run(tmp_path, capsys):
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(1)})
    torch.save({"w": Harmful()}, ckpt / "pytorch_model.bin")
    assert refusal(ckpt).startswith("cannot be loaded safely (weights_only): ")
    assert capsys.readouterr().out == ""


def test_the_format_of_old_versions(tmp_path):
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(5)}, _use_new_zipfile_serialization=False)
    assert refusal(ckpt) == (
        "is no whole archive of torch.save (torch before 1.6 wrote others): File is not a zip file. " + AGAIN
    )


def test_a_compressed_archive(tmp_path):
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(500)})
    file = ckpt / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    assert "is compressed; torch.save does not compress." in refusal(ckpt)


def test_a_storage_that_ends_behind_the_file(tmp_path):
    """The local header, which says where the data begin, is not checked by zipfile."""
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(500)})
    file = ckpt / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    data = bytearray(file.read_bytes())
    data[entry.header_offset + 28 : entry.header_offset + 30] = b"\xff\xff"  # the length of its extra field
    file.write_bytes(data)
    assert refusal(ckpt) == f"{entry.filename} ends behind the end of the file."


def test_a_storage_that_is_shorter_than_its_tensor(tmp_path):
    ckpt = write_bin(tmp_path / "ckpt", {"w": torch.zeros(500)})
    file = ckpt / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part[:100] if name.endswith("/data/0") else part)
    assert refusal(ckpt) == "the values of w are not in the file."


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_in_its_bounds(tmp_path_factory, data):
    """Any byte changed, or the end cut off: a refusal, or tensors all of whose bytes lie in the file."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    if not path.exists():
        write_bin(path, {"a": torch.arange(20.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)})
        (path / "good").write_bytes((path / "pytorch_model.bin").read_bytes())
    good = bytearray((path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    damaged = bytes(good[:cut] if data.draw(st.booleans()) else good)
    (path / "pytorch_model.bin").write_bytes(damaged)
    try:
        tensors = read_whole(path)
    except CheckpointError as e:
        assert str(e).startswith(f"{path}/pytorch_model.bin: ")
        return
    for dtype, shape, values in tensors.values():
        assert len(values) == math.prod(shape) * getattr(torch, dtype).itemsize
        assert values in damaged
