"""`--format nf4|fp4|int8`: what stays dense, what config.json says of it, what is refused, and that verify,
batch and resume work with it."""

import hashlib
import json

import pytest
import torch
from build import CONFIG, adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from peft import LoraConfig, get_peft_model
from quantized_anew import assert_stored
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import lorafuse
from lorafuse.errors import ResultError, UsageError


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def linear_classes(folder):
    """{module: name of its class} of the model that transformers makes of a result."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__
    }


@pytest.mark.parametrize(
    "options", [{"format": "nf4"}, {"format": "int8"}, {"format": "base", "base_quant": "nf4"}]
)
def test_what_keep_dense_names_is_dense_and_listed(options, base, adapter, tmp_path):
    lora = adapter("bf16", target_modules=["q_proj", "k_proj", "v_proj"])
    patterns = ["*.0.*.v_proj", "*.1.*.[qkv]_proj", "*.down_proj"]  # down_proj does not change
    lorafuse.convert(base("bf16"), lora, tmp_path / "out", keep_dense=patterns, **options)
    options.pop("format")
    lorafuse.convert(base("bf16"), lora, tmp_path / "dense", **options)
    dense = ["model.layers.0.self_attn.v_proj", *(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")]
    found, full = stored(tmp_path / "out"), stored(tmp_path / "dense")
    assert_stored(
        {f"{m}.weight": found[f"{m}.weight"] for m in dense},
        {f"{m}.weight": full[f"{m}.weight"] for m in dense},
    )
    listed = quantization_of(tmp_path / "out")["llm_int8_skip_modules"]
    assert {*dense, "lm_head", "model.layers.1.self_attn.qkv_proj"} <= set(listed)
    classes = linear_classes(tmp_path / "out")
    assert {name for name, made in classes.items() if made == "Linear"} == {*dense, "lm_head"}


def test_what_an_adapter_saved_whole_is_dense_and_listed(base, adapter, tmp_path):
    lora = adapter("bf16", target_modules=["q_proj"], modules_to_save=["v_proj"])
    receipt = lorafuse.convert(base("bf16"), lora, tmp_path / "out", format="nf4")
    saved = {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert {
        n.removesuffix(".weight")
        for n, e in receipt["tensors"].items()
        if e["action"] == "replaced" and n.endswith("weight")
    } == saved
    assert saved <= set(quantization_of(tmp_path / "out")["llm_int8_skip_modules"])
    classes = linear_classes(tmp_path / "out")
    assert {name for name, made in classes.items() if made == "Linear"} == {*saved, "lm_head"}


@pytest.mark.parametrize("options", [{"format": "nf4"}, {"format": "base", "base_quant": "nf4"}])
def test_modules_that_training_did_not_quantize(options, base, adapter, tmp_path):
    lora = adapter("bf16", target_modules=["q_proj"])
    lorafuse.convert(base("bf16"), lora, tmp_path / "out", quant_skip=["lm_head", "down_proj"], **options)
    down = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    classes = linear_classes(tmp_path / "out")
    assert {name for name, made in classes.items() if made == "Linear"} == {*down, "lm_head"}


def test_a_tied_embedding_that_changes(base, adapter, tmp_path):
    lora = adapter("bf16_tied", target_modules=["q_proj", "embed_tokens"])
    lorafuse.convert(base("bf16_tied"), lora, tmp_path / "out", format="nf4")
    classes = linear_classes(tmp_path / "out")
    assert {name for name, made in classes.items() if made == "Linear"} == {"lm_head"}
    assert quantization_of(tmp_path / "out")["llm_int8_skip_modules"] is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "nf4",
            {"format": "nf4"},
            "nf4: is quantized already, and format='nf4' would quantize it again: format='base' "
            "keeps the update on the base's own grid.",
        ),
        (
            "int8",
            {"format": "nf4"},
            "int8: is quantized already, and format='nf4' would quantize it again: format='base' "
            "keeps the update on the base's own grid.",
        ),
        (
            "bf16",
            {"format": "nf4", "base_quant": "nf4", "dtype": "float16"},
            "format='nf4' keeps the dtypes that training saw: leave dtype out.",
        ),
        (
            "bf16",
            {"format": "base", "base_quant": "int8", "dtype": "float16"},
            "format='base' keeps the dtypes that training saw: leave dtype out.",
        ),
        (
            "bf16",
            {"format": "mixed", "base_quant": "nf4"},
            "format='mixed' keeps what the base stores, which is full precision where base_quant is given: "
            "leave format out, or choose format='base'.",
        ),
        (
            "bf16",
            {"format": "nf4", "quant_experts": True},
            "format='nf4': transformers 5 does not load experts that are quantized one by one, as "
            "quant_experts=True says they were: leave format out.",
        ),
        (
            "bf16",
            {"format": "nf4", "quant_skip": ["model", "lm_head"]},
            "bf16: transformers 5 quantizes no weight of it on loading; leave format out.",
        ),
        (
            "bf16",
            {"format": "nf4", "quant_blocksize": 48},
            "quant_blocksize is 48; expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096.",
        ),
    ],
)
def test_wrong_wishes(kind, options, message, base, adapter, tmp_path):
    lora = adapter(kind, target_modules=["q_proj"])
    with pytest.raises(UsageError) as e:
        lorafuse.convert(base(kind), lora, tmp_path / "out", **options)
    assert str(e.value).endswith(message)
    assert not (tmp_path / "out").exists()


def test_four_bits_of_a_transposed_weight_with_an_odd_number_of_rows(tmp_path):
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors = {name: torch.randn(15, 8), "lm_head.weight": torch.randn(8, 8)}
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors, config=CONFIG | {"model_type": "gpt2"})
    key = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {"lora_A": torch.randn(4, 15), "lora_B": torch.randn(8, 4)}
    lora = write_adapter(tmp_path / "lora", {f"{key}.{n}.weight": t for n, t in factors.items()})
    with pytest.raises(UsageError) as e:
        lorafuse.convert(ckpt, lora, tmp_path / "out", format="nf4")
    assert str(e.value) == (
        f"format='nf4': {name} is the weight of a Conv1D with an odd number of rows, whose 4-bit codes this "
        "version does not write: choose format='int8', or leave format out."
    )
    lorafuse.convert(ckpt, lora, tmp_path / "out", format="int8")


@pytest.mark.parametrize(
    "options",
    [{"format": "nf4"}, {"format": "int8", "rounding": "unbiased"}, {"format": "base", "base_quant": "fp4"}],
)
def test_verify_makes_it_again(options, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    lorafuse.convert(ckpt, lora, tmp_path / "out", max_shard_size="2KB", **options)
    n_weights = len(checkpoint_tensors())
    assert lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])["weights"] == n_weights
    assert lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora], sample=3)["weights"] == 3


def test_verify_finds_a_code_that_is_another(tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "out", format="nf4")
    name, path = "model.layers.0.self_attn.q_proj.weight", tmp_path / "out/model.safetensors"
    raw = bytearray(path.read_bytes())
    start = int.from_bytes(raw[:8], "little")
    at = json.loads(raw[8 : 8 + start])[name]["data_offsets"][0] + 8 + start
    raw[at] ^= 1
    path.write_bytes(raw)
    [entry] = [entry for entry in receipt["outputs"] if entry["file"] == path.name]
    entry["sha256"] = hashlib.sha256(raw).hexdigest()
    (tmp_path / "out/lorafuse_receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(ResultError, match="differs from the merge of the inputs"):
        lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])


@pytest.mark.parametrize("options", [{"format": "nf4"}, {"format": "base", "base_quant": "nf4"}])
def test_batch_makes_the_same(options, tmp_path):
    """Also files that no adapter changes, which results share."""
    tensors = checkpoint_tensors(hidden=64)
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors)
    for i in range(3):
        of_job = {name: t * (i + 1) for name, t in adapter_tensors(tensors).items()}
        write_adapter(tmp_path / f"jobs/a{i}", of_job)
    lorafuse.batch(ckpt, tmp_path / "jobs", tmp_path / "many", max_shard_size="40KB", **options)
    for i in range(3):
        lorafuse.convert(
            ckpt, tmp_path / f"jobs/a{i}", tmp_path / f"one{i}", max_shard_size="40KB", **options
        )
        files = {path.name: path for path in (tmp_path / f"one{i}").glob("*") if "receipt" not in path.name}
        assert {n: p.read_bytes() for n, p in files.items()} == {
            n: (tmp_path / f"many/a{i}" / n).read_bytes() for n in files
        }


def test_bytes_do_not_depend_on_threads_or_memory(tmp_path, monkeypatch):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    made = []
    for n, limit in ((1, "60MB"), (4, "1GB")):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=n: range(n))
        out = tmp_path / f"out{n}"
        lorafuse.convert(ckpt, lora, out, format="nf4", rounding="unbiased", memory_limit=limit)
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_several_adapters_and_scales_of_a_batch(tmp_path):
    """A job of a list may have a format of its own."""
    tensors = checkpoint_tensors(hidden=64)
    ckpt, lora = (
        write_checkpoint(tmp_path / "ckpt", tensors),
        write_adapter(tmp_path / "lora", adapter_tensors(tensors)),
    )
    jobs = [{"adapter": "lora", "name": name, "format": name} for name in ("nf4", "int8", "dense")]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    lorafuse.batch(ckpt, tmp_path / "jobs.jsonl", tmp_path / "many")
    for name in ("nf4", "int8", "dense"):
        lorafuse.convert(ckpt, lora, tmp_path / name, format=name)
        assert_stored(stored(tmp_path / "many" / name), stored(tmp_path / name))
    two = {"adapters": [(lora, 0.5)], "adapter_scale": 0.5}
    lorafuse.convert(ckpt, lora, tmp_path / "two", format="nf4", **two)
    assert_stored(stored(tmp_path / "two"), stored(tmp_path / "nf4"))


def test_a_head_that_the_adapter_brings(base, tmp_path):
    """It is dense, and answers as transformers' quantization of the dense result does."""
    make = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(make(base("bf16"), num_labels=3), lora).save_pretrained(tmp_path / "lora")
    lorafuse.convert(base("bf16"), tmp_path / "lora", tmp_path / "dense")
    lorafuse.convert(base("bf16"), tmp_path / "lora", tmp_path / "out", format="nf4")
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **four_bit)
    models = [make(tmp_path / "out"), make(tmp_path / "dense", quantization_config=quantization)]
    classes = [{name: type(module) for name, module in model.named_modules()} for model in models]
    assert classes[0] == classes[1]
    assert classes[0]["score"] is torch.nn.Linear
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(*(model(tokens).logits for model in models))


@pytest.mark.parametrize("options", [{"format": "nf4"}, {"format": "base", "base_quant": "nf4"}])
def test_a_run_that_was_interrupted_goes_on(options, tmp_path):
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    options = options | {"max_shard_size": "2KB"}
    lorafuse.convert(ckpt, lora, tmp_path / "whole", **options)

    def interrupt(event):
        if event["event"] == "shard":
            raise KeyboardInterrupt

    events = []
    with pytest.raises(KeyboardInterrupt):
        lorafuse.convert(ckpt, lora, tmp_path / "out", on_event=interrupt, **options)
    lorafuse.convert(ckpt, lora, tmp_path / "out", on_event=events.append, **options)
    assert "resumed" in {event["event"] for event in events}
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
