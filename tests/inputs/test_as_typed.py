"""Inputs as people type them: what is taken for what, and a sentence where it cannot be."""

import json

import pytest
import torch
from build import files_of, write_adapter, write_checkpoint
from click.testing import CliRunner

import lorafuse
from lorafuse import cli
from lorafuse.errors import AdapterError, CheckpointError, UsageError
from lorafuse.settings import Settings, parse_nbytes

ORDER = "the order is CKPT ADAPTER OUT_DIR."
DEEPSPEED = (
    " It holds a DeepSpeed checkpoint: `python zero_to_fp32.py . OUT --safe_serialization` makes safetensors "
    "files of it."
)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A checkpoint and an adapter in the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")


def test_a_tilde_and_a_file_of_the_directory(inputs, tmp_path):
    ckpt, lora = inputs
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    lorafuse.convert("~/ckpt/config.json", "~/lora/adapter_model.safetensors", "~/typed")
    made, typed = files_of(tmp_path / "out"), files_of(tmp_path / "typed")
    assert made.keys() == typed.keys()
    assert made["model.safetensors"] == typed["model.safetensors"]
    assert lorafuse.verify("~/typed/config.json", ckpt="~/ckpt", adapters=["~/lora"])["weights"]
    assert lorafuse.inspect("~/typed/model.safetensors")["kind"] == "merged"


def test_a_directory_that_is_called_tilde_wins(inputs, tmp_path, monkeypatch):
    ckpt, lora = inputs
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    lora.rename(tmp_path / "~" / "lora")
    lorafuse.convert(ckpt, "~/lora", "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_dtypes_in_capitals_and_of_torch(inputs, tmp_path):
    assert Settings(dtype="BF16") == Settings(dtype=torch.bfloat16) == Settings(dtype="Bfloat16")
    command = [*map(str, inputs), str(tmp_path / "out"), "--dtype", "BF16", "--dry-run", "--json"]
    assert CliRunner().invoke(cli.convert, command).exit_code == 0
    lorafuse.convert(*inputs, tmp_path / "out", dtype=torch.float16)
    with pytest.raises(UsageError, match=r"^dtype is int8; expected one of auto, float32"):
        lorafuse.convert(*inputs, tmp_path / "new", dtype=torch.int8)


def test_an_adapter_as_jobs(inputs, tmp_path):
    with pytest.raises(UsageError) as caught:
        lorafuse.batch(*inputs, tmp_path / "out")
    assert str(caught.value) == (
        f"{inputs[1]}: has no sub-directory, but is an adapter itself, which `lorafuse convert` merges; "
        "expected a directory of adapters, or a JSONL file with a job in each line."
    )


@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_names_of_dtypes(inputs, tmp_path, short, dtype):
    assert Settings(dtype=short) == Settings(dtype=dtype)
    result = CliRunner().invoke(
        cli.convert, [*map(str, inputs), str(tmp_path / "out"), "--dtype", short, "--dry-run", "--json"]
    )
    assert result.exit_code == 0
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"adapter": "~/lora", "dtype": short}))
    (state,) = lorafuse.batch(inputs[0], jobs, tmp_path / "root")
    assert (state.name, state.state) == ("lora", "done")
    settings = json.loads((tmp_path / "root/lora/lorafuse_receipt.json").read_text())["settings"]
    assert settings["dtype"] == dtype


def test_binary_units():
    assert [parse_nbytes(text) for text in ("5GiB", "1.5 kib", "5GB")] == [5 << 30, 1536, 5 * 10**9]


def test_a_small_number_without_a_unit():
    with pytest.raises(UsageError) as caught:
        parse_nbytes("10")
    assert str(caught.value) == "'10' is so many bytes; did you mean 10MB or 10GB?"
    assert parse_nbytes(10) == 10
    assert parse_nbytes("5000000000") == 5 * 10**9


def refusal(ckpt, adapter, out):
    with pytest.raises((CheckpointError, AdapterError)) as caught:
        lorafuse.convert(ckpt, adapter, out)
    return str(caught.value)


def test_swapped_arguments(inputs, tmp_path):
    ckpt, lora = inputs
    assert refusal(lora, ckpt, tmp_path / "out").endswith(ORDER)
    assert refusal(lora, lora, tmp_path / "out").endswith(
        f"{lora} is no complete checkpoint. It holds an adapter; {ORDER}"
    )


def test_a_full_fine_tune_as_adapter(inputs, tmp_path):
    ckpt, _ = inputs
    assert refusal(ckpt, ckpt, tmp_path / "out") == (
        f"{ckpt}/adapter_config.json: not found; {ckpt} is no PEFT adapter. It holds a whole model: a full "
        f"fine-tune has nothing to merge; if the arguments are swapped, {ORDER}"
    )


@pytest.mark.parametrize("held", ["zero_to_fp32.py", "global_step100/x.pt"])
def test_a_deepspeed_folder(inputs, tmp_path, held):
    ckpt, lora = inputs
    folder = tmp_path / "run"
    (folder / held).parent.mkdir(parents=True)
    (folder / held).touch()
    assert refusal(folder, lora, tmp_path / "out").endswith(DEEPSPEED)
    assert refusal(ckpt, folder, tmp_path / "out").endswith(DEEPSPEED)


def test_an_adapter_whose_weights_are_missing(inputs, tmp_path):
    ckpt, lora = inputs
    (lora / "adapter_model.safetensors").unlink()
    assert refusal(ckpt, lora, tmp_path / "out") == (
        f"{lora}: holds neither adapter_model.safetensors nor adapter_model.bin: the adapter's weights are "
        "missing. Was its upload or download cut off?"
    )


@pytest.mark.parametrize("typed", ["", "/model.gguf"])
def test_gguf(inputs, tmp_path, typed):
    _, lora = inputs
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").touch()
    assert refusal(f"{folder}{typed}", lora, tmp_path / "out").endswith(
        "It has model.gguf: load that with `gguf_file=` in transformers and save it with save_pretrained, "
        "which makes safetensors."
    )


def test_folders_that_are_no_adapters_are_said_and_left_out(inputs, tmp_path):
    ckpt, _ = inputs
    jobs = tmp_path / "jobs"
    write_adapter(jobs / "a")
    (jobs / "logs").mkdir()
    (jobs / "logs" / "events.out").touch()
    said = []
    states = lorafuse.batch(ckpt, jobs, tmp_path / "root", on_event=said.append)
    assert [(state.name, state.state) for state in states] == [("a", "done")]
    notes = [event["message"] for event in said if event["event"] == "warning"]
    assert notes == [f"{jobs}/logs: holds no adapter, and is left out."]
    with pytest.raises(UsageError, match="has no sub-directory with an adapter; expected a directory of"):
        lorafuse.batch(ckpt, _only_logs(tmp_path), tmp_path / "other")


def _only_logs(tmp_path):
    only = tmp_path / "only"
    (only / "logs").mkdir(parents=True)
    (only / "logs" / "x").touch()
    return only


def test_a_hub_url_is_said_without_what_may_be_secret(hub, inputs, tmp_path):
    hub.add("me/tuned", inputs[1])
    url = "https://huggingface.co/me/tuned?token=hf_secret"
    result = CliRunner().invoke(cli.convert, [str(inputs[0]), url, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "Merged me/tuned into " in result.output
    assert "hf_secret" not in result.output
