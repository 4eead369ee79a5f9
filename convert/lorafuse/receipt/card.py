"""The model card of a result: what was merged into what and how, how much of it was kept, and how to load,
make and verify it; a card of the adapter stays below it."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lorafuse._version import __version__
from lorafuse.errors import shown
from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_text
from lorafuse.files.safetensors_file import FormatError
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.portable import InputName
from lorafuse.receipt.read import kept_in_sum
from lorafuse.settings import Push

CARD = "README.md"
# What a card says of an adapter that is not true of a whole model.
OF_ADAPTERS = ("adapter", "lora", "qlora", "peft", "adapter-transformers", "transformers")
CARRIED = ("language", "pipeline_tag", "datasets", "metrics")
USUAL: dict[str, Any] = {
    "dtype": "auto",
    "format": "dense",
    "max_shard_size": 5 * 10**9,
    "adapter_scale": 1.0,
    "rounding": None,
}
LICENSE = ("license", "license_name", "license_link")


class Said(NamedTuple):
    """A card that is there: its metadata, and its text."""

    data: dict[str, Any]
    text: str


def model_card(
    receipt: Receipt,
    base: InputName,
    base_id: str | None,
    adapters: Sequence[InputName],
    config: Mapping[str, Any],
    push: Push | None,
) -> str:
    """The card of a result whose config.json is `config`. `base_id`: the repository of the base, if that is
    known; `push`: where on the hub the result goes."""
    from huggingface_hub import ModelCard, ModelCardData

    base_said, *said = [_said(source.folder) for source in (base, *adapters)]
    data = ModelCardData(**_metadata(base_said, said, base_id, adapters))
    text = "\n".join(_text(receipt, base, adapters, config, push))
    for source, card in zip(adapters, said, strict=True):
        if card.text.strip():
            text += f"\n## The card of the adapter {_code(source.published)}\n\n{card.text.strip()}\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=True))


def _said(folder: Folder) -> Said:
    """The card in a folder; empty where there is none that can be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        if folder.exists(CARD):
            card = ModelCard(read_text(folder, CARD), ignore_metadata_errors=True)
            return Said(dict(card.data.to_dict()), card.text)  # type: ignore[no-untyped-call]
    except (ValueError, OSError, FormatError, TypeError, YAMLError):
        pass
    return Said({}, "")


def _metadata(
    base: Said, adapters: Sequence[Said], base_id: str | None, sources: Sequence[InputName]
) -> dict[str, Any]:
    everything = [base.data, *(card.data for card in adapters)]
    repos = [source.repo for source in sources if source.repo]
    models = list(dict.fromkeys(filter(None, [base_id, *repos])))
    found: dict[str, Any] = {"base_model": models} if models else {}
    if models:
        found["base_model_relation"] = "merge" if repos else "finetune"
    found["library_name"] = base.data.get("library_name") or "transformers"
    licensed = next((data for data in everything if data.get("license")), {})
    found |= {name: licensed[name] for name in LICENSE if licensed.get(name)}
    for name in CARRIED:
        found |= next(({name: data[name]} for data in reversed(everything) if data.get(name)), {})
    tags = [tag for data in everything for tag in _list(data.get("tags")) if not _of_adapter(tag)]
    return found | {"tags": list(dict.fromkeys([*tags, "lorafuse"]))}


def _list(value: Any) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _of_adapter(tag: str) -> bool:
    return tag.lower() in OF_ADAPTERS or tag.startswith("base_model:")


