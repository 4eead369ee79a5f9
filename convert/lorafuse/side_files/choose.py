"""The side files of a result: what is copied from which folder, what is made, and what to say of it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lorafuse.errors import shown
from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.kinds import CARDS, HIDDEN, is_training_state, is_weights, matches
from lorafuse.files.safetensors_file import FormatError
from lorafuse.side_files.chat_template import has_template, inline_template, same_template, template_files
from lorafuse.side_files.checked import MAX_NBYTES, check_side_file, refuse_large
from lorafuse.side_files.modules import files_below, module_folders
from lorafuse.side_files.remote_code import WITH_AUTO_MAP, named_code, with_imports
from lorafuse.side_files.sets import (
    FOLDERS,
    GENERATION,
    LIKE_WEIGHTS,
    NEVER,
    PROCESSOR,
    SENTENCE_TRANSFORMERS,
    SETS,
    TEMPLATES,
    TOKENIZER,
    FileSet,
    belongs,
    named,
)
from lorafuse.side_files.token_count import n_tokens


class SideFiles(NamedTuple):
    """`copied`: (folder, name in it) of each file that is copied under its name. `made`: (name, contents) of
    the others. `tokenizer` and `chat_template` say which folder they come from, if any has them."""

    copied: tuple[tuple[Folder, str], ...] = ()
    made: tuple[tuple[str, bytes], ...] = ()
    tokenizer: str | None = None
    chat_template: str | None = None
    warnings: tuple[str, ...] = ()


class Embedding(NamedTuple):
    """The input embedding of the result."""

    name: str
    n_rows: int


def choose_side_files(
    ckpt: Folder,
    config: dict[str, Any],
    adapter_folders: Iterable[Folder],
    embedding: Embedding | None,
    *,
    new_head: bool,
) -> SideFiles:
    """Decide it. `adapter_folders` are where the adapter's files may be, the first first. Raises
    CheckpointError for a file that is a git-LFS pointer, or a link that leads nowhere or out of its folder;
    StorageError."""
    warnings: list[str] = []
    folders: list[Folder] = []
    for folder in adapter_folders:
        if not any(_same(folder, other) for other in (ckpt, *folders)):
            folders.append(folder)
    check_side_file(ckpt, "config.json")
    tokenizer = _tokenizer_folder(ckpt, folders, embedding, warnings)
    template = _template_folder(ckpt, tokenizer, folders, warnings)
    chosen = {
        TOKENIZER: tokenizer or ckpt,
        PROCESSOR: _first_with(PROCESSOR, folders) or ckpt,
        SENTENCE_TRANSFORMERS: _first_with(SENTENCE_TRANSFORMERS, folders) or ckpt,
    }
    files = dict.fromkeys(_of_checkpoint(ckpt, config, new_head=new_head), ckpt)
    for file_set, folder in chosen.items():
        if folder is not ckpt:
            files = {name: holder for name, holder in files.items() if not belongs(name, file_set.names)}
            files |= dict.fromkeys(named(folder, file_set.names), folder)
    made: dict[str, bytes] = {}
    if template is not None and template is not chosen[TOKENIZER]:
        files = {name: holder for name, holder in files.items() if not belongs(name, TEMPLATES)}
        files |= dict.fromkeys(template_files(template), template)
        made = {} if template_files(template) else inline_template(template)
    files |= _module_files(chosen[SENTENCE_TRANSFORMERS], ckpt)
    files |= _code(files, config, ckpt)
    copied = tuple(_checked(files, ckpt, warnings))
    return SideFiles(
        copied,
        tuple(made.items()),
        _label(tokenizer or (ckpt if _has(ckpt, TOKENIZER) else None)),
        _label(template),
        tuple(warnings),
    )


def _same(first: Folder, second: Folder) -> bool:
    return first / "config.json" == second / "config.json"


def _label(folder: Folder | None) -> str | None:
    return None if folder is None else str(folder)


def _has(folder: Folder, file_set: FileSet) -> bool:
    return bool(named(folder, file_set.marks))


def _first_with(file_set: FileSet, folders: Sequence[Folder]) -> Folder | None:
    return next((folder for folder in folders if _has(folder, file_set)), None)


def _of_checkpoint(ckpt: Folder, config: dict[str, Any], *, new_head: bool) -> Iterator[str]:
    """Everything but what is made anew, weights, training state, cards and hidden files."""
    needed = LIKE_WEIGHTS.get(str(config.get("model_type")), ())
    for name in ckpt.names("*"):
        kept = name in needed or not (is_weights(name) or is_training_state(name))
        if kept and not matches(name, (*NEVER, *CARDS, *HIDDEN)) and not (new_head and name == GENERATION):
            yield name
    for folder in FOLDERS:
        yield from (name for name in ckpt.names(f"{folder}/*") if not matches(name, HIDDEN))


def _tokenizer_folder(
    ckpt: Folder, folders: list[Folder], embedding: Embedding | None, warnings: list[str]
) -> Folder | None:
    """The adapter's folder whose tokenizer is taken, if any is. A folder whose tokenizer has tokens that the
    model does not know is taken out of `folders`: its template and processor are for these tokens too."""
    while (folder := _first_with(TOKENIZER, folders)) and embedding:
        for name in named(folder, TOKENIZER.names):
            check_side_file(folder, name)
        n = n_tokens(folder)
        if n is None or n <= embedding.n_rows or n <= (n_tokens(ckpt) or 0):
            return folder
        folders.remove(folder)
        there = _has(ckpt, TOKENIZER)
        instead = f"The tokenizer of {shown(ckpt)} is taken instead" if there else "It is not taken"
        warnings.append(
            f"{shown(folder)}: the tokenizer has {n} tokens, but {shown(embedding.name)} of the result has "
            f"{embedding.n_rows} rows. {instead}; if training added tokens, their embeddings are not in the "
            "adapter."
        )
    return folder


def _template_folder(
    ckpt: Folder, tokenizer: Folder | None, folders: Sequence[Folder], warnings: list[str]
) -> Folder | None:
    """Where the chat template comes from: the adapter was trained with its own, so that it is taken with the
    checkpoint's tokenizer too; an adapter's tokenizer without a template gets the checkpoint's."""
    own = tokenizer or ckpt
    candidates = [tokenizer] if tokenizer else []
    candidates += [folder for folder in folders if folder is not tokenizer]
    found = next((folder for folder in [*candidates, ckpt] if has_template(folder)), None)
    if found is None or found is own or (has_template(own) and same_template(found, own)):
        return own if found else None
    if found is ckpt:
        warnings.append(
            f"{shown(own)}: the tokenizer has no chat template; that of {shown(ckpt)} is taken with it."
        )
    else:
        warnings.append(
            f"{shown(found)}: the chat template in it is taken, with the tokenizer of {shown(own)}."
        )
    return found


