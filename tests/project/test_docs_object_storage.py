"""docs/object-storage.md: its commands run against an S3 server on this machine; what it says that is
printed, and how much is held, is so."""

import json
import re
import shlex
from pathlib import Path

import build
import pytest
from click.testing import CliRunner

from lorafuse import cli
from lorafuse.files.cloud_client import ALL_WAITS_S
from lorafuse.files.cloud_folder import CloudFolder
from lorafuse.files.cloud_store import LARGEST_COPY_NBYTES, CloudPlace
from lorafuse.files.cloud_url import SCHEMES
from lorafuse.outdir import cloud
from lorafuse.outdir.cloud_lock import LEASE_S, RENEW_S

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "object-storage.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def test_commands(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run, one after the other."""
    monkeypatch.chdir(tmp_path)
    s3.upload(build.write_checkpoint(tmp_path / "base", n_shards=2), "models")
    s3.upload(build.write_adapter(tmp_path / "tuned"), "models")
    build.write_adapter(tmp_path / "jobs/a")
    s3.upload(tmp_path / "jobs", "models")
    build.write_checkpoint(tmp_path / "base-nf4")
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "lorafuse"
        ran = CliRunner().invoke(cli.lorafuse, arguments)
        assert ran.exit_code == 0, f"{command}: {ran.output}"


def test_what_is_said() -> None:
    """The words of the last table are in the source; numbers and schemes are those of the source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "convert").rglob("cloud*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.partition("## What may go wrong")[2], re.M)
    assert len(rows) == 8
    for words in re.findall(r"`(.*?)`", " ".join(rows)):
        assert words in said, words
    assert f"every {RENEW_S} seconds" in PAGE and f"after {LEASE_S} seconds" in PAGE
    assert f"up to {ALL_WAITS_S} seconds" in PAGE and f"{LARGEST_COPY_NBYTES >> 30} GiB" in PAGE
    assert {*re.findall(r"`(\w+)://", PAGE)} - {"file"} <= {*SCHEMES}
    held = cloud.held_nbytes([5 * 10**9], CloudFolder(CloudPlace(None, "s3://x")))
    assert f"{CloudFolder.held_nbytes / 1e6:.0f} MB of it" in PAGE and f"{held / 1e6:.0f} MB parts" in PAGE


def test_the_rule_is_json() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    assert json.loads(block)["Rules"][0]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] > 0
