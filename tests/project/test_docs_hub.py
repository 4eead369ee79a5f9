"""docs/hub.md: its commands run against a hub on this machine, and what it says that is printed is."""

import re
import shlex
from pathlib import Path

import build
from click.testing import CliRunner
from hub_server import HubServer

from lorafuse import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def test_commands(hub: HubServer, tmp_path: Path) -> None:
    """They run, one after the other, in one directory."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt", n_shards=3))
    hub.add("me/tuned", build.write_adapter(tmp_path / "lora", base_model_name_or_path="org/base"))
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "lorafuse"
        ran = CliRunner().invoke(cli.lorafuse, arguments)
        assert ran.exit_code == 0, f"{command}: {ran.output}"
    made = {path.name for path in Path().iterdir()}
    assert made == {"merged", *(f"merged-{n}" for n in (2, 3, 4, 5, 7))}  # the sixth is on the hub alone


def test_what_is_printed() -> None:
    """The words of the last table are in the source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "convert").rglob("hub*.py"))
    source += (ROOT / "convert/lorafuse/files/hashing.py").read_text(encoding="utf-8")
    said = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| `(.*?)` \|", PAGE.partition("## What may go wrong")[2], re.M)
    assert len(rows) == 7
    fixed = {
        "HF_HUB_OFFLINE is set": "{variable} is set",
        "the hub answered 503, 5 times": "the hub answered {passing}, ",
    }
    for row in rows:
        assert fixed.get(row, row) in said, row
