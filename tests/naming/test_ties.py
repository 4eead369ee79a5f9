"""The table of tied weights against transformers' own classes."""

import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from lorafuse.files.tensors import TensorSpec
from lorafuse.naming import Names
from lorafuse.naming.ties import find_ties, load_ties
from lorafuse.naming.vocabulary import size_conflict

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "fixtures"))
from make_ties import PLAIN, built, expanded, model_classes, roots

TRANSFORMERS = model_classes()  # a second and more

CLASSES = load_ties()["classes"]
# Composed of models that their config names, which is not in the table.
COMPOSED = {"EncoderDecoderModel", "SpeechEncoderDecoderModel", "VisionEncoderDecoderModel"}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def same_version():
    if load_ties()["transformers"] != transformers.__version__:
        pytest.skip(f"the table is that of transformers {load_ties()['transformers']}")


def roots_of_names(keys):
    return {target: pair[0] for target, pair in roots({t: (s, None) for t, s in keys.items()}).items()}


def test_every_class_that_ties_is_in_the_table(same_version):
    """What a class says in plain names is what its entry says. A class that lacks the parameter itself has
    only inherited the words."""
    n_checked = 0
    for name, cls in TRANSFORMERS.items():
        keys = cls._tied_weights_keys
        if not isinstance(keys, dict) or not all(PLAIN.fullmatch(n) for pair in keys.items() for n in pair):
            assert not keys or name in CLASSES or name in load_ties()["left_out"], name
            continue
        to = CLASSES.get(name, {}).get("to", {})
        for target, source in roots_of_names(keys).items():
            assert to.get(target, source) in (source, to.get(source)), (name, target)
            n_checked += target in to
    assert n_checked > 500


def config_of(name, entry, *, flag):
    """As much of a config.json as `find_ties` looks at."""
    cls = TRANSFORMERS.get(name)
    sections = {section: {"tie_word_embeddings": flag} for section in set(entry.get("sections", {}).values())}
    model_type = cls.config_class.model_type if cls else ""
    return {"architectures": [name], "model_type": model_type, "tie_word_embeddings": flag, **sections}


def parameters(entry):
    names = {entry.get("embed"), entry.get("head"), *entry.get("to", {}), *entry.get("to", {}).values()}
    return names - {None}


def of_ties(ties):
    return {name: tie.holder for tie in ties.ties for name in tie.others}


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - COMPOSED))
def test_the_ties_of_a_checkpoint_are_those_of_its_class(name):
    """Of a checkpoint that holds each parameter once, whose config says yes; and of one that holds all names,
    whose config says no."""
    entry = CLASSES[name]
    to = entry.get("to", {})
    config = config_of(name, entry, flag=True)
    ties = find_ties(parameters(entry) - set(to), config)
    if entry.get("embed", "") in parameters(entry):
        assert ties is not None
    if ties is None:  # neither embedding: bare biases, parts of detectors
        return
    assert of_ties(ties) == to
    assert (ties.embed, ties.head) == (entry.get("embed"), entry.get("head"))
    apart = find_ties(parameters(entry), config_of(name, entry, flag=False))
    assert apart is not None and apart.ties == []


@pytest.mark.parametrize(("flags", "tied"), [({}, True), ({"tie_word_embeddings": False}, False)])
@pytest.mark.parametrize("section", ["", "text_config"])
def test_the_flag_of_the_text_part_counts(section, flags, tied):
    weights = ["model.language_model.embed_tokens.weight", "lm_head.weight"]
    part = {section: flags} if section else flags
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", **part}
    ties = find_ties(weights, config)
    assert ties is not None and bool(ties.ties) is tied


def names_of(shapes, config):
    weights = {
        name: SimpleNamespace(spec=TensorSpec("F32", shape), as_stored=True) for name, shape in shapes.items()
    }
    return Names(weights, config)


BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "tie_word_embeddings": True}
BERT_SHAPES = {
    "bert.embeddings.word_embeddings.weight": (9, 4),
    "cls.predictions.bias": (9,),
    "bert.pooler.dense.weight": (4, 4),
}


def test_a_head_and_its_bias_that_are_not_stored_have_names():
    names = names_of(BERT_SHAPES, BERT)
    assert {name: sources.spec.shape for name, sources in names.unstored().items()} == {
        "cls.predictions.decoder.weight": (9, 4),
        "cls.predictions.decoder.bias": (9,),
    }
    assert names.may_resize("cls.predictions.bias") and not names.may_resize("bert.pooler.dense.weight")


