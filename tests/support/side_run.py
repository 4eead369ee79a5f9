"""Files beside weights, and a merge with what it says of them."""

import json
from pathlib import Path
from typing import Any

import lorafuse

MADE = {"config.json", "model.safetensors", "lorafuse_receipt.json"}


def fill(folder: Path, files: dict[str, Any]) -> None:
    """Text as it is, everything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def beside(out: Path) -> set[str]:
    """The files of a result but those that every result has."""
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - MADE


class Run:
    """A merge with what it said."""

    def __init__(self, ckpt: Path, lora: Path, out: Path, **options: Any) -> None:
        events: list[dict[str, Any]] = []
        lorafuse.convert(ckpt, lora, out, on_event=events.append, **options)
        self.warnings = [event["message"] for event in events if event["event"] == "warning"]
        [self.plan] = [event["side_files"] for event in events if event["event"] == "plan"]
        self.files = beside(out)
