"""Weights that were trained beside the adapter, which LLaVA and scripts like it save in files of their own;
PEFT does not know these files. And other weights in the folder, which nothing here reads.
"""

from collections.abc import Mapping, Sequence

from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.folder import Buffer, Folder
from lorafuse.files.kinds import INDEXES, is_training_state, is_weights, matches
from lorafuse.files.stores import Store
from lorafuse.files.tensors import TensorInfo

# Each holds parameters whole, under the names that they have in the model that was trained.
TRAINED_BESIDE = ("non_lora_trainables.bin", "non_lora_state_dict.bin", "mm_projector.bin")


def trained_beside(folder: Folder) -> list[str]:
    """The files of TRAINED_BESIDE in the folder, a link that leads nowhere too."""
    return [name for name in folder.names("*") if name in TRAINED_BESIDE]


def unused_weights(folder: Folder, used: Sequence[str]) -> str | None:
    """What to say of weights in an adapter's folder that are not among the files `used`."""
    others = [
        name
        for name in folder.names("*")
        if name not in used
        and is_weights(name)
        and not matches(name, INDEXES)
        and not is_training_state(name)
    ]
    if not others:
        return None
    verb = "is" if len(others) == 1 else "are"
    return (
        f"{shown(folder)}: {listed(others)} {verb} not read; what training changed there is not in the "
        "result."
    )


class Stores:
    """The tensors of several files as one Store. Raises AdapterError where two have a name in common."""

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self._store_of: dict[str, Store] = {}
        self.tensors: dict[str, TensorInfo] = {}
        file_of: dict[str, str] = {}
        for file, store in stores.items():
            for name, info in store.tensors.items():
                if name in file_of:
                    raise AdapterError(f"{file}: {shown(name)} is also in {file_of[name]}; which is meant?")
                file_of[name], self.tensors[name], self._store_of[name] = file, info, store

    def read_into(self, name: str, start: int, buffer: Buffer) -> None:
        self._store_of[name].read_into(name, start, buffer)

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        self._store_of[name].will_need(name, start, nbytes)
