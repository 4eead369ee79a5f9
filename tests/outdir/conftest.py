"""A store of the memory, for what is tested with faults at any of its calls."""

import obstore
import pytest
from disturbed_store import DisturbedStore, DisturbedWriter

from lorafuse.files import cloud_client
from lorafuse.outdir import cloud_lock


@pytest.fixture
def store(monkeypatch):
    """What memory:// is. A killed run is gone, although its process is this one."""
    store = DisturbedStore()
    monkeypatch.setattr(cloud_client, "opened", lambda url: store)
    monkeypatch.setattr(obstore, "open_writer", DisturbedWriter)
    monkeypatch.setattr(cloud_lock, "_is_gone", lambda lock: True)
    return store
