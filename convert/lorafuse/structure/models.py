"""What models consist of, by model type: `models.json`, which fixtures/make_structure.py makes from
transformers and explains."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def load_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return table
