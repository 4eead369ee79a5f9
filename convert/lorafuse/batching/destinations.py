"""Where the results of a batch go on the hub, beside OUT_ROOT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafuse.batching.publication import Publication, publication_of
from lorafuse.errors import shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.hub_folder import HUB_NBYTES
from lorafuse.files.hub_upload import is_published
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.receipt.read import read_receipt
from lorafuse.settings import Push

UPLOAD_NBYTES = 2_000_000  # of a file on its way


@dataclass(frozen=True)
class Destinations:
    """Where the results go that are made of the base that the user called `ckpt`."""

    ckpt: str
    pushes: Mapping[str, Push]

    @property
    def held_nbytes(self) -> int:
        """By the hub's library."""
        return HUB_NBYTES if self.pushes else 0

    def of(self, name: str, base: Checkpoint, adapters: Sequence[WeightedAdapter]) -> Publication | None:
        """What is published of a job's result; it stays on this machine, too."""
        push = self.pushes.get(name)
        return publication_of(push, self.ckpt, base, adapters, stream=False) if push else None

    def lacks(self, name: str, out_dir: Folder) -> str | None:
        """What to say of a result that is complete here, where the hub does not hold it. Raises
        StorageError."""
        push, receipt = self.pushes.get(name), read_receipt(out_dir)
        if push is None or receipt is None:
            return None
        weights = {
            output["file"]: output["sha256"]
            for output in receipt["outputs"]
            if output["file"].endswith(".safetensors") and "/" not in output["file"]
        }
        if is_published(push, weights):
            return None
        return (
            f"{shown(out_dir)}: is complete here, but {push.repo} on the hub does not hold it; --overwrite "
            "makes it again, and pushes it."
        )
