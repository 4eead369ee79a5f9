"""A result in another kind of place has the bytes, the receipt and the refusals of one in a directory, and is
read as every other folder is."""

import json

import pytest
from build import files_of, write_adapter, write_checkpoint
from click.testing import CliRunner
from models import DENSE, LINEARS, QUANTIZED
from scenario import Bucket, content, five_shards

import lorafuse
from lorafuse import cli
from lorafuse.errors import LorafuseError, OutDirError, UsageError

OUT = "memory://out"


@pytest.fixture
def inputs(tmp_path):
    return five_shards(tmp_path)


@pytest.mark.parametrize("kind", [*DENSE, *QUANTIZED])
def test_every_kind_of_base(kind, base, adapter, object_store, tmp_path):
    """In several shards."""
    targets = ["c_attn", "c_fc"] if kind.startswith("gpt2") else LINEARS
    lora = adapter(kind, target_modules=targets, fan_in_fan_out=kind.startswith("gpt2"))
    for out in (tmp_path / "local", OUT):
        lorafuse.convert(base(kind), lora, out, max_shard_size="40KB")
    place = Bucket(object_store)
    assert place.content() == content(tmp_path / "local") and place.top() == ["out"]
    assert sum(name.endswith(".safetensors") for name in place.content()) > 1


def test_sub_folders_and_one_shard(inputs, object_store, tmp_path):
    for out in (tmp_path / "local", OUT):
        lorafuse.convert(*inputs, out)
    found = Bucket(object_store).content()
    assert found == content(tmp_path / "local") and "additional_chat_templates/rag.jinja" in found


def test_the_same_events(inputs, object_store, tmp_path):
    def told(out):
        events = []
        lorafuse.convert(*inputs, out, max_shard_size="1400", on_event=events.append)
        times = ("wall_s", "read_s", "decode_s", "update_s", "encode_s", "write_s", "peak_rss")
        events.sort(key=lambda event: event["event"] == "shard")  # which tells when a file is finished
        return [{name: value for name, value in event.items() if name not in times} for event in events]

    local, memory = told(tmp_path / "local"), told(OUT)
    assert [event["event"] for event in memory] == [event["event"] for event in local]
    assert [e for e in memory if e["event"] != "done"] == [e for e in local if e["event"] != "done"]
    assert [e["out_dir"] for e in memory if e["event"] == "done"] == [OUT]


def test_a_dry_run_writes_nothing(inputs, object_store):
    assert lorafuse.convert(*inputs, OUT, dry_run=True)["event"] == "plan"
    assert not object_store.objects


def test_overwrite_replaces_everything(inputs, object_store, tmp_path):
    object_store.objects |= {f"{OUT}/{name}": b"old" for name in ("mine.txt", "sub/mine.txt", "config.json")}
    with pytest.raises(OutDirError) as caught:
        lorafuse.convert(*inputs, OUT)
    assert str(caught.value) == (
        f"{OUT}: exists and is not empty; overwrite=True replaces it once the new one is complete."
    )
    assert {*object_store.objects.values()} == {b"old"}
    for out in (OUT, tmp_path / "local"):
        lorafuse.convert(*inputs, out, overwrite=True)
    assert Bucket(object_store).content() == content(tmp_path / "local")


@pytest.mark.parametrize("where", ["ckpt", "ckpt/merged", "adapter"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_touches_an_input_is_refused(where, overwrite, inputs, in_memory, object_store):
    urls = [in_memory(path) for path in inputs]
    before = dict(object_store.objects)
    with pytest.raises(
        OutDirError, match=f"^memory://{where}: is, contains or lies inside the input memory://"
    ):
        lorafuse.convert(*urls, f"memory://{where}", overwrite=overwrite)
    assert object_store.objects == before


def test_a_kind_that_is_not_known(inputs):
    with pytest.raises(UsageError, match=r"^ftp://out: results cannot be written to ftp://\.$"):
        lorafuse.convert(*inputs, "ftp://out")


def test_verify_and_inspect(inputs, object_store, tmp_path):
    """And it is an input like every other folder."""
    for out in (tmp_path / "local", OUT):
        lorafuse.convert(*inputs, out, max_shard_size="1400")
    options = {"ckpt": inputs[0], "adapters": [inputs[1]], "sample": 3}
    assert lorafuse.verify(OUT, **options) == lorafuse.verify(tmp_path / "local", **options)
    found, expected = (json.dumps(lorafuse.inspect(out), default=str) for out in (OUT, tmp_path / "local"))
    assert json.loads(found) == json.loads(expected.replace(f'"{tmp_path / "local"}', f'"{OUT}'))

    for out, again in ((tmp_path / "local", tmp_path / "twice"), (OUT, "memory://twice")):
        lorafuse.convert(out, inputs[1], again)
    weights = "model.safetensors"
    twice = bytes(object_store.objects[f"memory://twice/{weights}"])
    assert twice == files_of(tmp_path / "twice")[weights]

    file = next(name for name in object_store.objects if name.endswith("00001-of-00005.safetensors"))
    object_store.objects[file] = bytes(object_store.objects[file])[:-1] + b"\x7f"
    with pytest.raises(LorafuseError, match=r"^memory://out/model-00001-of-00005\.safetensors"):
        lorafuse.verify(OUT)


def test_the_command_line(inputs, object_store):
    paths = [str(path) for path in inputs]
    done = CliRunner().invoke(cli.convert, [*paths, OUT])
    assert (done.exit_code, done.stdout) == (0, f"{OUT}\n")
    done = CliRunner().invoke(cli.convert, [*paths, OUT])
    assert done.exit_code == 7 and "exists and is not empty" in done.output


def test_from_memory_into_memory(in_memory, object_store, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt", n_shards=2), write_adapter(tmp_path / "lora")
    urls = [in_memory(ckpt), in_memory(lora)]
    lorafuse.convert(*urls, tmp_path / "local")
    lorafuse.convert(*urls, OUT)
    assert Bucket(object_store).content() == content(tmp_path / "local")
