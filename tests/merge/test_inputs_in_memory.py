"""Inputs of another kind of folder give the same bytes, the same receipt but for their names, and the same
refusals as the directories that they are copies of."""

import json
import shutil

import pytest
import torch
from build import adapter_tensors, checkpoint_tensors, files_of, raw_file, write_adapter, write_checkpoint
from click.testing import CliRunner
from models import LINEARS
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import CheckpointError, LorafuseError, OutDirError
from lorafuse.files.names import RECEIPT

TIMES = ("timing", "peak_rss", "tool")
INDEX = "adapter_model.safetensors.index.json"


def result(out, names):
    """Every file; the receipt without times, and with `names` of the inputs replaced."""
    files = files_of(out)
    text = files[RECEIPT].decode()
    for name, instead in names.items():
        text = text.replace(name, instead)
    receipt = {key: value for key, value in json.loads(text).items() if key not in TIMES}
    return files | {RECEIPT: receipt}


def assert_the_same(in_memory, tmp_path, ckpt, adapters, **options):
    """Merged from directories, and from copies of them in memory."""
    given = {str(path): in_memory(path) for path in (ckpt, *adapters)}
    first, *others = adapters
    lorafuse.convert(ckpt, first, tmp_path / "local", adapters=[(path, 0.5) for path in others], **options)
    url, first_url, *other_urls = given.values()
    lorafuse.convert(
        url, first_url, tmp_path / "memory", adapters=[(name, 0.5) for name in other_urls], **options
    )
    assert result(tmp_path / "memory", {}) == result(tmp_path / "local", given)
    return given


