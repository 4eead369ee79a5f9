"""Adapters as PEFT trains and saves them, the answers of models, and merged weights against float64."""

import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import peft
import peft.tuners.boft.layer as boft_layer
import torch
from oracle import CONV1D, config, decode, read_adapter, read_tensors
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_cases import SPREAD, Case

PREFIX = "base_model.model."


class BlockDiagonal:
    """Stands for PEFT's CUDA extension, without which BOFT has one butterfly factor."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*part) for part in blocks])]


boft_layer._FBD_CUDA = BlockDiagonal


class Trained(NamedTuple):
    """An adapter that PEFT wrote, which is not to be changed, its base, and what PEFT's model answers."""

    case: Case
    ckpt: Path
    adapter: Path
    answers: torch.Tensor  # of the unmerged model
    answers_of_base: torch.Tensor  # with the adapter disabled

    def copy(self, path: Path) -> Path:
        """The adapter once more, to be changed."""
        return Path(shutil.copytree(self.adapter, path))


def in_peft(model, peft_type, settings, spread=0.05):
    """PEFT's model of that type in eval mode, every trained value moved at random."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**settings))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * spread)
    return wrapped.eval()


def train(case: Case, ckpt: Path, path: Path) -> Trained:
    """PEFT's model stands on the decoded weights of the checkpoint, in fp32."""
    settings = {"task_type": "CAUSAL_LM"} | case.settings
    model = in_peft(decoded_model(ckpt), case.peft_type, settings, SPREAD.get(case.peft_type, 0.05))
    if case.peft_type == "ADALORA":
        for name, kept in (settings.get("rank_pattern") or {}).items():
            model.get_parameter(f"{PREFIX}{name}").data[~torch.tensor(kept)] = 0
    model.save_pretrained(path)
    with model.disable_adapter():
        answers_of_base = answers(model)
    return Trained(case, ckpt, path, answers(model), answers_of_base)


decoded_once = cache(decode)


def decoded(ckpt):
    """decode(ckpt) of a checkpoint that is not changed meanwhile, made once; the values are the caller's."""
    return {name: (value.clone(), dtype) for name, (value, dtype) in decoded_once(ckpt).items()}


def decoded_model(ckpt):
    """The model that transformers makes of a checkpoint's config, in fp32, with the decoded weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    conf = AutoConfig.from_pretrained(ckpt)
    conf.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(conf, dtype=torch.float32)
    values = {name: value.float() for name, (value, _) in decoded(ckpt).items()}
    assert not model.load_state_dict(values, strict=False).unexpected_keys
    model.tie_weights()
    return model


def answers(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 20)[None]).logits


def load(path):
    """transformers' model of a directory, which lacks nothing and has nothing too much, in fp32."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    return model


def assert_same_answers(out_dir, expected, tolerance=1e-4):
    """A merged directory answers as a model, or as the answers that a model gave."""
    expected = expected if isinstance(expected, torch.Tensor) else answers(expected)
    assert (answers(load(out_dir)) - expected).abs().max() < tolerance


def weights_in_float64(ckpt, adapter, formula, scale=1.0):
    """{weight: [W + scale · (W' − W) in float64, whether the adapter changes it]} of a whole checkpoint."""
    wanted = {name: [value, False] for name, (value, _) in decoded(ckpt).items()}
    conf, turned = config(adapter, "adapter_config.json"), config(ckpt)["model_type"] == "gpt2"
    modules, shared = {}, {}
    for key, stored in read_adapter(adapter).items():
        tensor = stored.double() if stored.is_floating_point() else stored
        parts = key.removeprefix(PREFIX).split(".")
        ends = (n for n in range(len(parts) - 1, 0, -1) if f"{'.'.join(parts[:n])}.weight" in wanted)
        if key.startswith(PREFIX) and (end := next(ends, 0)):
            module = ".".join(parts[:end])
            modules.setdefault(module, {"module": module})[".".join(parts[end:])] = tensor
        else:
            shared[key.removeprefix("base_model.")] = tensor
    for module, tensors in modules.items():
        weight, bias = wanted[f"{module}.weight"], wanted.get(f"{module}.bias", [None, False])
        W, b = weight[0], tensors.pop("base_layer.bias", bias[0])
        is_conv1d = turned and CONV1D.search(f"{module}.weight")
        new_W, new_b = formula(W.T if is_conv1d else W, b, tensors, conf, shared)
        for entry, old, new in ((weight, W, new_W.T if is_conv1d else new_W), (bias, b, new_b)):
            if old is not None:
                value = old if new is old else old + scale * (new - old)
                entry[:] = value, not torch.equal(value, entry[0])
    return wanted


def assert_weights(out_dir, wanted, before, slack):
    """Changed weights within slack(W', W), all others bit for bit; `before` is {weight: W in float64}."""
    found = read_tensors(out_dir)
    assert found.keys() == wanted.keys()
    assert any(changed for _, changed in wanted.values())
    for name, (value, changed) in wanted.items():
        assert found[name].shape == value.shape
        if changed:
            error = (found[name].double() - value).abs()
            assert (error <= slack(value, before[name])).all(), name
            assert (value - before[name]).abs().max() > 1e-3, f"{name}: the adapter changes nothing"
        else:
            assert torch.equal(found[name].double(), value), name
