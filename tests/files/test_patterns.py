"""Expressions match what `re` matches, and in bounded time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.files import patterns
from lorafuse.files.patterns import Pattern

_ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c.]", "^", "$", r"\b", "", r"\Z"]
)
_EXPRESSIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(_EXPRESSIONS, st.text("ab.1c\n", max_size=8))
def test_it_matches_what_re_matches(expression, text):
    """All ways at once, whatever the number of repetitions."""
    tree = patterns.parser.parse(expression)
    assert patterns._States(tree).matches(text) == (re.match(expression, text) is not None)
    assert Pattern(expression).matches(text) == (re.match(expression, text) is not None)


@pytest.mark.parametrize("expression", ["(?:a|b.)*x(?:(?<=x)|(?=y|$))", "(?<!b)a+b+", r"(?:x+)+(?<=\.xx)"])
@pytest.mark.parametrize("text", ["abx", "abxy", "x.xx", "aab", "b.xx", ""])
def test_looking_behind(expression, text):
    tree = patterns.parser.parse(expression)
    assert patterns._States(tree).matches(text) == (re.match(expression, text) is not None)


@pytest.mark.parametrize(
    "expression",
    ["(.*)*(.*)*(.*)*(.*)*(.*)*z", "([a-z_.0-9]+)*X", "(a|a)*b", "(a+)+$b", "(?=(a+)+b)a", "(a?){40}a{40}b"],
)
def test_evil_expressions_end(expression):
    """`re` would take years for the text."""
    text = "model.layers.11.self_attn.q_proj" * 6
    start = time.perf_counter()
    assert not Pattern(expression).matches(text) and not Pattern(expression).matches("a" * 200)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "expression", ["(", "a**", "[b-a]", r"(a*)*\1", "(?>a*)*b*", "((a?){500}){500}", "(?i)(a*)*b*"]
)
def test_what_is_none_or_not_supported(expression):
    with pytest.raises(re.error):
        Pattern(expression)
