"""Task heads that the checkpoint lacks: transformers loads the output without a word and computes what
unmerged PEFT does."""

import json
import re

import pytest
import torch
import transformers
from build import CONFIG as LLAMA
from build import refusal, write_adapter, write_checkpoint
from oracle import config, read_adapter, read_tensors
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from unmerged import dense_model, largest_difference, small, train

import lorafuse
from lorafuse.errors import AdapterError
from lorafuse.structure.models import load_table

SEQ, TOKEN, QA = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
TASK = {SEQ: "SEQ_CLS", TOKEN: "TOKEN_CLS", QA: "QUESTION_ANS"}
HEAD = "base_model.model.score.weight"


def merge(ckpt, lora, out, **settings):
    warnings = []
    receipt = lorafuse.convert(
        ckpt,
        lora,
        out,
        on_event=lambda e: warnings.append(e["message"]) if e["event"] == "warning" else None,
        **settings,
    )
    return receipt, warnings


@pytest.mark.parametrize(
    ("kind", "auto", "head"),
    [
        ("fp32", SEQ, ["score.weight"]),
        ("fp32_tied", SEQ, ["score.weight"]),
        ("nf4", SEQ, ["score.weight"]),
        ("nf4_tied", TOKEN, ["score.weight", "score.bias"]),
        ("int8", SEQ, ["score.weight"]),
        ("gpt2", SEQ, ["score.weight"]),
        ("gpt2_nf4", TOKEN, ["classifier.weight", "classifier.bias"]),
        ("gpt2", QA, ["qa_outputs.weight", "qa_outputs.bias"]),
    ],
)
def test_a_head_on_a_causal_model(kind, auto, head, base, tmp_path):
    n_labels = 2 if auto is QA else 5
    targets = ["c_attn", "c_proj"] if kind.startswith("gpt2") else ["q_proj", "down_proj"]
    peft = train(
        dense_model(base(kind), auto, num_labels=n_labels),
        tmp_path / "lora",
        task_type=TASK[auto],
        target_modules=targets,
    )
    receipt, warnings = merge(base(kind), tmp_path / "lora", tmp_path / "out", dtype="float32")
    assert largest_difference(tmp_path / "out", auto, peft) < 1e-4
    assert {name for name, entry in receipt["tensors"].items() if entry["action"] == "added"} == set(head)
    assert set(receipt["adapter_tensors"]["used"]) == set(read_adapter(tmp_path / "lora"))
    assert "lm_head.weight" not in receipt["tensors"]
    written = config(tmp_path / "out")
    model_class = auto._model_mapping[
        type(transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    ].__name__
    assert written["architectures"] == [model_class]
    labels = [f"LABEL_{i}" for i in range(n_labels)]
    if auto is QA:  # GPT-2's has two outputs, whatever the labels
        assert "id2label" not in written
        said = ""
    else:
        assert list(written["id2label"].values()) == labels and written["label2id"] == {
            name: i for i, name in enumerate(labels)
        }
        said = " with 5 labels (LABEL_0, LABEL_1, LABEL_2 and 2 more)"
    tied = kind in ("fp32_tied", "nf4_tied") or kind.startswith("gpt2")
    said += "" if tied else "; lm_head.weight is left out"
    assert not (tmp_path / "out/generation_config.json").exists()
    assert warnings == [
        f"{tmp_path}/lora/adapter_model.safetensors: brings {', '.join(head)}, which the checkpoint lacks; "
        f"the output is a {model_class}{said}."
    ]


@pytest.mark.parametrize(
    ("kind", "source", "auto", "more"),
    [
        ("bert", "AutoModel", SEQ, {}),
        ("bert", "AutoModelForMaskedLM", TOKEN, {}),
        ("bert", "AutoModelForPreTraining", SEQ, {}),
        ("bert", "AutoModelForMaskedLM", SEQ, {"modules_to_save": ["pooler"]}),
        ("bert", "AutoModelForMaskedLM", QA, {}),
        ("roberta", "AutoModelForMaskedLM", SEQ, {}),
        ("roberta", "AutoModel", SEQ, {}),
        ("deberta-v2", "AutoModel", SEQ, {"modules_to_save": ["pooler"]}),
        ("mistral", "AutoModelForCausalLM", QA, {"num_key_value_heads": 2}),
        ("qwen3", "AutoModel", SEQ, {"num_key_value_heads": 2, "head_dim": 8}),
        ("gpt_neox", "AutoModelForCausalLM", SEQ, {}),
        ("gemma2", "AutoModelForCausalLM", TOKEN, {"num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_a_head_on_encoders_and_headless_models(kind, source, auto, more, tmp_path):
    saved = more.pop("modules_to_save", None) if "modules_to_save" in more else None
    ckpt = small(kind, getattr(transformers, source), tmp_path / "ckpt", **more)
    targets = {"deberta-v2": ["query_proj"], "gpt_neox": ["query_key_value"]}.get(kind, ["query", "q_proj"])
    model = dense_model(ckpt, auto, num_labels=2 if auto is QA else 3)
    peft = train(
        model, tmp_path / "lora", task_type=TASK[auto], target_modules=targets, modules_to_save=saved
    )
    merge(ckpt, tmp_path / "lora", tmp_path / "out")
    assert largest_difference(tmp_path / "out", auto, peft) < 1e-4


def test_a_head_that_the_checkpoint_has_is_replaced(tmp_path):
    ckpt = small(
        "llama",
        SEQ,
        tmp_path / "ckpt",
        num_key_value_heads=2,
        num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    peft = train(dense_model(ckpt, SEQ), tmp_path / "lora", task_type="SEQ_CLS", target_modules=["q_proj"])
    receipt, warnings = merge(ckpt, tmp_path / "lora", tmp_path / "out")
    assert receipt["tensors"]["score.weight"]["action"] == "replaced"
    assert config(tmp_path / "out")["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert warnings == []
    assert largest_difference(tmp_path / "out", SEQ, peft) < 1e-4


def test_lora_on_the_embedding_of_a_tied_model_with_a_head(base, tmp_path):
    """Without an output embedding nothing is tied, so nothing comes apart."""
    peft = train(
        dense_model(base("fp32_tied"), SEQ, num_labels=3),
        tmp_path / "lora",
        task_type="SEQ_CLS",
        target_modules=["embed_tokens", "q_proj"],
    )
    merge(base("fp32_tied"), tmp_path / "lora", tmp_path / "out")
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    assert largest_difference(tmp_path / "out", SEQ, peft) < 1e-4


@pytest.mark.parametrize("holder", ["adapter", "checkpoint"])
def test_labels_have_the_names_that_a_config_gives_as_many(holder, tmp_path):
    names = {"0": "bad", "1": "so so", "2": "good"}
    ckpt = write_checkpoint(
        tmp_path / "ckpt",
        config=LLAMA | ({"id2label": names, "num_labels": 3} if holder == "checkpoint" else {}),
    )
    lora = write_adapter(tmp_path / "lora", {HEAD: torch.ones(3, 16)}, task_type="SEQ_CLS")
    if holder == "adapter":
        (lora / "config.json").write_text(json.dumps({"id2label": names}))
    _, warnings = merge(ckpt, lora, tmp_path / "out")
    written = config(tmp_path / "out")
    assert written["id2label"] == names and written["label2id"] == {"bad": 0, "so so": 1, "good": 2}
    assert "with 3 labels (bad, so so, good)" in warnings[0]


def test_task_type_may_be_absent_where_the_names_decide(tmp_path):
    ckpt = write_checkpoint(tmp_path / "ckpt")
    lora = write_adapter(tmp_path / "lora", {HEAD: torch.ones(1, 16)}, task_type=None)
    merge(ckpt, lora, tmp_path / "out")
    assert config(tmp_path / "out")["architectures"] == ["LlamaForSequenceClassification"]
    assert config(tmp_path / "out")["id2label"] == {"0": "LABEL_0"}


ONE = torch.ones(3, 16)
P = "base_model.model."
REFUSALS = {
    "another width": (
        {P + "score.weight": torch.ones(3, 24)},
        {"task_type": "SEQ_CLS"},
        {},
        "base_model.model.score.weight is [3, 24], but score.weight of LlamaForSequenceClassification is "
        "[labels, 16] for this checkpoint; is the adapter for another base?",
    ),
    "a vector": (
        {P + "score.weight": torch.ones(16)},
        {"task_type": "SEQ_CLS"},
        {},
        "base_model.model.score.weight is [16], but score.weight of LlamaForSequenceClassification is "
        "[labels, 16] for this checkpoint; is the adapter for another base?",
    ),
    "bias of other labels": (
        {P + "score.weight": ONE, P + "score.bias": torch.ones(2)},
        {"task_type": "TOKEN_CLS"},
        {},
        "base_model.model.score.bias is [2], but score.bias of LlamaForTokenClassification is [labels] for "
        "this checkpoint; is the adapter for another base?",
    ),
    "two heads": (
        {P + "score.weight": ONE, P + "qa_outputs.weight": torch.ones(2, 16)},
        {"task_type": "SEQ_CLS"},
        {},
        "base_model.model.qa_outputs.weight is no part of the head of LlamaForSequenceClassification, which "
        "has score.weight; task_type in adapter_config.json says which head is meant.",
    ),
    "two heads and no task": (
        {P + "score.weight": ONE, P + "qa_outputs.weight": torch.ones(2, 16)},
        {"task_type": None},
        {},
        "base_model.model.qa_outputs.weight, base_model.model.score.weight are not one head that "
        "transformers knows: LlamaForSequenceClassification has score.weight; LlamaForTokenClassification "
        "has score.weight, score.bias; LlamaForQuestionAnswering has qa_outputs.weight, qa_outputs.bias.",
    ),
    "half a head": (
        {P + "score.weight": ONE},
        {"task_type": "TOKEN_CLS"},
        {},
        "LlamaForTokenClassification also has score.bias, which neither the checkpoint nor the adapter "
        "holds: it was random when training began, and was not saved. Train with it in modules_to_save.",
    ),
    "a class with another prefix": (
        {P + "qa_outputs.weight": torch.ones(2, 16), P + "qa_outputs.bias": torch.ones(2)},
        {"task_type": "QUESTION_ANS"},
        {},
        "holds the head of LlamaForQuestionAnswering, which keeps the model under 'transformer', while the "
        "checkpoint has 'model': transformers loads none of its weights into that class, so the adapter was "
        "trained on another base.",
    ),
    "a head that transformers does not know": (
        {P + "score.weight": ONE},
        {"task_type": "SEQ_CLS"},
        {"model_type": "none"},
        "base_model.model.score.weight belongs to score.weight, which the checkpoint does not have (nearest: "
        "model.norm.weight, lm_head.weight).",
    ),
    "remote code": (
        {P + "score.weight": ONE},
        {"task_type": "SEQ_CLS"},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Llama"}},
        "base_model.model.score.weight belongs to score.weight, which the checkpoint does not have (nearest: "
        "model.norm.weight, lm_head.weight).",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_head_that_does_not_belong_is_refused(case, tmp_path):
    tensors, fields, changes, message = REFUSALS[case]
    ckpt = write_checkpoint(tmp_path / "ckpt", config=LLAMA | changes)
    lora = write_adapter(tmp_path / "lora", tensors, **fields)
    with pytest.raises(AdapterError) as caught:
        merge(ckpt, lora, tmp_path / "work/out")
    assert refusal(caught) == f"{lora}/adapter_model.safetensors: {message}"
    assert not (tmp_path / "work").exists()


def test_a_pooler_that_was_random_in_training_is_refused(tmp_path):
    ckpt = small("bert", transformers.AutoModelForMaskedLM, tmp_path / "ckpt")
    train(dense_model(ckpt, SEQ), tmp_path / "lora", task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(
        AdapterError,
        match=re.escape("also has bert.pooler.dense.bias, bert.pooler.dense.weight, which neither"),
    ):
        merge(ckpt, tmp_path / "lora", tmp_path / "out")


def test_names_that_fit_two_classes_need_the_task(tmp_path):
    ckpt = small("bert", transformers.AutoModel, tmp_path / "ckpt")
    peft = train(
        dense_model(ckpt, SEQ), tmp_path / "lora", target_modules=["query"], modules_to_save=["classifier"]
    )
    # Without a task PEFT names the class.
    merge(ckpt, tmp_path / "lora", tmp_path / "out")
    assert largest_difference(tmp_path / "out", SEQ, peft) < 1e-4
    assert config(tmp_path / "out")["architectures"] == ["BertForSequenceClassification"]
    said = tmp_path / "lora/adapter_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"auto_mapping": None}))
    with pytest.raises(AdapterError) as caught:
        merge(ckpt, tmp_path / "lora", tmp_path / "other")
    assert str(caught.value) == (
        f"{tmp_path}/lora/adapter_model.safetensors: base_model.model.classifier.bias, "
        "base_model.model.classifier.weight may be the head of BertForSequenceClassification or "
        "BertForTokenClassification; set task_type in adapter_config.json to SEQ_CLS or TOKEN_CLS."
    )


def test_the_table_is_that_of_transformers():
    """For the types that the other tests use; fixtures/make_structure.py makes it for all."""
    for kind in ("llama", "gpt2", "bert", "roberta", "deberta-v2", "mistral"):
        for name, task in load_table()["types"][kind]["classes"].items():
            cls = getattr(transformers, name)
            with torch.device("meta"):
                model = cls(cls.config_class(num_labels=7, num_hidden_layers=1))
            assert cls.base_model_prefix == task["prefix"]
            beside = {name for name in model.state_dict() if not name.startswith(task["prefix"] + ".")}
            assert {re.sub(r"\.\d+\.", ".*.", name) for name in beside} == set(task["head"])
