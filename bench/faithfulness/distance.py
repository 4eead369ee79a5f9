"""How far a merged model is from the unmerged one.

The unmerged model is the quantized base decoded by bitsandbytes, with PEFT's adapter beside it. What is
compared with it is a directory, which transformers loads without complaint; both run with float32 activations
on 40 × 128 held-out tokens.

* KL: mean over tokens of KL(unmerged ‖ row), from logits in float64.
* loss: mean next-token cross-entropy.
* top-1: share of tokens whose likeliest successor is the unmerged model's.
* kept = ⟨S − W, Δ⟩ / ⟨Δ, Δ⟩ and noise = ‖S − W − Δ‖ / ‖Δ‖ over all merged weights together, in float64 and
  from the files: S the row's weights, W the decoded base, Δ the update. kept 1 = the whole update is there,
  0 = it is gone.
* MB: of the files of weights, as a user keeps them; bits a weight: of all of the model's.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from bench.faithfulness.smollm2 import HELD_OUT, N_PARAMETERS, Adapter, Work, load, once

BATCH = 8  # sequences of 128 tokens: 200 MB of float32 logits


def held_out() -> tuple[torch.Tensor, ...]:
    return load_file(HELD_OUT)["input_ids"].long().split(BATCH)


def logits_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for ids in held_out():
        with torch.inference_mode():
            yield model(ids).logits


def unmerged(work: Work, adapter: Adapter) -> Path:
    """The logits of the model that was trained, float32 [8, 128, vocab] in each file."""

    def make(out: Path) -> None:
        model = PeftModel.from_pretrained(load(work.decoded(adapter.base)), adapter.path).eval()
        for i, logits in enumerate(logits_of(model)):
            save_file({"logits": logits}, out / f"{i}.safetensors")

    return once(work.root / f"{adapter.name}-unmerged", make)


def compare(model: PreTrainedModel, logits_dir: Path) -> tuple[float, float, float]:
    """(KL, loss, top-1 agreement), one sequence at a time: float64 log-probabilities of one take 50 MB."""
    kl = loss = agree = 0.0
    n_sequences = 0
    for i, (ids, logits) in enumerate(zip(held_out(), logits_of(model), strict=True)):
        want = load_file(logits_dir / f"{i}.safetensors")["logits"]
        for tokens, ours, theirs in zip(ids, logits, want, strict=True):
            q, p = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)  # [128, vocab]
            kl += (p.exp() * (p - q)).sum(-1).mean().item()
            loss += torch.nn.functional.nll_loss(q[:-1], tokens[1:]).item()
            agree += (q.argmax(-1) == p.argmax(-1)).double().mean().item()
            n_sequences += 1
    return kl / n_sequences, loss / n_sequences, agree / n_sequences


def merged_in_float64(
    adapter: Adapter, base: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, W, W + Δ) in float64 [out, in] for each weight that the adapter updates; base(name) is W in any
    dtype.

    LoRA: W + Δ = V = W + alpha / r · B A. DoRA (arXiv:2402.09353, equation 5): W + Δ = m · V / ‖V‖, a norm
    for each row.
    """
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            W = base(name).double()
            V = W + config["lora_alpha"] / config["r"] * (
                tensors[key.replace("lora_A", "lora_B")].double() @ A.double()
            )
            if config["use_dora"]:
                m = tensors[key.replace("lora_A.weight", "lora_magnitude_vector")].double()  # [out]
                V *= (m / V.norm(dim=1))[:, None]
            yield name, W, V


def kept_and_noise(path: Path, decoded: Path, adapter: Adapter) -> tuple[float, float]:
    inner = norm = error = 0.0
    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(f, "pt")) for f in sorted(path.glob("*.safetensors"))]
        where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)
        base = stack.enter_context(safe_open(decoded / "model.safetensors", "pt"))
        for name, W, V in merged_in_float64(adapter, base.get_tensor):
            S = where[name].get_tensor(name).double()
            inner += ((S - W) * (V - W)).sum().item()
            norm += (V - W).square().sum().item()
            error += (S - V).square().sum().item()
    return inner / norm, (error / norm) ** 0.5


def relative_sizes(adapter: Adapter, work: Work) -> tuple[float, float]:
    """(‖Δ‖ / ‖W‖, ‖W₁₆ − W‖ / ‖W‖) over the weights that the adapter updates: the update, and what quantizing
    the base did."""
    update = error = norm = 0.0
    with (
        safe_open(work.decoded(adapter.base) / "model.safetensors", "pt") as base,
        safe_open(work.dense() / "model.safetensors", "pt") as dense,
    ):
        for name, W, V in merged_in_float64(adapter, base.get_tensor):
            update += (V - W).square().sum().item()
            error += (dense.get_tensor(name).double() - W).square().sum().item()
            norm += W.square().sum().item()
    return (update / norm) ** 0.5, (error / norm) ** 0.5


# ---- the report


@dataclass(frozen=True)
class Row:
    kl: float
    loss: float
    top1: float
    kept: float
    noise: float
    nbytes: int


def measure(path: Path, stored: Path, work: Work, adapter: Adapter) -> Row:
    """`path` is loaded; `stored` is what a user would keep of it."""
    return Row(
        *compare(load(path), unmerged(work, adapter)),
        *kept_and_noise(path, work.decoded(adapter.base), adapter),
        nbytes_of(stored),
    )


def nbytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def figures(row: Row) -> list[str]:
    return [f"{row.kl:.1e}", f"{row.loss:.4f}", f"{row.top1:.2%}", f"{row.kept:.3f}", f"{row.noise:.3g}"]


def megabytes(row: Row) -> str:
    return f"{row.nbytes / 1e6:.0f}"


def size(row: Row) -> list[str]:
    return [f"{8 * row.nbytes / N_PARAMETERS:.1f}", megabytes(row)]


HEADER = ["KL to unmerged", "loss", "top-1", "kept", "noise"]
SIZE_HEADER = ["bits a weight", "MB"]


LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def versions(*more: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in (*LIBRARIES, *more))


def around_block(path: Path, word: str) -> tuple[str, str]:
    """What stays of `path` before and after the block; asked for before the work, so that a bad file costs no
    minutes."""
    begin, end = f"<!-- {word}:begin -->", f"<!-- {word}:end -->"
    text = path.read_text()
    if any(text.count(marker) != 1 for marker in (begin, end)):
        sys.exit(f"{path}: expected one {begin} and one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n", f"\n{end}{rest.split(end)[1]}"
