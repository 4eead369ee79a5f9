"""The forms in which an adapter's files come: shards with an index, sub-folders by name, odd configs,
pointers, not files."""

import json
import shutil

import build
import pytest
import torch
from click.testing import CliRunner
from models import LINEARS
from oracle import complaints, truth
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import AdapterError, CheckpointError, UsageError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
HINT = "is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`."
INDEX = "adapter_model.safetensors.index.json"


def shards(path, n=3):
    """Split an adapter as transformers does when it is larger than a shard."""
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    weight_map = {key: names[i % n] for i, key in enumerate(sorted(tensors))}
    for file in names:
        save_file(
            {key: tensors[key] for key in tensors if weight_map[key] == file}, path / file, {"format": "pt"}
        )
    write_index(path, weight_map)
    return weight_map


def write_index(path, weight_map):
    build.write_json(path / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def refused(ckpt, lora, tmp_path, kind=AdapterError, **options):
    """The refusal's text, with nothing written."""
    with pytest.raises(kind) as caught:
        lorafuse.convert(ckpt, lora, tmp_path / "work/out", **options)
    assert not (tmp_path / "work").exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["fp32", "nf4_dq"])
def test_a_sharded_adapter_gives_the_bytes_of_a_whole_one(kind, base, adapter, tmp_path):
    lora = adapter(kind, target_modules=LINEARS)
    lorafuse.convert(base(kind), lora, tmp_path / "whole")
    wanted = truth(base(kind), lora)
    files = set(shards(lora).values())
    receipt = lorafuse.convert(base(kind), lora, tmp_path / "out")
    assert (
        build.files_of(tmp_path / "out")["model.safetensors"]
        == build.files_of(tmp_path / "whole")["model.safetensors"]
    )
    assert complaints(tmp_path / "out", wanted) == []
    read = {i["path"].removeprefix(f"{lora}/") for i in receipt["inputs"] if i["role"] == "adapter"}
    assert read == {"adapter_config.json", INDEX, *files}


SHARD_1 = "adapter_model-00001-of-00002.safetensors"
SHARD_2 = "adapter_model-00002-of-00002.safetensors"
KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"  # the first, in the first shard


def missing(path, weight_map):
    (path / SHARD_2).unlink()


def elsewhere(path, weight_map):
    write_index(path, weight_map | {KEY: SHARD_2})


def unlisted(path, weight_map):
    write_index(path, {key: file for key, file in weight_map.items() if key != KEY})


def stale(path, weight_map):
    shutil.copy(path / SHARD_1, path / "adapter_model.safetensors")


def outside(path, weight_map):
    write_index(path, weight_map | {KEY: "../x.safetensors"})


def empty(path, weight_map):
    write_index(path, {})


def twice(path, weight_map):
    save_file(load_file(path / SHARD_1) | load_file(path / SHARD_2), path / SHARD_2)


def pointer(path, weight_map):
    (path / INDEX).write_text(POINTER)


