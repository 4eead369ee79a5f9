"""`lorafuse inspect` of a hub id: the hub is a directory here, whose headers the hub's library would read
from afar."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import build
import huggingface_hub
import pytest
from fake_hub import hub_error, wanted
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors import safe_open
from valid_inputs import KINDS_DAMAGED, ckpt_of

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError, StorageError


def header_of(path):
    """A file's header as huggingface_hub gives it."""
    tensors = {}
    with safe_open(path, framework="np") as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            part = f.get_slice(name)
            tensors[name] = TensorInfo(dtype=part.get_dtype(), shape=part.get_shape(), data_offsets=(0, 0))
    return SafetensorsFileMetadata(metadata={}, tensors=tensors)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, org/name, a directory to fill; `fetched` are the files that were
    downloaded."""
    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"
    snapshot.mkdir()

    def snapshot_download(repo_id, **options):
        assert repo_id == "org/name"
        for path in [p for p in repository.rglob("*") if p.is_file()]:
            file = path.relative_to(repository)
            if wanted(options, str(file)):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / file)
        return str(snapshot)

    def get_safetensors_metadata(repo_id, *, revision=None):
        files = {path.name: header_of(path) for path in repository.glob("*.safetensors")}
        if not files:
            raise hub_errors.NotASafetensorsRepoError("the hub's own words")
        return SafetensorsRepoMetadata(metadata=None, sharded=True, weight_map={}, files_metadata=files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    monkeypatch.chdir(tmp_path)
    return repository


def fetched():
    return sorted(str(path.relative_to("snapshot")) for path in Path("snapshot").rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["nf4_dq", "int8", "bf16_tied", "gpt2"])
def test_checkpoint(hub, base, kind):
    """Config and headers alone tell what they can, and no weight is fetched; block size and decoded dtype
    they do not."""
    shutil.copytree(base(kind), hub)
    facts, local = lorafuse.inspect("org/name@main"), lorafuse.inspect(hub)
    assert fetched() == ["config.json"]
    assert facts["path"] == "org/name@main"
    rows = [
        {**row, "scheme": row["scheme"].replace(", block size 64", ""), "blocksize": None}
        for row in local["storage"]
    ]
    for row in rows:
        row["dtype"] = None if row["quantized"] else row["dtype"]
    assert facts["storage"] == rows
    quantized = kind in ("nf4_dq", "int8")
    known = [
        "model_type",
        "architectures",
        "vocab_size",
        "tied",
        "n_weights",
        "n_parameters",
        "nbytes",
        "files",
        "problems",
    ]
    for field in known if quantized else [*known, "auto_dtypes"]:
        assert facts[field] == local[field], field
    assert (facts["auto_dtypes"] is None) == quantized


def test_checkpoint_that_was_fetched_before(hub, base):
    """What is in the cache is read, and tells all."""
    shutil.copytree(base("nf4"), hub)
    shutil.copytree(hub, "snapshot", dirs_exist_ok=True)
    assert lorafuse.inspect("org/name") == lorafuse.inspect(hub) | {"path": "org/name"}
    next(Path("snapshot").glob("*.safetensors")).unlink()
    assert lorafuse.inspect("org/name")["auto_dtypes"] is None


def test_checkpoint_of_another_quantization(hub):
    """It is said to be one, and shown."""
    build.write_checkpoint(hub, config=build.CONFIG | {"quantization_config": {"quant_method": "eetq"}})
    (problem,) = lorafuse.inspect("org/name")["problems"]
    assert "the checkpoint is quantized with eetq" in problem


def test_adapter_and_receipt(hub):
    """An adapter's files are fetched, of sub-folders too; of a merged directory only the receipt."""
    build.write_adapter(hub)
    facts = lorafuse.inspect("org/name")
    assert facts == lorafuse.inspect(hub) | {"path": "org/name"}
    assert fetched() == ["adapter_config.json", "adapter_model.safetensors"]
    shutil.rmtree(hub)
    shutil.rmtree("snapshot")
    for name in ("a", "b"):
        build.write_adapter(hub / name)
    assert [one["path"] for one in lorafuse.inspect("org/name")["adapters"]] == ["org/name/a", "org/name/b"]
    shutil.rmtree("snapshot")
    shutil.rmtree(hub)
    lorafuse.convert(build.write_checkpoint(Path("ckpt")), build.write_adapter(Path("adapter")), hub)
    assert lorafuse.inspect("org/name") == lorafuse.inspect(hub) | {"path": "org/name"}
    assert fetched() == ["config.json", "lorafuse_receipt.json"]


