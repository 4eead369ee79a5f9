"""Trains the adapters smollm2-dora and smollm2-int8 on the Python source code of the standard library.

    python -m bench.faithfulness.train_smollm2 --work DIR [NAME ...]

As smollm2-qlora was: rank 8, alpha 16, the q, k, v and o projections, 90 steps of AdamW (lr 1e-3) on batches
of 4 × 128 tokens, dropout 0. The base is the quantized one, decoded by bitsandbytes (smollm2.py) and frozen
in float32: the same values as in a quantized layer, and activations that no layer rounds. bitsandbytes' int8
layer would round those to 8 bits too, which is a property of that kernel and not of the weights that a merge
starts from.

Left out of training is every module that shares a line of 40 characters with the held-out tokens, and no
window that is drawn may share a run of 12 tokens with them. It was run by hand, once for each adapter: 6 to
15 minutes. Other versions of Python or torch, or another number of threads, give other bytes.
"""

import argparse
import json
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.faithfulness.smollm2 import ADAPTERS, HELD_OUT, Adapter, Work, load

STEPS, BATCH, LENGTH = 90, 4, 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINE, RUN = 40, 12


def training_text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    seen = {
        line
        for row in load_file(HELD_OUT)["input_ids"]
        for line in map(str.strip, tokenizer.decode(row).splitlines())
    }
    seen = {line for line in seen if len(line) >= LINE}
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ]
    kept = [text for text in texts if seen.isdisjoint(map(str.strip, text.splitlines()))]
    print(f"{len(kept)} of {len(texts)} modules share no line of {LINE} characters with the held-out tokens")
    return kept


def windows(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """int64 [STEPS, BATCH, LENGTH], drawn without replacement from the modules."""
    rows = [
        row
        for text in training_text(tokenizer)
        for row in torch.tensor(tokenizer(text).input_ids).split(LENGTH)
        if len(row) == LENGTH
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[: STEPS * BATCH]
    drawn = torch.stack([rows[i] for i in order])
    if runs(drawn) & runs(load_file(HELD_OUT)["input_ids"]):
        sys.exit(
            f"a window of the training text shares a run of {RUN} tokens with the held-out ones: draw others"
        )
    return drawn.view(STEPS, BATCH, LENGTH)


def runs(rows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(run) for run in rows.unfold(1, RUN, 1).reshape(-1, RUN).tolist()}


def train(adapter: Adapter, work: Work) -> None:
    torch.manual_seed(2)  # lora_A
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora="dora" in adapter.name
    )
    model = get_peft_model(load(work.decoded(adapter.base)), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step, ids in enumerate(windows(AutoTokenizer.from_pretrained(work.dense()))):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{adapter.name}: step {step + 1}, loss {loss.item():.4f}", flush=True)
    with tempfile.TemporaryDirectory() as saved:  # PEFT writes a model card too
        model.save_pretrained(saved, save_embedding_layers=False)
        tidy(Path(saved), adapter.path)


def tidy(saved: Path, out: Path) -> None:
    """Factors in bfloat16, which halves the file (a magnitude of 8 bits would move a row by more than
    training did)."""
    tensors = load_file(saved / "adapter_model.safetensors")
    rounded = {key: t if "magnitude" in key else t.bfloat16() for key, t in tensors.items()}
    out.mkdir(exist_ok=True)
    save_file(rounded, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_model.safetensors").chmod(0o644)  # safetensors writes 0600 whatever the umask
    # PEFT writes a set, in an order that changes from run to run, and the path of the base.
    named = {"target_modules": TARGETS, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    config = json.loads((saved / "adapter_config.json").read_text()) | named
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for checkpoints, as that of accuracy.py"
    )
    parser.add_argument("names", nargs="*", default=["smollm2-dora", "smollm2-int8"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for adapter in ADAPTERS:
        if adapter.name in args.names:
            train(adapter, Work(args.work))


if __name__ == "__main__":
    main()
