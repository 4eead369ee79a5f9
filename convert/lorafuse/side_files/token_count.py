"""How many tokens a tokenizer has, by its files, read as bytes: a tokenizer.json of 34 MB would take several
hundred MB as Python objects.

What is counted is what every reading of the files agrees on, a lower bound: a class may add tokens of its
own.
"""

import re
from collections.abc import Iterator

from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import MAX_JSON_NBYTES, read_json_dict, read_limited
from lorafuse.files.safetensors_file import FormatError

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN = re.compile(rb"\s*(?:(" + _STRING + rb")|([{}\[\],:])|([^\s\"{}\[\],:]+))", re.DOTALL)
_PAIR = re.compile(rb"\s*" + _STRING + rb"\s*:\s*(\d{1,9})\s*(?:,|(?=\}))", re.DOTALL)  # "token": 5,
_PIECE = re.compile(
    rb"\s*\[\s*" + _STRING + rb"\s*,[^\[\]\"]*\]\s*(?:,|(?=\]))", re.DOTALL
)  # ["token", -1.5],
SENTENCEPIECE = (
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
)


def n_tokens(folder: Folder) -> int | None:
    """The largest known token id and 1; None where no file says it. Raises OSError."""
    counts = [count(folder) for count in (_of_tokenizer_json, _of_vocabularies, _of_added_tokens)]
    return max((n for n in counts if n is not None), default=None)


def _of_tokenizer_json(folder: Folder) -> int | None:
    data = _read(folder, "tokenizer.json")
    return max((token + 1 for token in _ids_in(data)), default=None)


def _ids_in(data: bytes) -> Iterator[int]:
    """Ids of added_tokens and of the model's vocabulary, which is a dict, or for Unigram a list."""
    path: list[bytes] = []  # of the container that is open, by keys; a list adds b""
    key, at, seen = b"", 0, set()
    while match := _TOKEN.match(data, at):
        at = match.end()
        string, mark, value = match.groups()
        if mark in (b"{", b"["):
            path.append(key)
            key = b""
            if path == [b"", b'"model"', b'"vocab"']:
                found, at = _vocabulary(data, at, mark)
                yield from found
                seen.add("vocab")
            if {"vocab", "added"} <= seen:
                return  # merges are the larger part of a file, and come last
        elif mark in (b"}", b"]"):
            if path == [b"", b'"added_tokens"']:
                seen.add("added")
            if path:
                path.pop()
        elif string is not None:
            key = string
        elif value and value.isdigit() and [*path, key] == [b"", b'"added_tokens"', b"", b'"id"']:
            yield int(value[:9])
        if mark == b",":
            key = b""


def _vocabulary(data: bytes, at: int, mark: bytes) -> tuple[list[int], int]:
    """The largest id of a vocabulary that begins at byte `at`, if it has any, and where it ends."""
    largest, n = -1, 0
    if mark == b"{":
        while match := _PAIR.match(data, at):
            largest, at = max(largest, int(match[1])), match.end()
    else:
        while match := _PIECE.match(data, at):
            n, at = n + 1, match.end()
        largest = n - 1
    return ([largest] if largest >= 0 else []), at


def _of_vocabularies(folder: Folder) -> int | None:
    counts = [_of_pairs(_read(folder, "vocab.json")), _n_lines(_read(folder, "vocab.txt"))]
    counts += [_n_lines(_read(folder, name)) for name in folder.names("*.tiktoken")]
    counts += [_n_pieces(_read(folder, name)) for name in SENTENCEPIECE]
    return max(counts) or None


def _of_added_tokens(folder: Folder) -> int | None:
    n = _of_pairs(_read(folder, "added_tokens.json"))
    try:
        ids = read_json_dict(folder, "tokenizer_config.json").get("added_tokens_decoder")
    except (ValueError, FormatError, FileNotFoundError):
        ids = None
    digits = [key for key in ids if key.isdigit() and len(key) < 10] if isinstance(ids, dict) else []
    return max([n, *(int(key) + 1 for key in digits)]) or None


def _of_pairs(data: bytes) -> int:
    """The largest id and 1 of {"token": id, …}; 0 for anything else."""
    start = _TOKEN.match(data)
    found = _vocabulary(data, start.end(), b"{")[0] if start and start[2] == b"{" else []
    return found[0] + 1 if found else 0


def _n_lines(data: bytes) -> int:
    return len(data.rstrip(b"\r\n").split(b"\n")) if data.strip() else 0


def _n_pieces(data: bytes) -> int:
    """The pieces of a sentencepiece model: the fields 1 of its outermost message. 0 for anything else."""
    n, at = 0, 0
    while at < len(data) and data[at] == 0x0A:  # field 1, with a length
        nbytes, shift, at = 0, 0, at + 1
        while at < len(data) and shift < 35:
            nbytes |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 0x80:
                break
        n, at = n + 1, at + nbytes
    return n if at <= len(data) else 0


def _read(folder: Folder, name: str) -> bytes:
    """Empty for a file that is not there, or too large to be read."""
    try:
        return read_limited(folder, name, MAX_JSON_NBYTES)
    except (ValueError, FormatError, FileNotFoundError):
        return b""
