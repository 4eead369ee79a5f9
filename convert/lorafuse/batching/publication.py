"""What is published of a result: a model card, and all of it in a repository on the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafuse._version import __version__
from lorafuse.errors import UsageError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folders import open_folder
from lorafuse.files.hub import hub_name
from lorafuse.files.hub_upload import Upload
from lorafuse.files.names import RECEIPT, scheme_of
from lorafuse.outdir.out_dir import OutDir
from lorafuse.outdir.pushed import PushedOutDir
from lorafuse.outdir.sidecars import json_bytes, output_config
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.plan import Plan
from lorafuse.receipt.card import CARD, model_card
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.portable import InputName, published
from lorafuse.settings import Push


@dataclass(frozen=True)
class Publication:
    """`upload`: where to, if anywhere. `base_id`: the repository of the base, if that is known. `keeps`:
    whether the result stays on this machine too."""

    base: InputName
    base_id: str | None
    adapters: Sequence[InputName]
    upload: Upload | None = None
    keeps: bool = True

    def out_dir(self, inner: OutDir, plan: Plan) -> OutDir:
        """Where the result is made."""
        if self.upload is None:
            return inner
        adapters = ", ".join(source.published for source in self.adapters)
        message = f"Merge of {adapters} into {self.base.published} by lorafuse {__version__}"
        return PushedOutDir(inner, self.upload, plan, message, keeps=self.keeps)

    def add(self, out_dir: OutDir, receipt: Receipt, config: Mapping[str, Any], plan: Plan) -> None:
        """Add the card to a result that is complete, and say what its receipt is on the hub."""
        public: Any = published(receipt, [self.base, *self.adapters])
        if self.upload:
            self.upload.instead[RECEIPT] = json_bytes(public)
        made = output_config(dict(config), plan.config_changes, plan.stored_config)
        push = self.upload.push if self.upload else None
        card = model_card(public, self.base, self.base_id, self.adapters, made, push)
        out_dir.put(CARD, [card.encode()])


def refuse_push_of_store(out: str) -> None:
    """Raises UsageError where results go into an object store: the hub's library sends files of this
    machine."""
    if scheme_of(out):
        raise UsageError(
            f"{shown(out)}: --push-to-hub sends files of this machine, not objects of a store. Give a "
            "directory instead; or leave --push-to-hub out, copy the result here when it is complete, and "
            "send it with `hf upload`."
        )


def publication_of(
    push: Push | None, ckpt: str, base: Checkpoint, adapters: Sequence[WeightedAdapter], *, stream: bool
) -> Publication:
    """Of a base that the user called `ckpt`. What is pushed while the base is streamed does not stay here."""
    source = InputName(ckpt, base.folder)
    named = adapters[0].adapter.base_name or ""
    known = None if open_folder(named or ".").is_there() else hub_name(named)
    return Publication(
        source,
        source.repo or (known.repo if known else None),
        [InputName(found.adapter.name, found.adapter.folder, found.weight) for found in adapters],
        Upload(push) if push else None,
        keeps=not (push and stream),
    )
