"""`lorafuse inspect` of a hub id, of a hub on this machine."""

import json

import build
import pytest
from valid_inputs import KINDS_DAMAGED, ckpt_of

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError, StorageError


@pytest.mark.parametrize("kind", ["nf4_dq", "int8", "bf16_tied", "gpt2"])
def test_checkpoint(hub, base, kind):
    """Config and headers alone tell what they can, and no weight is fetched; block size and decoded dtype
    they do not."""
    hub.add("org/name", base(kind))
    facts, local = lorafuse.inspect("org/name@main"), lorafuse.inspect(base(kind))
    assert hub.fetched().keys() - {"model.safetensors.index.json"} == {"config.json"}
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


def test_checkpoint_that_was_fetched_before(hub, base, tmp_path):
    """What is in the cache is read, and tells all."""
    hub.add("org/name", base("nf4"))
    from huggingface_hub import snapshot_download

    snapshot_download("org/name")
    assert lorafuse.inspect("org/name") == lorafuse.inspect(base("nf4")) | {"path": "org/name"}
    next((tmp_path / "home").rglob("*.safetensors")).unlink()
    assert lorafuse.inspect("org/name")["auto_dtypes"] is None


def test_checkpoint_of_another_quantization(hub, tmp_path):
    """It is said to be one, and shown."""
    config = build.CONFIG | {"quantization_config": {"quant_method": "eetq"}}
    hub.add("org/name", build.write_checkpoint(tmp_path / "ckpt", config=config))
    (problem,) = lorafuse.inspect("org/name")["problems"]
    assert "the checkpoint is quantized with eetq" in problem


def test_url(hub, tmp_path):
    """An address is shown as the id that it stands for."""
    hub.add("org/name", build.write_checkpoint(tmp_path / "ckpt"))
    assert lorafuse.inspect(f"{hub.url}/org/name/tree/main")["path"] == "org/name@main"


def test_adapter(hub, tmp_path):
    """An adapter's files are fetched, of sub-folders too."""
    lora = build.write_adapter(tmp_path / "lora")
    hub.add("org/name", lora)
    assert lorafuse.inspect("org/name") == lorafuse.inspect(lora) | {"path": "org/name"}
    assert hub.fetched().keys() == {"adapter_config.json", "adapter_model.safetensors"}
    for name in ("a", "b"):
        build.write_adapter(tmp_path / "several" / name)
    hub.add("org/several", tmp_path / "several")
    paths = [one["path"] for one in lorafuse.inspect("org/several")["adapters"]]
    assert paths == ["org/several/a", "org/several/b"]


def test_receipt(hub, tmp_path):
    """Of a merged directory only the receipt is fetched."""
    lorafuse.convert(
        build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora"), tmp_path / "out"
    )
    hub.add("org/name", tmp_path / "out")
    assert lorafuse.inspect("org/name") == lorafuse.inspect(tmp_path / "out") | {"path": "org/name"}
    assert hub.fetched().keys() == {"config.json", "lorafuse_receipt.json"}


def test_checkpoint_with_adapters_beside(hub, tmp_path):
    """A repository with weights of its own is a checkpoint, whatever its sub-folders hold."""
    build.write_adapter(build.write_checkpoint(tmp_path / "ckpt") / "adapter")
    hub.add("org/name", tmp_path / "ckpt")
    assert lorafuse.inspect("org/name")["kind"] == lorafuse.inspect(tmp_path / "ckpt")["kind"] == "checkpoint"


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("F3", [1]), (["F32"], [1]), ("F32", "1"), ("F32", [-1]), ("F32", [1.5]), ("F32", None)],
)
def test_header_that_is_wrong(hub, tmp_path, dtype, shape):
    """It is refused as that of a local file is."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}
    (ckpt / "model.safetensors").write_bytes(build.raw_file({"a\x1b": entry}, bytes(4)))
    hub.add("org/name", ckpt)
    with pytest.raises(CheckpointError) as caught:
        lorafuse.inspect("org/name")
    with pytest.raises(CheckpointError) as local:
        lorafuse.inspect(ckpt)
    assert str(caught.value) == str(local.value).replace(str(ckpt), "org/name")
    assert "a\\x1b" in str(caught.value)


def test_nothing_that_is_known(hub, tmp_path):
    """A config without weights is named as such, other files as what they are not."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    (ckpt / "model.safetensors").unlink()
    hub.add("org/name", ckpt)
    with pytest.raises(CheckpointError) as caught:
        lorafuse.inspect("org/name")
    expected = "org/name: holds neither model.safetensors nor model.safetensors.index.json."
    assert str(caught.value) == expected
    (ckpt / "config.json").unlink()
    (ckpt / "README.md").write_text("")
    hub.add("org/name", ckpt)
    with pytest.raises(CheckpointError, match="org/name: holds no checkpoint"):
        lorafuse.inspect("org/name")


def test_without_a_network(hub, tmp_path, monkeypatch):
    """An empty cache, then a config in it: what is missing is named."""
    hub.add("org/name", build.write_checkpoint(tmp_path / "ckpt"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="no such directory, and it is not in the hub's cache"):
        lorafuse.inspect("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    lorafuse.inspect("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"org/name/model\.safetensors: is not in the hub's cache"):
        lorafuse.inspect("org/name")


def test_a_snapshot_of_an_older_library(hub, tmp_path, monkeypatch):
    """It lists no files; what is in the snapshot is there."""
    snapshot = tmp_path / "home/hub/models--org--name/snapshots" / ("0" * 40)
    build.write_checkpoint(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    facts = lorafuse.inspect("org/name")
    assert facts == lorafuse.inspect(snapshot) | {"path": "org/name"}
    assert json.loads((snapshot / "config.json").read_text()) == build.CONFIG


def test_broken_adapter(hub, tmp_path):
    """An adapter without its weights is the adapter's fault."""
    lora = build.write_adapter(tmp_path / "lora")
    (lora / "adapter_model.safetensors").unlink()
    hub.add("org/name", lora)
    with pytest.raises(
        AdapterError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"
    ):
        lorafuse.inspect("org/name")


@pytest.mark.parametrize("kind", KINDS_DAMAGED)
def test_each_quantized_format(hub, kind, tmp_path):
    """Headers and config tell how many parameters there are, but for codes that fill up a unit, and how they
    are stored."""
    ckpt_of(kind, tmp_path / "ckpt")
    hub.add("org/name", tmp_path / "ckpt")
    remote, local = lorafuse.inspect("org/name@main"), lorafuse.inspect(tmp_path / "ckpt")
    assert hub.fetched().keys() == {"config.json"}
    assert remote["problems"] == local["problems"] == []
    n_parameters = 2 * 128 * 128 + 8 * 128
    assert local["n_parameters"] == n_parameters <= remote["n_parameters"] < 1.02 * n_parameters
    for one, other in zip(remote["storage"], local["storage"], strict=True):
        # Headers do not tell how large the blocks of bitsandbytes are, nor that inputs have an order.
        if "NF4" in kind or "FP4 of b" in kind:
            other["scheme"] = other["scheme"].partition(", block")[0]
        else:
            assert one["blocksize"] == other["blocksize"]
        assert one["scheme"] == other["scheme"].replace(", act-order", "")
        assert [one[k] for k in ("n_weights", "nbytes", "modules")] == [
            other[k] for k in ("n_weights", "nbytes", "modules")
        ]
