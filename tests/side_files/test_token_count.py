"""Tokens are counted in the files, as a reading of the whole JSON would."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.files.local_folder import LocalFolder
from lorafuse.side_files.token_count import _ids_in, n_tokens

texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ['"', "\\", '\\"', "]", "}", ":", "id", "vocab"]
)
numbers = st.integers(0, 10**6)


@st.composite
def tokenizers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A tokenizer.json with any strings, in any order, and its number of tokens."""
    added = draw(
        st.lists(
            st.fixed_dictionaries({"content": texts, "id": numbers, "special": st.booleans()}), max_size=4
        )
    )
    vocab: Any = draw(
        st.dictionaries(texts, numbers, max_size=6) | st.lists(st.tuples(texts, st.floats(-9, 0)), max_size=6)
    )
    ids = [entry["id"] for entry in added] + (
        [*vocab.values()] if isinstance(vocab, dict) else [len(vocab) - 1]
    )
    model = [
        ("type", "x"),
        ("vocab", vocab),
        ("merges", draw(st.lists(st.lists(texts, min_size=2, max_size=2), max_size=3))),
    ]
    parts = [
        ("truncation", {"id": 10**7, "max_length": 10**7, "vocab": {"x": 10**7}}),
        ("added_tokens", added),
        ("model", dict(draw(st.permutations(model)))),
        ("post_processor", {"added_tokens": [{"id": 10**7}]}),
    ]
    return dict(draw(st.permutations(parts))), max(ids, default=-1) + 1


@settings(max_examples=100, deadline=None)
@given(tokenizers(), st.booleans(), st.sampled_from([None, 1, 4]))
def test_any_tokenizer_json(made: tuple[dict[str, Any], int], ascii_only: bool, indent: int | None) -> None:
    content, expected = made
    data = json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    assert max(_ids_in(data), default=-1) + 1 == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | tokenizers().map(lambda made: json.dumps(made[0]).encode()[:-7]))
def test_damaged_files_are_not_refused_here(data: bytes) -> None:
    list(_ids_in(data))


def pieces(n: int) -> bytes:
    """A sentencepiece model of n pieces: field 1 each, then the trainer's spec as field 2."""
    return b"".join(b"\x0a\x86\x01" + bytes(134) for _ in range(n)) + b"\x12\x02\x08\x01"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"vocab.json": b'{"a": 0, "b": 7}', "merges.txt": b"a b"}, 8),
        ({"vocab.txt": b"a\nb\nc\n"}, 3),
        ({"qwen.tiktoken": b"YQ== 0\nYg== 1\n"}, 2),
        ({"tokenizer.model": pieces(5)}, 5),
        ({"tokenizer.model": pieces(5), "added_tokens.json": b'{"<x>": 9}'}, 10),
        ({"vocab.txt": b"a", "tokenizer_config.json": b'{"added_tokens_decoder": {"3": {}, "2": {}}}'}, 4),
        ({"tokenizer.json": b"no JSON", "tokenizer_config.json": b"neither"}, None),
        ({"vocab.json": b'{"eng": {"a": 5}}'}, None),
        ({"tokenizer.model": b"\x0a\xff"}, None),
        ({}, None),
    ],
)
def test_other_files(files: dict[str, bytes], expected: int | None, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert n_tokens(LocalFolder(tmp_path)) == expected