@pytest.mark.parametrize("kind", ["bf16", "nf4_dq", "int8", "gpt2"])
def test_every_codec(kind, base, adapter, in_memory, tmp_path):
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else LINEARS
    lora = adapter(kind, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    assert_the_same(in_memory, tmp_path, base(kind), [lora], max_shard_size="40KB")


def sharded(path):
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    files = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: files[i % 2] for i, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({key: t for key, t in tensors.items() if weight_map[key] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def binary(path, **options):
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin", **options)
    (path / "adapter_model.safetensors").unlink()


def binary_of_old(path):
    binary(path, _use_new_zipfile_serialization=False)


def sub_folder(path):
    shutil.copytree(path, path / "style")
    for file in path.glob("adapter_*"):
        file.unlink()
    (path / "tokenizer.json").write_text("{}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tool.jinja").write_text("tool")


def mlx(path):
    factors = load_file(path / "adapter_model.safetensors")
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    tensors = {}
    for key, tensor in factors.items():
        module, _, leaf = key.removeprefix("base_model.model.").rpartition(".lora_")
        tensors[f"{module}.{names[f'lora_{leaf}']}"] = tensor.T.contiguous()
    shutil.rmtree(path)
    path.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapters.safetensors")


@pytest.mark.parametrize("change", [lambda path: None, sharded, binary, binary_of_old, sub_folder, mlx])
def test_every_form_of_an_adapter(change, in_memory, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt", n_shards=3), write_adapter(tmp_path / "lora")
    (ckpt / "generation_config.json").write_text("{}")
    (ckpt / "tokenizer.json").write_text('{"of": "the checkpoint"}')
    change(lora)
    assert_the_same(in_memory, tmp_path, ckpt, [lora])
    if change is sub_folder:
        assert (tmp_path / "memory/additional_chat_templates/tool.jinja").read_text() == "tool"


def factors(i):
    return {key: tensor * (i + 1) for key, tensor in adapter_tensors(checkpoint_tensors()).items()}


def test_several_adapters(in_memory, tmp_path):
    ckpt = write_checkpoint(tmp_path / "ckpt")
    loras = [write_adapter(tmp_path / f"lora{i}", factors(i)) for i in range(3)]
    given = assert_the_same(in_memory, tmp_path, ckpt, loras)
    url, *adapters = given.values()
    checked = lorafuse.verify(tmp_path / "local", ckpt=url, adapters=adapters)
    assert checked["weights"] == len(checkpoint_tensors())


def test_base_quant_from_a_file(in_memory, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
    (lora / "quant.json").write_text(json.dumps({"quantization_config": settings}))
    urls = in_memory(ckpt), in_memory(lora)
    lorafuse.convert(ckpt, lora, tmp_path / "local", base_quant_from=lora / "quant.json")
    lorafuse.convert(*urls, tmp_path / "memory", base_quant_from=f"{urls[1]}/quant.json")
    assert result(tmp_path / "memory", {}) == result(
        tmp_path / "local", {str(ckpt): urls[0], str(lora): urls[1]}
    )


def test_a_batch(in_memory, tmp_path):
    """Its jobs are named in a file; the second call knows the results again."""
    ckpt = write_checkpoint(tmp_path / "ckpt", n_shards=2)
    for name in "ab":
        write_adapter(tmp_path / name, lora_alpha=ord(name))
    lines = [{"adapter": in_memory(tmp_path / name), "name": name} for name in "ab"]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    url, out = in_memory(ckpt), tmp_path / "out"
    for state in ("done", "skipped"):
        states = lorafuse.batch(url, tmp_path / "jobs.jsonl", out, max_shard_size="2KB")
        assert [job.state for job in states] == [state] * 2, [job.error for job in states]
    for name in "ab":
        lorafuse.convert(ckpt, tmp_path / name, tmp_path / "alone" / name, max_shard_size="2KB")
        names = {str(ckpt): url, str(tmp_path / name): f"memory://{name}"}
        assert result(out / name, {}) == result(tmp_path / "alone" / name, names)


@pytest.mark.parametrize("change", [lambda path: None, sharded, binary, sub_folder, mlx])
def test_inspect(change, in_memory, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt", n_shards=2), write_adapter(tmp_path / "lora")
    change(lora)
    lorafuse.convert(ckpt, lora, tmp_path / "merged")
    for path in (ckpt, lora, tmp_path / "merged"):
        url = in_memory(path)
        found = json.dumps(lorafuse.inspect(url), default=str)
        expected = json.dumps(lorafuse.inspect(path), default=str)
        assert json.loads(found) == json.loads(expected.replace(f'"{path}', f'"{url}'))


def test_verify_a_result_that_lies_in_memory(in_memory, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    lorafuse.convert(ckpt, lora, tmp_path / "merged", max_shard_size="2KB")
    url, inputs = in_memory(tmp_path / "merged"), {"ckpt": in_memory(ckpt), "adapters": [in_memory(lora)]}
    assert lorafuse.verify(url, **inputs) == lorafuse.verify(tmp_path / "merged", **inputs)
    in_memory.store[f"{url}/stray.bin"] = b""
    with pytest.raises(LorafuseError, match=r"^memory://merged/stray.bin: is not in the receipt"):
        lorafuse.verify(url)


def test_a_run_that_was_cut_off_goes_on(in_memory, tmp_path, monkeypatch):
    """The journal knows inputs by their identities, whatever they are."""
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    urls, out = (in_memory(ckpt), in_memory(lora)), tmp_path / "out"

    def convert(stops, **options):
        events = []

        def hear(event):
            events.append(event)
            if stops and sum(event["event"] == "shard" for event in events) == 2:
                raise KeyboardInterrupt

        lorafuse.convert(*urls, out, max_shard_size="2KB", on_event=hear, **options)
        return [event["n_shards"] for event in events if event["event"] == "resumed"]

    with pytest.raises(KeyboardInterrupt):
        convert(True)
    [n_shards] = convert(False)
    assert n_shards >= 2  # files that had all their bytes are finished, too
    lorafuse.convert(ckpt, lora, tmp_path / "local", max_shard_size="2KB")
    names = {str(ckpt): urls[0], str(lora): urls[1]}
    assert result(out, {}) == result(tmp_path / "local", names)


def test_an_input_that_changes_during_the_run(in_memory, tmp_path):
    urls = in_memory(write_checkpoint(tmp_path / "ckpt")), in_memory(write_adapter(tmp_path / "lora"))

    def change(event):
        if event["event"] == "shard":
            in_memory.store[f"{urls[0]}/config.json"] += b" "

    with pytest.raises(CheckpointError) as caught:
        lorafuse.convert(*urls, tmp_path / "out", on_event=change)
    assert str(caught.value) == (
        "memory://ckpt/config.json: changed during the run, which may have read some of both; run it again."
    )
    assert not (tmp_path / "out").exists()


def test_an_output_beside_an_input_of_no_path(in_memory, tmp_path, monkeypatch):
    """A folder that lies in no file system is in nobody's way; one that does is."""
    monkeypatch.chdir(tmp_path)
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), in_memory(write_adapter(tmp_path / "lora"))
    with pytest.raises(OutDirError, match="lies inside the input"):
        lorafuse.convert(ckpt, lora, ckpt / "out")
    lorafuse.convert(in_memory(ckpt), lora, ckpt / "out")


def test_the_command_line(in_memory, tmp_path):
    urls = in_memory(write_checkpoint(tmp_path / "ckpt")), in_memory(write_adapter(tmp_path / "lora"))
    done = CliRunner().invoke(cli.convert, [*urls, str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n")


CKPT, LORA = "ckpt/model-00001-of-00002.safetensors", "lora/adapter_model.safetensors"
BIN = "lora/adapter_model.bin"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
# file → what it holds instead; None: it is not there
BROKEN = {
    "no config": {"ckpt/config.json": None},
    "config": {"ckpt/config.json": b"{"},
    "config of another kind": {"ckpt/config.json": b'{"quantization_config": {"quant_method": "eetq"}}'},
    "no shard": {CKPT: None},
    "truncated": {CKPT: raw_file({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"short")},
    "too short": {CKPT: b"1234567"},
    "long header": {CKPT: raw_file({}, length=10**9)},
    "no header": {CKPT: raw_file(b"[]")},
    "pointer": {CKPT: POINTER},
    "pointer of a config": {"ckpt/config.json": POINTER},
    "lost tensor": {CKPT: raw_file({})},
    "index": {"ckpt/model.safetensors.index.json": b'{"weight_map": {"x": "../x.safetensors"}}'},
    "no index": {"ckpt/model.safetensors.index.json": None, "ckpt/pytorch_model.bin": b"x"},
    "stale": {"ckpt/model.safetensors": raw_file({})},
    "no adapter config": {"lora/adapter_config.json": None},
    "no adapter": {"lora/adapter_config.json": None, LORA: None, "lora/README.md": b""},
    "adapter config": {"lora/adapter_config.json": b"[]"},
    "no tensors": {LORA: None},
    "adapter pointer": {LORA: POINTER},
    "adapter type": {"lora/adapter_config.json": b'{"peft_type": "NEW"}'},
    "bin pointer": {LORA: None, BIN: POINTER},
    "bin of nothing": {LORA: None, BIN: b""},
    "bin of anything": {LORA: None, BIN: b"anything at all"},
    "bin of a pickle": {LORA: None, BIN: b"\x80\x02}q\x00."},
    "bin of a half archive": {LORA: None, BIN: b"PK\x03\x04" + b"\0" * 60},
    "npz": {LORA: None, "lora/adapter_config.json": b'{"fine_tune_type": "lora"}', "lora/adapters.npz": b""},
    "two sub-folders": {
        "lora/adapter_config.json": None,
        LORA: None,
        "lora/a/adapter_config.json": b"{}",
        "lora/b/adapter_config.json": b"{}",
    },
    "receipt": {"ckpt/lorafuse_receipt.json": b'{"inputs": [], ' + b" " * 10},
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_same_refusals(case, in_memory, tmp_path):
    """Convert, and inspect too, say the same of both kinds of folders, with the folder's own name."""
    write_checkpoint(tmp_path / "ckpt", n_shards=2)
    write_adapter(tmp_path / "lora")
    for name, data in BROKEN[case].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).unlink(missing_ok=True)
        if data is not None:
            (tmp_path / name).write_bytes(data)
    paths = [tmp_path / name for name in ("ckpt", "lora")]
    urls = [in_memory(path) for path in paths]
    said = []
    for inputs, out in ((paths, "local"), (urls, "memory")):
        words = []
        for ask in (
            lambda inputs=inputs, out=out: lorafuse.convert(*inputs, tmp_path / out) and "merged",
            lambda inputs=inputs: lorafuse.inspect(inputs[0])["problems"],
            lambda inputs=inputs: lorafuse.inspect(inputs[1])["problems"],
        ):
            try:
                words.append(str(ask()))
            except LorafuseError as e:
                words.append(f"{type(e).__name__}: {e}")
        said.append(words)
    local = [text.replace(str(paths[0]), urls[0]).replace(str(paths[1]), urls[1]) for text in said[0]]
    assert said[1] == local
    assert case == "receipt" or said[1] != ["merged", "[]", "[]"]


def test_a_damaged_adapter_of_torch(in_memory, tmp_path):
    """Archives and pickles that are damaged anywhere: torch says the same of a stream as of a file."""
    write_checkpoint(tmp_path / "ckpt")
    url, lora = in_memory(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    (lora / "adapter_model.safetensors").unlink()
    for zipped in (True, False):
        torch.save(
            adapter_tensors(checkpoint_tensors()),
            lora / "adapter_model.bin",
            _use_new_zipfile_serialization=zipped,
        )
        whole = (lora / "adapter_model.bin").read_bytes()
        for at in range(0, len(whole), len(whole) // 12):
            for data in (whole[:at], whole[:at] + b"\xff" + whole[at + 1 :]):
                (lora / "adapter_model.bin").write_bytes(data)
                texts = []
                for name in (lora, in_memory(lora)):
                    try:
                        lorafuse.convert(url, name, tmp_path / "out", dry_run=True)
                        texts.append("fine")
                    except LorafuseError as e:
                        texts.append(f"{type(e).__name__}: {e}".replace(str(name), "LORA"))
                assert texts[0] == texts[1]