def test_checkpoint_with_adapters_beside(hub):
    """A repository with a config of its own is a checkpoint, whatever its sub-folders hold."""
    build.write_checkpoint(hub)
    build.write_adapter(hub / "adapter")
    assert lorafuse.inspect("org/name")["kind"] == lorafuse.inspect(hub)["kind"] == "checkpoint"


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("F3", [1]), (["F32"], [1]), ("F32", "1"), ("F32", [-1]), ("F32", [1.5]), ("F32", None)],
)
def test_header_that_is_wrong(hub, monkeypatch, dtype, shape):
    """The hub's library does not check headers."""
    build.write_checkpoint(hub)
    part = SimpleNamespace(tensors={"a\x1b": SimpleNamespace(dtype=dtype, shape=shape)})
    found = SimpleNamespace(files_metadata={"model.safetensors": part})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: found)
    with pytest.raises(CheckpointError) as caught:
        lorafuse.inspect("org/name")
    assert str(caught.value) == f"org/name: a\\x1b is {dtype} {shape}, which is not known here."


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            hub_errors.NotASafetensorsRepoError("x"),
            CheckpointError,
            "holds neither model.safetensors nor model.safetensors.index.json.",
        ),
        (hub_errors.SafetensorsParsingError("no\x1b header"), CheckpointError, "no\\x1b header"),
        (
            hub_errors.OfflineModeIsEnabled("x"),
            StorageError,
            "no such directory, and the hub cannot be reached to look for a repository",
        ),
        (
            hub_error(hub_errors.GatedRepoError),
            CheckpointError,
            "is gated; ask for access on its page on the hub, and log in.",
        ),
        (ConnectionError("no\x1b route"), StorageError, "downloading failed: no\\x1b route"),
    ],
)
def test_errors_of_the_hub(hub, monkeypatch, error, kind, message):
    """They have a line and a class, as those of a download have."""
    build.write_checkpoint(hub)

    def get_safetensors_metadata(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    with pytest.raises(kind) as caught:
        lorafuse.inspect("org/name")
    assert str(caught.value).startswith(f"org/name: {message}")


def test_really_offline(monkeypatch, tmp_path):
    """With the hub's own functions, told to stay offline: an empty cache, then a config in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    expected = (
        "org/name: no such directory, and the hub cannot be reached to look for a repository of that name."
    )
    with pytest.raises(StorageError) as caught:
        lorafuse.inspect("org/name")
    assert str(caught.value) == expected
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(build.CONFIG))
    with pytest.raises(StorageError, match=r"the hub cannot be reached|downloading failed"):
        lorafuse.inspect("org/name")


def test_broken_adapter(hub):
    """An adapter without its weights is the adapter's fault."""
    build.write_adapter(hub)
    (hub / "adapter_model.safetensors").unlink()
    with pytest.raises(
        AdapterError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"
    ):
        lorafuse.inspect("org/name")


@pytest.mark.parametrize("kind", KINDS_DAMAGED)
def test_each_quantized_format(hub, kind):
    """Headers and config tell how many parameters there are, but for codes that fill up a unit, and how they
    are stored."""
    ckpt_of(kind, hub)
    remote, local = lorafuse.inspect("org/name@main"), lorafuse.inspect(hub)
    assert fetched() == ["config.json"]
    assert remote["problems"] == local["problems"] == []
    n_parameters = 2 * 128 * 128 + 8 * 128
    assert local["n_parameters"] == n_parameters <= remote["n_parameters"] < 1.02 * n_parameters
    for one, other in zip(remote["storage"], local["storage"], strict=True):
        assert one["scheme"].partition(", block")[0] == other["scheme"].partition(", block")[0]
        assert (one["n_weights"], one["nbytes"]) == (other["n_weights"], other["nbytes"])
