"""What is particular to single types that multiply, project or replace W."""

import json
from functools import partial

import formulas_applied
import pytest
import torch
from build import rewrite
from layers import Large, save_module
from oracle import decode, read_adapter, read_tensors
from peft_cases import FROD, Q_DOWN
from refusals import MODULE, Q, refusal_of
from trained import assert_same_answers, assert_weights, in_peft, weights_in_float64

import lorafuse
from lorafuse.adapters.types import frod
from lorafuse.errors import UsageError


def test_an_hf_conv1d_is_refused_where_peft_has_no_such_layer(base, trained, tmp_path):
    made = trained("hra")
    key = "base_model.model.transformer.h.0.attn.c_proj.hra_u"

    def change(stored):
        stored.clear()
        stored[key] = torch.zeros(64, 4)

    assert refusal_of(made._replace(ckpt=base("gpt2")), tmp_path, {}, change) == (
        f"{{file}}: {key} updates transformer.h.0.attn.c_proj.weight, an HF Conv1D, which HRA does not adapt."
    )


def test_biases_that_peft_did_not_save_are_missed(trained, tmp_path):
    made = trained("hra")
    adapter = made.copy(tmp_path / "adapter")
    rewrite(adapter, bias="hra_only")
    assert warnings_of(made.ckpt, adapter, tmp_path / "out") == [
        f"{adapter}/adapter_model.safetensors: bias is 'hra_only', but no trained bias is in the file; peft "
        "before 0.21 did not save them."
    ]


def warnings_of(ckpt, adapter, out_dir):
    events = []
    lorafuse.convert(ckpt, adapter, out_dir, on_event=events.append)
    return [e["message"] for e in events if e["event"] == "warning"]


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_short_series_of_oft_are_those_of_peft(terms, trained, tmp_path):
    """PEFT computes four terms when three are asked for, and does not halve the last of two."""
    made = trained("oft", num_cayley_neumann_terms=terms)
    lorafuse.convert(made.ckpt, made.adapter, tmp_path / "out")
    assert_same_answers(tmp_path / "out", made.answers)


def test_oft_of_old_releases_is_merged_as_it_was_trained(trained, tmp_path):
    """Before 0.18 the last term of the series counted twice, and the config named no version."""
    made = trained("oft")
    adapter = made.copy(tmp_path / "adapter")
    rewrite(adapter, peft_version=None)
    assert warnings_of(made.ckpt, adapter, tmp_path / "out") == [
        f"{adapter}/adapter_config.json: was written by peft before 0.18, whose Cayley-Neumann series had "
        "another last term; it is merged as it was trained, which later releases of peft do not do."
    ]
    wanted = weights_in_float64(made.ckpt, adapter, partial(formulas_applied.oft, doubled=True))
    before = {name: value for name, (value, _) in decode(made.ckpt).items()}
    assert_weights(tmp_path / "out", wanted, before, lambda value, w: 1e-6 * value.abs().max())


def test_frod_on_half_precision_uses_the_u_that_was_trained(base, tmp_path):
    """U was rounded to the dtype of the base before λ was trained on it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("bf16"), dtype=torch.bfloat16)
    peft = in_peft(model, "FROD", Q_DOWN | FROD | {"task_type": "CAUSAL_LM"})
    peft.save_pretrained(tmp_path / "adapter")
    lorafuse.convert(base("bf16"), tmp_path / "adapter", tmp_path / "out", dtype="float32")
    layer = peft.get_submodule(f"{Q}")
    u, v, s, lambdas = layer._get_frod_tensors("default", device="cpu", dtype=torch.float64)
    found = read_tensors(tmp_path / "out")[f"{MODULE}.weight"].double()
    assert (found - u @ (s.to_dense() + lambdas.diag()) @ v.T).abs().max() < 2e-6
    assert layer.frod_U["default"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "module", ["lm_head", "layer.0.attention.output.dense", "layers.3.fc", "a.b.q_proj", "3.output.dense"]
)
def test_frod_finds_the_kind_of_a_layer_as_peft_does(module):
    from peft.tuners.frod.model import _category_from_key

    assert frod._category(module) == _category_from_key(module)


def test_a_module_that_osf_does_not_train_is_ignored_with_the_reason(trained, tmp_path):
    made = trained("osf, ranks")
    receipt = lorafuse.convert(made.ckpt, made.adapter, tmp_path / "out")
    assert receipt["adapter_tensors"]["ignored"] == dict.fromkeys(
        [f"{Q}.osf_svd_params.{x}_low" for x in "USV"], "no singular value of the module is trained"
    )


@pytest.mark.parametrize("kind", ["bf16", "nf4_dq"])
def test_osf_that_changes_nothing_gives_the_base(kind, base, tmp_path):
    """In half precision too, where the parts of the SVD were rounded before they were trained."""
    from peft import OSFConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("bf16"), dtype=torch.bfloat16)
    model.load_state_dict({name: value.bfloat16() for name, (value, _) in decode(base(kind)).items()})
    get_peft_model(model, OSFConfig(task_type="CAUSAL_LM", **Q_DOWN)).save_pretrained(tmp_path / "adapter")
    lorafuse.convert(base(kind), tmp_path / "adapter", tmp_path / "out")
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert torch.equal(
            tensor, model.state_dict().get(name.replace("proj.", "proj.base_layer."), tensor)
        ), name


def test_a_weight_that_does_not_fit_the_limit_with_its_svd_is_named(tmp_path):
    model = Large()
    save_module(model, tmp_path / "ckpt")
    adapter = tmp_path / "adapter"
    in_peft(model, "OSF", {"target_modules": ["one"]}).save_pretrained(adapter)
    with pytest.raises(
        UsageError, match=r"^A memory limit of 50 MB is too small: \d+ MB .* most of it for one\.weight\."
    ):
        lorafuse.convert(tmp_path / "ckpt", adapter, tmp_path / "work/out", memory_limit="50MB")
    assert not (tmp_path / "work").exists()


def test_replaced_rows_are_bit_exact_and_the_pair_stays_tied(trained, tmp_path):
    """A row is copied, not added to; PEFT saves it for both sides of a tied pair, which stays one tensor."""
    made = trained("trainable_tokens, tied", "bf16_tied", token_indices=[90, 1, 2])
    receipt = lorafuse.convert(made.ckpt, made.adapter, tmp_path / "out")
    found, stored = read_tensors(tmp_path / "out"), read_adapter(made.adapter)
    embed = found["model.embed_tokens.weight"]
    assert torch.equal(
        embed[torch.tensor([90, 1, 2])],
        stored["base_model.model.model.embed_tokens.trainable_tokens_delta"].bfloat16(),
    )
    assert (
        "lm_head.weight" not in found
        and json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    )
    assert receipt["adapter_tensors"]["ignored"] == {
        "base_model.model.lm_head.trainable_tokens_delta": "equal to the update of "
        "model.embed_tokens.weight, to which it is tied"
    }
