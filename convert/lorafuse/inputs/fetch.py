"""The weights of a checkpoint on the hub, fetched once it is known that they are needed."""

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.hub_folder import HubFolder


def fetch_shards(base: Checkpoint) -> None:
    """Fetch what is not on this machine into the hub's cache, one file after the other. Raises
    CheckpointError, StorageError."""
    if not isinstance(base.folder, HubFolder):
        return
    for shard in base.shards:
        if not base.folder.is_here(shard.name):
            base.folder.fetch(shard.name)
        shard.close()  # it was read from afar