def _module_files(chosen: Folder, ckpt: Folder) -> dict[str, Folder]:
    """The files in the folders of modules.json; of the checkpoint where the chosen folder lacks them."""
    files: dict[str, Folder] = {}
    for name in module_folders(chosen):
        holder = chosen if chosen.exists(name) else ckpt
        if holder.exists(name):
            files |= dict.fromkeys(files_below(holder, name), holder)
    return files


def _code(files: dict[str, Folder], config: dict[str, Any], ckpt: Folder) -> dict[str, Folder]:
    """The Python files that an auto_map needs. The checkpoint's code is never replaced by an adapter's."""
    found = dict.fromkeys(with_imports(ckpt, named_code(config)), ckpt)
    for name in (name for name in WITH_AUTO_MAP if name in files):
        for folder in (files[name], ckpt):
            code = with_imports(folder, code_in(files[name], name))
            found |= dict.fromkeys((file for file in code if file not in found), folder)
    return {file: ckpt if ckpt.exists(file) else folder for file, folder in found.items()}


def code_in(folder: Folder, name: str) -> list[str]:
    """The Python files that the auto_map of a JSON file names; none where it cannot be read."""
    try:
        return named_code(read_json_dict(folder, name))
    except (ValueError, FormatError, OSError):
        return []


def _checked(files: dict[str, Folder], ckpt: Folder, warnings: list[str]) -> Iterator[tuple[Folder, str]]:
    for name, folder in sorted(files.items()):
        nbytes = check_side_file(folder, name)
        known = (
            folder is not ckpt
            or "/" in name
            or name.endswith(".py")
            or belongs(name, [n for s in SETS for n in s.names])
        )
        if known:
            refuse_large(folder, name, nbytes)
        if nbytes <= MAX_NBYTES:
            yield folder, name
        else:
            warnings.append(
                f"{folder / name}: has {nbytes} bytes and is not copied; nothing that loads models knows it."
            )
