"""docs/json.md has a table for each event and each record in it, with all fields and their kinds, as in
events.py. Runs say what these types say."""

import json
import re
import types
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import build
import pytest
from click.testing import CliRunner

from lorafuse import cli, events

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
WORDS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Any: "any"}
KINDS = (*get_args(events.Event), events.ErrorEvent)
EVENTS = {get_args(get_type_hints(kind)["event"])[0]: kind for kind in KINDS}
RECORDS = {
    name: kind for name, kind in vars(events).items() if is_typeddict(kind) and kind not in EVENTS.values()
}


def in_words(kind: Any) -> str:
    """A type as the page writes it."""
    args = get_args(kind)
    if get_origin(kind) is NotRequired:
        return in_words(args[0])
    if get_origin(kind) is Literal:
        return " or ".join(f"`{word}`" for word in args)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(in_words, args))
    if get_origin(kind) is list:
        return f"list of {in_words(args[0])}"
    if get_origin(kind) is dict:
        return "object" if args[1] is Any else f"object of {in_words(args[1])}"
    return f"[{kind.__name__}](#{kind.__name__.lower()})" if is_typeddict(kind) else WORDS[kind]


def fields_of(kind: type) -> list[tuple[str, str, str]]:
    """(name, kind, whether it is always there) of each field of a TypedDict, but "event"."""
    return [
        (name, in_words(hint), "" if get_origin(hint) is NotRequired else "yes")
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if name != "event"
    ]


def rows_of(title: str) -> list[tuple[str, str, str]]:
    section = re.search(rf"^### {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    assert section, title
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (yes|) ?\| .+ \|$", section[1], re.M)
    assert len(rows) == section[1].count("\n| `"), title
    return rows


@pytest.mark.parametrize("title", [*EVENTS, *RECORDS])
def test_the_page_has_every_field(title):
    assert rows_of(title) == fields_of((EVENTS | RECORDS)[title])


def test_the_page_has_no_other_events():
    titles = re.findall(r"^### (\w+)$", PAGE, re.M)
    assert sorted(titles) == sorted([*EVENTS, *RECORDS])


def checked(event: dict[str, Any]) -> str:
    """The name of an event, whose fields are those of its type."""
    kind = EVENTS[event["event"]]
    assert kind.__required_keys__ <= event.keys() <= kind.__required_keys__ | kind.__optional_keys__, event
    return event["event"]


def test_what_is_printed_is_what_the_page_says(tmp_path):
    ckpt, jobs = build.write_checkpoint(tmp_path / "ckpt"), tmp_path / "jobs"
    adapter = build.write_adapter(jobs / "a")
    wrong = ["convert", ckpt, tmp_path / "nowhere", tmp_path / "other", "--json"]
    ran = CliRunner().invoke(cli.lorafuse, list(map(str, wrong)))
    assert (checked(json.loads(ran.stdout)), ran.exit_code) == ("error", 4)
    calls = [
        (["convert", ckpt, adapter, tmp_path / "out", "--dry-run"], ["plan"]),
        (["convert", ckpt, adapter, tmp_path / "out"], ["plan", "shard", "done"]),
        (["batch", ckpt, jobs, tmp_path / "root"], ["plan", "pass", "shard", "job", "total"]),
    ]
    for words, expected in calls:
        ran = CliRunner().invoke(cli.lorafuse, [*map(str, words), "--json"])
        assert ran.exit_code == 0, ran.output
        assert [checked(json.loads(line)) for line in ran.stdout.splitlines()] == expected