def pointer_shard(path, weight_map):
    (path / SHARD_2).write_text(POINTER)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (missing, f"LORA/{SHARD_2}: not found; LORA is no PEFT adapter."),
        (elsewhere, f"LORA/{SHARD_2}: lacks {KEY}, which {INDEX} expects there."),
        (unlisted, f"LORA/{SHARD_1}: holds {KEY}, which {INDEX} does not list."),
        (
            stale,
            f"LORA: holds both {INDEX} and adapter_model.safetensors, which it does not name; remove the "
            "stale one.",
        ),
        (
            outside,
            f"LORA/{INDEX}: maps {KEY} to ../x.safetensors, which is no safetensors file of this directory.",
        ),
        (empty, f"LORA/{INDEX}: has no weight_map."),
        (twice, f"LORA/{SHARD_2}: {KEY} is also in {SHARD_1}; a tensor must be in one file."),
        (pointer, f"LORA/{INDEX}: {HINT}"),
        (pointer_shard, f"LORA/{SHARD_2}: {HINT}"),
    ],
)
def test_an_index_and_its_shards_must_agree(change, says, tmp_path):
    """The same rules as for a checkpoint's."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")
    change(lora, shards(lora, 2))
    assert refused(ckpt, lora, tmp_path) == says.replace("LORA", str(lora))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pointer_instead_of_a_file_is_refused_with_the_remedy(file, tmp_path):
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")
    if file.endswith(".bin"):
        (lora / "adapter_model.safetensors").unlink()
    (lora / file).write_text(POINTER)
    assert refused(ckpt, lora, tmp_path) == f"{lora}/{file}: {HINT}"


def test_a_pointer_instead_of_a_checkpoints_json_is_refused_likewise(tmp_path):
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")
    (ckpt / "config.json").write_text(POINTER)
    assert refused(ckpt, lora, tmp_path, CheckpointError) == f"{ckpt}/config.json: {HINT}"


@pytest.fixture
def several(base, adapter, tmp_path):
    """A directory that PEFT wrote for a model with the adapters "one" and "two", and the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("fp32"), dtype=torch.float32)
    torch.manual_seed(3)
    peft = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        adapter_name="one",
    )
    peft.add_adapter(
        "two", LoraConfig(r=2, lora_alpha=3, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.05)
    peft.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", peft.eval()


@pytest.mark.parametrize("name", ["one", "two"])
def test_an_adapter_in_a_sub_folder_is_chosen_by_its_name(name, base, several, tmp_path):
    """The merged model answers as PEFT's does with that adapter active."""
    from transformers import AutoModelForCausalLM

    root, model = several
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == ["one", "two"]
    receipt = lorafuse.convert(base("fp32"), root, tmp_path / "out", adapter_name=name)
    assert complaints(tmp_path / "out", truth(base("fp32"), root / name)) == []
    paths = [i["path"] for i in receipt["inputs"] if i["role"] == "adapter"]
    assert paths == [f"{root}/{name}/adapter_config.json", f"{root}/{name}/adapter_model.safetensors"]
    model.set_adapter(name)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert (merged(ids).logits - model(ids).logits).abs().max() < 1e-4


def test_several_adapters_and_no_name_are_refused(base, several, tmp_path):
    root, _ = several
    expected = f"{root}: holds several adapters: one, two; choose one by its name (adapter_name)."
    assert refused(base("fp32"), root, tmp_path) == expected


def test_a_name_that_is_not_there_is_refused_with_those_that_are(base, several, tmp_path):
    root, _ = several
    ckpt = base("fp32")
    assert (
        refused(ckpt, root, tmp_path, adapter_name="c") == f"{root}: has no adapter named c; it has one, two."
    )
    assert (
        refused(ckpt, root / "one", tmp_path, adapter_name="c")
        == f"{root}/one: has no adapter named c; it has default."
    )
    (tmp_path / "nothing").mkdir()
    expected = f"{tmp_path}/nothing: has no adapter named c; it has none."
    assert refused(ckpt, tmp_path / "nothing", tmp_path, adapter_name="c") == expected


def test_the_only_adapter_is_taken_with_a_warning(base, several, tmp_path):
    root, _ = several
    shutil.rmtree(root / "one")
    events = []
    lorafuse.convert(base("fp32"), root, tmp_path / "out", on_event=events.append)
    assert complaints(tmp_path / "out", truth(base("fp32"), root / "two")) == []
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        f"{root}: the adapter in it, two, is taken."
    ]


@pytest.mark.parametrize("name", [None, "default"])
def test_the_directory_itself_is_the_adapter_default(name, base, several, tmp_path):
    """What its sub-folders hold, such as a trainer's checkpoints, does not matter then."""
    root, _ = several
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(root / "two" / file, root / file)
    events = []
    lorafuse.convert(base("fp32"), root, tmp_path / "out", adapter_name=name, on_event=events.append)
    assert complaints(tmp_path / "out", truth(base("fp32"), root / "two")) == []
    assert not [e for e in events if e["event"] == "warning"]


def test_a_root_without_its_config_is_not_passed_over(base, several, tmp_path):
    """Tensors at the root belong to an adapter that is incomplete; the one in a sub-folder may be another."""
    root, _ = several
    shutil.copy(root / "one" / "adapter_model.safetensors", root)
    expected = f"{root}/adapter_config.json: not found; {root} is no PEFT adapter."
    assert refused(base("fp32"), root, tmp_path) == expected