def test_remote_code_has_classes_of_its_own():
    assert find_ties(BERT_SHAPES, {**BERT, "auto_map": {"AutoModel": "x.Y"}}) is None


@pytest.mark.parametrize(
    ("rows", "vocab_size", "conflict"),
    [
        ({}, 9, None),
        ({}, 8, "vocab_size in config.json is 8, but bert.embeddings.word_embeddings.weight has 9 rows"),
        (
            {"cls.predictions.bias": 8},
            9,
            "cls.predictions.bias has 8 rows and bert.embeddings.word_embeddings.weight 9",
        ),
    ],
)
def test_sizes_of_a_vocabulary(rows, vocab_size, conflict):
    names = names_of(BERT_SHAPES, BERT)
    n_rows = {name: shape[0] for name, shape in BERT_SHAPES.items()} | rows
    assert size_conflict(names, n_rows, BERT | {"vocab_size": vocab_size}) == conflict


def test_the_size_in_a_text_part_counts():
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"vocab_size": 8},
    }
    shapes = {"model.language_model.embed_tokens.weight": (9, 4)}
    conflict = size_conflict(names_of(shapes, config), dict.fromkeys(shapes, 9), config)
    assert conflict == (
        "text_config.vocab_size in config.json is 8, but model.language_model.embed_tokens.weight has 9 rows"
    )


SAMPLE = (
    "BertForMaskedLM",
    "MambaForCausalLM",
    "BartForConditionalGeneration",
    "LukeForMaskedLM",
    "MarianMTModel",
)


# Built with another number of rows than what they are tied to; transformers puts that in their place.
OTHER_SIZES = {"ImageGPTForCausalImageModeling", "KyutaiSpeechToTextForConditionalGeneration"}


def check_built(name):
    model = built(TRANSFORMERS[name])
    entry = CLASSES.get(name, {})
    to = {target: source for target, (source, _) in roots(expanded(model)).items()}
    assert entry.get("to", {}) == to
    shapes = {key: tensor.shape for key, tensor in model.named_parameters(remove_duplicate=False)}
    same = all(shapes[target] == shapes[source] for target, source in to.items())
    assert same != (name in OTHER_SIZES)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_entry_of_a_class_that_is_built(name, same_version):
    check_built(name)


@pytest.mark.soak
def test_the_entry_of_every_class_that_can_be_built(same_version, share_s):
    """Some classes after another, in any order, for a share of the time: two minutes are enough for all."""
    names = sorted(set(TRANSFORMERS) - load_ties()["left_out"].keys())
    random.shuffle(names)
    ends, wrong = time.monotonic() + max(share_s, 2), []
    for name in names:
        if time.monotonic() > ends:
            break
        try:
            check_built(name)
        except AssertionError as e:
            wrong.append(f"{name}: {e}")
    assert not wrong


def layers(n_layers, *hybrid):
    kinds = ["hybrid" if number in hybrid else "mamba" for number in range(n_layers)]
    return {"num_hidden_layers": n_layers, "layers_block_type": kinds}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Zamba2ForCausalLM", layers(8, 1, 3, 4, 6, 7) | {"num_mem_blocks": 2}),
        ("Zamba2ForCausalLM", layers(8, 2, 5)),
        ("ZambaForCausalLM", layers(9, 2, 4, 7)),
    ],
)
def test_shared_blocks_are_those_of_the_config(name, fields):
    """The table has them for the numbers of the default config."""
    cls = TRANSFORMERS[name]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 32}
    sizes |= {"mamba_d_state": 4, "mamba_expand": 1, "n_mamba_heads": 2, "num_key_value_heads": 4}
    config = cls.config_class(**sizes | fields, tie_word_embeddings=True)
    with torch.device("meta"):
        model = cls(config)
    pairs = {target: source for target, (source, _) in roots(expanded(model)).items() if ".shared" in target}
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)} - pairs.keys()
    written = json.loads(config.to_json_string()) | {"architectures": [name]}
    ties = find_ties(stored, written).ties
    found = {other: tie.holder for tie in ties for other in tie.others if ".shared" in other}
    assert found == pairs and pairs
