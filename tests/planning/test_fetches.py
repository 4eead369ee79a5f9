"""Which files of a base are fetched and dropped when, against a simulation of a disk."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorafuse.planning.fetches import MOST_TRAFFIC, Drop, Fetch, Fetches, all_kept, few_kept

FILES = "abcdef"
needs = st.lists(st.sets(st.sampled_from(FILES), max_size=3), max_size=30)
SIZES = dict.fromkeys(FILES, 1)


def held_while_made(fetches: Fetches, weights: list[set[str]]) -> int:
    """Carries the plan out as late as it may be, and says how many files were held at most. Each weight has
    its files while it is made, and no file is dropped before its weight."""
    actions, held, most = list(fetches.actions), set[str](), 0

    def next_action() -> None:
        nonlocal most
        action = actions.pop(0)
        if isinstance(action, Fetch):
            assert action.file not in held
            held.add(action.file)
        else:
            held.remove(action.file)
        most = max(most, len(held))

    for number, files in enumerate(weights):
        while any(isinstance(action, Fetch) and action.weight <= number for action in actions):
            assert not isinstance(actions[0], Drop) or actions[0].weight < number
            next_action()
        assert files <= held
    while actions:
        next_action()
    return most


@settings(max_examples=300, deadline=None)
@given(needs)
@example([{"c"}, {"a"}, {"b"}, {"c"}])
@example([set("abc"), set(), set("def")])
def test_few_kept(weights: list[set[str]]) -> None:
    """A weight finds its files; as few as possible are held; none is left, and traffic has a bound."""
    fetches = few_kept(weights, SIZES)
    most = held_while_made(fetches, weights)
    assert fetches.held_nbytes == most
    n_files = len(set().union(*weights))
    assert n_files <= fetches.nbytes <= MOST_TRAFFIC * n_files
    assert sum(isinstance(action, Drop) for action in fetches.actions) == fetches.nbytes
    if most > max([2, *map(len, weights)]):
        assert few_kept(weights, SIZES, most - 1) == fetches  # fewer would be fetched too often


@given(needs)
def test_all_kept(weights: list[set[str]]) -> None:
    """Every file once, and none is dropped."""
    fetches = all_kept(weights, SIZES)
    assert held_while_made(fetches, weights) == fetches.nbytes == len(set().union(*weights))


def test_the_usual_order() -> None:
    """The head in the last file, then the layers, whose weights lie across the borders of files: two files
    are held, the next one comes as soon as one goes, and the last is fetched twice."""
    weights = [{"d"}, {"a"}, {"a"}, {"a", "b"}, {"b"}, {"b"}, {"c"}, {"b"}, {"c"}, {"d"}, {"d"}]
    assert few_kept(weights, SIZES) == Fetches(
        (
            *(Fetch("d", 0), Fetch("a", 1), Drop("d", 0), Fetch("b", 3), Drop("a", 3), Fetch("c", 6)),
            *(Drop("b", 7), Fetch("d", 9), Drop("c", 8), Drop("d", 10)),
        ),
        held_nbytes=2,
        nbytes=5,
    )


def test_thrashing() -> None:
    """Where every weight is in another file than the one before, more are held."""
    weights = [{file} for _ in range(50) for file in "abc"]
    assert few_kept(weights, SIZES).held_nbytes == 3
    sizes = {"a": 5, "b": 7, "c": 1}
    assert few_kept(weights, sizes) == few_kept(weights, sizes, most=3)
    assert few_kept(weights, sizes).nbytes == 13