@pytest.mark.parametrize("name", ["", ".", "..", "../b", "b/", "/b", "a\\b"])
def test_a_name_is_not_a_path(name, base, several, tmp_path):
    root, _ = several
    expected = f"adapter_name is {name!r}; expected the name of an adapter, not a path."
    assert refused(base("fp32"), root / "one", tmp_path, UsageError, adapter_name=name) == expected


def test_the_command_line_passes_the_name_on(base, several, tmp_path):
    root, _ = several
    arguments = [str(base("fp32")), str(root), str(tmp_path / "out"), "--adapter-name"]
    assert CliRunner().invoke(cli.convert, [*arguments, "../one"]).exit_code == 2
    result = CliRunner().invoke(cli.convert, [*arguments, "c"])
    assert (result.exit_code, result.stderr) == (
        4,
        f"Error: {root}: has no adapter named c; it has one, two.\n",
    )
    assert CliRunner().invoke(cli.convert, [*arguments, "one"]).exit_code == 0
    assert complaints(tmp_path / "out", truth(base("fp32"), root / "one")) == []


def test_the_tokenizer_beside_a_sub_folder_is_the_adapters(several, tmp_path):
    """The sub-folder's own comes first, then that of the directory above, where trainers put it."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    lora = build.write_adapter(tmp_path / "set/one").parent
    for path, text in ((ckpt, "base"), (lora, "root")):
        (path / "tokenizer.json").write_text(text)
    lorafuse.convert(ckpt, lora, tmp_path / "first")
    assert (tmp_path / "first/tokenizer.json").read_text() == "root"
    (lora / "one/tokenizer.json").write_text("own")
    lorafuse.convert(ckpt, lora, tmp_path / "second")
    assert (tmp_path / "second/tokenizer.json").read_text() == "own"


NULLS = [
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "use_rslora",
]
NULLS += [
    "use_dora",
    "lora_bias",
    "exclude_modules",
    "trainable_token_indices",
    "target_parameters",
    "init_lora_weights",
    "bias",
]
NULLS += [
    "task_type",
    "auto_mapping",
    "megatron_core",
    "fan_in_fan_out",
    "ensure_weight_tying",
    "target_modules",
    "peft_version",
]
UNSLOTH = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "unsloth_version": "2025.3.19",
}
UNSLOTH |= {
    "corda_config": None,
    "eva_config": None,
    "qalora_group_size": 16,
    "lora_dropout": 0,
    "megatron_core": "megatron.core",
}


@pytest.mark.parametrize(
    "change",
    [
        dict.fromkeys(NULLS),
        UNSLOTH,
        {"some_future_field": {"x": [1, 2]}, "runtime_config": {"ephemeral_gpu_offload": False}},
        {
            "target_modules": ["q_proj", "q_proj", "model.layers.0.mlp.down_proj"],
            "base_model_name_or_path": "C:\\mod\u00e8les\\b",
        },
    ],
    ids=["null fields", "Unsloth's fields", "fields of the future", "odd names"],
)
def test_fields_that_change_nothing_change_nothing(change, base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=["q_proj", "down_proj"])
    config = json.loads((lora / "adapter_config.json").read_text())
    wanted = truth(base("nf4_dq"), lora)
    build.write_json(lora / "adapter_config.json", config | change)
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", wanted) == []


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"\r\n \t",
    ],
    ids=["CRLF", "byte order mark", "blanks"],
)
def test_a_config_that_an_editor_rewrote_is_read(rewrite, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"])
    config = lora / "adapter_config.json"
    config.write_bytes(rewrite(config.read_bytes()))
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    config.write_bytes(config.read_bytes().replace(b"\xef\xbb\xbf", b""))
    assert complaints(tmp_path / "out", truth(base("fp32"), lora)) == []


def test_peft_type_is_spelled_as_peft_spells_it(tmp_path):
    """PEFT looks it up as it is written, and refuses other casings too."""
    from peft import PeftConfig

    ckpt, lora = (
        build.write_checkpoint(tmp_path / "ckpt"),
        build.write_adapter(tmp_path / "lora", peft_type="lora"),
    )
    with pytest.raises(KeyError):
        PeftConfig.from_pretrained(lora)
    message = refused(ckpt, lora, tmp_path)
    assert message.startswith(f"{lora}/adapter_config.json: peft_type lora is not supported; known are ")
    assert message.endswith("; PEFT spells it LORA.")
