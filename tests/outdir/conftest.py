"""What the tests of interrupted runs begin with."""

import pytest
from scenario import five_shards, uninterrupted


@pytest.fixture
def inputs(tmp_path):
    return five_shards(tmp_path)


@pytest.fixture
def clean(inputs, tmp_path):
    return uninterrupted(inputs, tmp_path / "clean")
