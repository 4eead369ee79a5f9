"""Regular expressions out of configs, matched in bounded time.

`re` goes back and tries again, so that an expression such as `(a+)+b` takes centuries for a name of fifty
letters. Expressions with few choices are left to `re`; for the others all ways are followed at once, which
takes steps in the number of characters times the size of the expression. Whether an expression matches is
the same; which groups it catches is not asked.
"""

import math
import re
import re._constants as sre  # type: ignore[import-not-found]  # no stubs
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_STATES = 20_000
_LENGTH, _MAX_STEPS = 300, 1e6
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
_ONCE = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)

Test = Callable[[str], bool]  # of one character


class Pattern:
    """An expression that is matched from the start of a text, as `re.match` does. Raises re.error where it is
    none, or has what is not supported: references to groups, possessive repetitions, flags."""

    def __init__(self, expression: str) -> None:
        try:
            tree = parser.parse(expression)
        except (OverflowError, RecursionError) as e:
            raise re.error(f"{type(e).__name__}: it is too large") from None
        if steps_of_re(tree) <= _MAX_STEPS:
            self.matches: Callable[[str], bool] = _by_re(re.compile(expression))
            return
        if tree.state.flags & ~(re.UNICODE | re.VERBOSE):
            raise re.error("flags are not supported in an expression with so many choices")
        self.matches = _States(tree).matches


def _by_re(compiled: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: compiled.match(text) is not None


def steps_of_re(tree: Iterable[tuple[Any, Any]]) -> float:
    """A bound of the steps that `re` takes for a text of _LENGTH characters; infinite where what is repeated
    has choices of its own."""
    steps = 1.0
    for op, argument in tree:
        inner = math.prod(steps_of_re(part) for part in _parts(op, argument))
        if op in _REPEATS:
            least, most = argument[:2]
            if inner > 1 and most > 1:
                return math.inf
            steps *= inner * (1 if least == most else min(most - least + 1, _LENGTH))
        elif op is sre.BRANCH:
            steps *= inner * len(argument[1])
        else:
            steps *= inner
    return steps


def _parts(op: Any, argument: Any) -> Iterator[Any]:
    """The trees inside a node."""
    if op in _REPEATS:
        yield argument[2]
    elif op is sre.BRANCH:
        yield from argument[1]
    elif op is sre.SUBPATTERN:
        yield argument[3]
    elif op in (sre.ASSERT, sre.ASSERT_NOT):
        yield argument[1]
    elif op is sre.ATOMIC_GROUP:
        yield argument
    elif op is sre.GROUPREF_EXISTS:
        yield from (part for part in argument[1:] if part is not None)


class _States:
    """The states of an expression: a test of a character and the next state, or conditions and next states
    that are reached at once. State 0 is the end."""

    def __init__(self, tree: Any) -> None:
        self._tests: list[tuple[Test, int] | None] = [None]
        self._jumps: list[list[tuple[Callable[[str, int], bool] | None, int]]] = [[]]
        self._start = self._sequence(tree, 0)

    def matches(self, text: str) -> bool:
        return any(end >= 0 for end in self._ends(text, 0))

    def _ends(self, text: str, at: int) -> Iterator[int]:
        """Where matches from `at` on end."""
        current = self._closure([self._start], text, at)
        while current:
            if 0 in current:
                yield at
            if at == len(text):
                return
            follow = [
                test[1] for state in current if (test := self._tests[state]) is not None and test[0](text[at])
            ]
            at += 1
            current = self._closure(follow, text, at)

    def _closure(self, states: list[int], text: str, at: int) -> set[int]:
        reached, left = set(states), list(states)
        while left:
            for condition, target in self._jumps[left.pop()]:
                if target not in reached and (condition is None or condition(text, at)):
                    reached.add(target)
                    left.append(target)
        return reached

    def _new(self, test: tuple[Test, int] | None = None) -> int:
        if len(self._tests) >= MAX_STATES:
            raise re.error("it is too large")
        self._tests.append(test)
        self._jumps.append([])
        return len(self._tests) - 1

    def _sequence(self, tree: Any, end: int) -> int:
        """The state from which the tree leads to `end`."""
        for op, argument in reversed(list(tree)):
            end = self._node(op, argument, end)
        return end

    def _node(self, op: Any, argument: Any, end: int) -> int:
        if op in _ONCE:
            return self._new((_test(op, argument), end))
        if op is sre.SUBPATTERN and not argument[1] and not argument[2]:
            return self._sequence(argument[3], end)
        state = self._new()
        if op is sre.BRANCH:
            self._jumps[state] = [(None, self._sequence(branch, end)) for branch in argument[1]]
        elif op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            self._jumps[state] = [(None, self._repeat(argument, end))]
        elif op is sre.AT:
            self._jumps[state] = [(_place(argument), end)]
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            self._jumps[state] = [(_look(op, *argument), end)]
        else:
            raise re.error(f"{str(op).lower()} is not supported")
        return state

    def _repeat(self, argument: tuple[int, Any, Any], end: int) -> int:
        least, most, tree = argument
        if most is sre.MAXREPEAT:
            loop = self._new()
            self._jumps[loop] = [(None, self._sequence(tree, loop)), (None, end)]
            end = loop
        else:
            for _ in range(most - least):
                skip = self._new()
                self._jumps[skip] = [(None, self._sequence(tree, end)), (None, end)]
                end = skip
        for _ in range(least):
            end = self._sequence(tree, end)
        return end


_CATEGORIES: dict[Any, Test] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


def _test(op: Any, argument: Any) -> Test:
    if op is sre.ANY:
        return lambda c: c != "\n"
    if op is sre.LITERAL:
        return lambda c: ord(c) == argument
    if op is sre.NOT_LITERAL:
        return lambda c: ord(c) != argument
    negated = bool(argument) and argument[0][0] is sre.NEGATE
    members = [_member(*item) for item in argument if item[0] is not sre.NEGATE]
    return lambda c: any(member(c) for member in members) != negated


def _member(op: Any, argument: Any) -> Test:
    if op is sre.RANGE:
        return lambda c: argument[0] <= ord(c) <= argument[1]
    return _CATEGORIES[argument] if op is sre.CATEGORY else _test(op, argument)


def _place(where: Any) -> Callable[[str, int], bool]:
    """Whether a position is the start, the end, or a boundary of words."""
    if where in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return lambda text, at: at == 0
    if where is sre.AT_END_STRING:
        return lambda text, at: at == len(text)
    if where is sre.AT_END:
        return lambda text, at: text[at:] in ("", "\n")
    if where in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
        is_word = _CATEGORIES[sre.CATEGORY_WORD]

        def changes(text: str, at: int) -> bool:
            before, after = (
                bool(c) and is_word(c) for c in (text[at - 1 : at] if at else "", text[at : at + 1])
            )
            return before != after

        return changes if where is sre.AT_BOUNDARY else lambda text, at: not changes(text, at)
    raise re.error(f"{str(where).lower()} is not supported")


def _look(op: Any, direction: int, tree: Any) -> Callable[[str, int], bool]:
    """Whether a tree matches ahead of a position, or behind it; or does not."""
    inner, wanted = _States(tree), op is sre.ASSERT

    def ahead(text: str, at: int) -> bool:
        return any(True for _ in inner._ends(text, at)) == wanted

    def behind(text: str, at: int) -> bool:
        return any(at in inner._ends(text[:at], start) for start in range(at + 1)) == wanted

    return ahead if direction > 0 else behind