def _text(
    receipt: Receipt,
    base: InputName,
    adapters: Sequence[InputName],
    config: Mapping[str, Any],
    push: Push | None,
) -> Iterator[str]:
    merged = " and ".join(_code(source.published) for source in adapters)
    yield f"# {shown(push.repo.rpartition('/')[2]) if push else 'Merged model'}\n"
    yield f"{_code(base.published)} with {merged} merged into its weights by lorafuse {__version__}.\n"
    yield "| | |\n|---|---|"
    yield from (f"| {label} | {value} |" for label, value in _table(receipt, base, adapters))
    yield "\n## Load\n\n```python"
    yield from _loading(config, push)
    inputs = [shlex.quote(source.published) for source in (base, *adapters)]
    yield "```\n\n## Reproduce and verify\n\n```"
    yield shlex.join(
        [
            "lorafuse",
            "convert",
            base.published,
            adapters[0].published,
            "OUT_DIR",
            *_options(receipt, adapters),
        ]
    )
    result = (
        shlex.quote(f"{push.repo}@{push.revision}" if push.revision else push.repo) if push else "OUT_DIR"
    )
    yield f"lorafuse verify {result} --ckpt {inputs[0]}" + "".join(
        f" --adapter {name}" for name in inputs[1:]
    )
    yield "```\n\nThe hashes of all inputs and outputs are in `lorafuse_receipt.json`.\n"


def _table(receipt: Receipt, base: InputName, adapters: Sequence[InputName]) -> Iterator[tuple[str, str]]:
    tensors = receipt["tensors"]
    update = kept_in_sum(tensors, receipt["settings"])
    n_changed = sum(entry["action"] in ("merged", "replaced", "added") for entry in tensors.values())
    yield "base", _code(base.published)
    for source in adapters:
        weight = f", times {source.weight:g}" if source.weight != 1 else ""
        yield "adapter", _code(source.published) + weight
    yield "base in training", _cell(receipt["base_semantics"])
    yield "format", _cell(receipt["settings"].get("format", "dense"))
    yield "changed weights", f"{n_changed} of {len(tensors)}"
    if update["kept"] is not None:
        least = f"{update['least']:.4%} in {_code(update['least_in'])}"
        yield "of the update kept", f"{update['kept']:.4%}, at least {least}"
    if update["noise"] is not None:
        yield "noise by rounding", f"{update['noise']:.2g} times the size of the update"


def _loading(config: Mapping[str, Any], push: Push | None) -> Iterator[str]:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    auto = "AutoModelForCausalLM" if str(first).endswith(("CausalLM", "LMHeadModel")) else "AutoModel"
    more = ", trust_remote_code=True" if config.get("auto_map") else ""
    where = json.dumps(push.repo if push else "OUT_DIR")
    if push and push.revision:
        where += f", revision={json.dumps(push.revision)}"
    yield f"from transformers import {auto}, AutoTokenizer\n"
    yield f'model = {auto}.from_pretrained({where}, dtype="auto"{more})'
    yield f"tokenizer = AutoTokenizer.from_pretrained({where}{more})"


def _options(receipt: Receipt, adapters: Sequence[InputName]) -> Iterator[str]:
    """The options of the command line that the bytes depend on, where they are not the default."""
    settings: Mapping[str, Any] = receipt["settings"]
    for source in adapters[1:]:
        yield from ("--adapter", f"{source.published}:{source.weight:g}")
    for name, default in USUAL.items():
        if settings.get(name, default) != default:
            yield from (f"--{name.replace('_', '-')}", str(settings[name]))
    for pattern in settings.get("keep_dense", ()):
        yield from ("--keep-dense", pattern)
    quant = settings.get("base_quant") or settings.get("quantization") or {}
    if settings.get("base_quant"):
        yield from ("--base-quant", str(quant["kind"]))
    if not quant.get("double_quant", True):
        yield "--no-double-quant"
    if quant.get("blocksize", 64) != 64:
        yield from ("--quant-blocksize", str(quant["blocksize"]))
    for name in quant.get("skip") or ():
        yield from ("--quant-skip", name)
    if quant.get("experts"):
        yield "--quant-experts"


def _code(text: object) -> str:
    return f"`{_cell(text).replace('`', chr(39))}`"


def _cell(text: object) -> str:
    """Text in a table: one line, and no end of a cell in it."""
    return shown(text).replace("|", "\\|")
