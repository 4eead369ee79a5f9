"""A small checkpoint and an adapter for it, to which tests add files."""

from pathlib import Path

import pytest
from build import write_adapter, write_checkpoint


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")
