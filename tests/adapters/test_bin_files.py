"""`.bin` adapters: a few bytes that stand for gigabytes, and tensors that are no plain values."""

import collections
import contextlib
import os

import build
import pytest
import torch
from safetensors.torch import load_file

import lorafuse
from lorafuse.adapters.reading.directory import AdapterDir, BinStore
from lorafuse.errors import AdapterError
from lorafuse.files.local_folder import LocalFolder


@pytest.fixture
def lora(tmp_path):
    return build.write_adapter(tmp_path / "lora")


def saved(lora, change, **how):
    """The adapter's tensors after `change`, as a `.bin`. Returns the first tensor's name."""
    tensors = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    torch.save(change(tensors), lora / "adapter_model.bin", **how)
    return next(iter(tensors))


def refused(lora, tmp_path):
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    with pytest.raises(AdapterError) as e:
        lorafuse.convert(ckpt, lora, tmp_path / "work/out")
    assert not (tmp_path / "work").exists() and e.value.exit_code == 4
    return str(e.value).removeprefix(f"{lora}/adapter_model.bin: ")


def first(tensor):
    """Puts a tensor in the place of the first."""
    return lambda tensors: tensors | {next(iter(tensors)): tensor}


NESTED = [torch.ones(2), torch.ones(3)]
CASES = {
    "coo": (torch.ones(4, 16).to_sparse(), "is a sparse tensor, which is not supported."),
    "csr": (torch.ones(4, 16).to_sparse_csr(), "is a sparse tensor, which is not supported."),
    "huge coo": (
        torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6)),
        "is a sparse tensor, which is not supported.",
    ),
    "nested": (torch.nested.nested_tensor(NESTED), "is a nested tensor, which is not supported."),
    "meta": (torch.empty(4, 16, device="meta"), "is a meta tensor, which is not supported."),
    "conj": (
        torch.ones(4, 16, dtype=torch.complex64).conj(),
        "is a conjugate tensor, which is not supported.",
    ),
    "neg": (
        torch.ones(4, 16, dtype=torch.complex64).conj().imag,
        "is a negated tensor, which is not supported.",
    ),
    "stride 0": (
        torch.zeros(1).expand(4_000_000_000),
        "has 16000000000 bytes by its shape, and 4 in the file.",
    ),
    "overlapping": (torch.zeros(9).unfold(0, 8, 1), "has 64 bytes by its shape, and 36 in the file."),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_plain_tensor_is_refused(case, lora, tmp_path):
    tensor, says = CASES[case]
    name = saved(lora, first(tensor))
    assert refused(lora, tmp_path) == f"{name} {says}"


@pytest.mark.parametrize("key", [0, None, b"x", 1.5, ("a",)])
def test_a_key_that_is_no_string_is_refused(key, lora, tmp_path):
    saved(lora, lambda tensors: tensors | {key: torch.ones(1)})
    assert refused(lora, tmp_path) == f"has the key {key!r}, which is no name of a tensor."


def test_many_copies_of_the_same_values_are_refused(lora, tmp_path):
    """Each fits into the file; all would be laid out anew."""
    square = torch.ones(64, 64).T[:, :63]
    saved(lora, lambda tensors: {f"x{i}": square[:-1] for i in range(50)})
    nbytes = (lora / "adapter_model.bin").stat().st_size
    assert square[:-1].nbytes * 50 > nbytes and not square[:-1].is_contiguous()
    says = f"unpacks to {square[:-1].nbytes * 50} bytes from {nbytes}; its tensors overlap."
    assert refused(lora, tmp_path) == says


class Code:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("true",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (print, "Unsupported global: GLOBAL print was not an allowed global by default."),
        (os.system, "Trying to load unsupported GLOBAL posix.system whose module posix is blocked."),
    ],
)
def test_torchs_advice_is_never_repeated(call, reason, zipped, lora, tmp_path):
    """It is to load with weights_only=False, which runs what a stranger put there."""
    saved(lora, lambda tensors: {"x": Code(call)}, _use_new_zipfile_serialization=zipped)
    assert refused(lora, tmp_path) == f"cannot be loaded safely (weights_only): {reason}"


def test_a_file_that_is_too_large_is_not_loaded(lora):
    saved(lora, dict)
    nbytes = (lora / "adapter_model.bin").stat().st_size
    BinStore(LocalFolder(lora), "adapter_model.bin", nbytes)
    with pytest.raises(AdapterError) as e:
        BinStore(LocalFolder(lora), "adapter_model.bin", nbytes - 1)
    assert str(e.value) == (
        f"{lora}/adapter_model.bin: has {nbytes} bytes, which are loaded at once; at most {nbytes - 1} are. "
        "Save it as adapter_model.safetensors."
    )


FORMS = {
    "dict": dict,
    "ordered": collections.OrderedDict,
    "parameters": lambda tensors: {k: torch.nn.Parameter(v) for k, v in tensors.items()},
    "transposed": lambda tensors: {k: v.T.contiguous().T for k, v in tensors.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_tensors_are_read_whatever_their_layout(form, zipped, lora):
    tensors = load_file(lora / "adapter_model.safetensors")
    saved(lora, FORMS[form], _use_new_zipfile_serialization=zipped)
    store = BinStore(LocalFolder(lora), "adapter_model.bin")
    assert list(store.tensors) == list(tensors)
    for name, tensor in tensors.items():
        data = bytearray(tensor.nbytes)
        store.read_into(name, 0, data)
        assert bytes(data) == tensor.numpy().tobytes()


def test_an_ordinary_file_is_read_by_ranges(lora, tmp_path):
    """It takes no memory, and makes what a safetensors file makes."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    expected = lorafuse.convert(ckpt, lora, tmp_path / "expected")
    saved(lora, lambda tensors: tensors)
    with contextlib.closing(AdapterDir(LocalFolder(lora))) as adapter:
        assert adapter.nbytes == 0 and not isinstance(adapter.store, BinStore)
    made = lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert [file["sha256"] for file in made["outputs"]] == [file["sha256"] for file in expected["outputs"]]


@pytest.mark.parametrize("how", [{"_use_new_zipfile_serialization": False}, {}])
def test_another_file_is_loaded_whole(lora, tmp_path, how):
    """One of torch before 1.6, and one whose tensors are stored column after column."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    expected = lorafuse.convert(ckpt, lora, tmp_path / "expected")
    by_columns = lambda tensors: {name: tensor.T.contiguous().T for name, tensor in tensors.items()}  # noqa: E731
    saved(lora, (lambda tensors: tensors) if how else by_columns, **how)
    with contextlib.closing(AdapterDir(LocalFolder(lora))) as adapter:
        assert adapter.nbytes == (lora / "adapter_model.bin").stat().st_size
        assert isinstance(adapter.store, BinStore)
    made = lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert [file["sha256"] for file in made["outputs"]] == [file["sha256"] for file in expected["outputs"]]
