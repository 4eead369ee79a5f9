"""Damage for the fuzzer: Hypothesis strategies that turn a good file into a bad one, or into another good one
that nobody foresaw.

Nothing here uses lorafuse, and every example is drawn, so that a failure shrinks and repeats.
"""

import json
import struct
from typing import Any

from build import raw_file
from hypothesis import strategies as st

# Stand-ins for what json.dumps will not write; replaced in its text.
SPELLED = {
    b'"@deep@"': b"[" * 50_000 + b"]" * 50_000,
    b'"@digits@"': b"9" * 5000,
    b'"@long@"': b'"' + b"x" * 100_000 + b'"',
}
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    2**31,
    2**62,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e-30,
    1e30,
    float("inf"),
    float("nan"),
]
WORDS = [
    "", "x", " ", "0", "../x", "/etc/passwd", "C:\\x", "\x1b[31m", "\n", "\0", "\ud800", "🙂", "(", ".*",
    "a" * 300,
    "all-linear", "none", "all", "lora_only", "float16", "bfloat16", "torch.float16", "nf4", "fp4", "default",
    "weight",
    "q_proj", "lm_head", "F16", "BF16", "F32", "F8_E4M3", "U8", "I64", "BOOL", "@deep@", "@digits@", "@long@",
]  # fmt: skip
# Each a trap of its own: for the terminal, for UTF-8, for the stack, for int().
NASTY = ["\x1b[31m", "\n\r", "\x9b1m", "\ud800", "@deep@", "@digits@"]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(WORDS)
    | st.sampled_from(NASTY)
    | st.integers(-9, 70),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([w for w in WORDS if w[:1] != "@"]), inner, max_size=2)
    ),
    max_leaves=4,
)
Tensors = dict[str, tuple[str, list[int], bytes]]
ITEM_NBYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


def _places(value: Any, parent: Any, key: Any) -> list[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(parent, key), *(place for k, v in inner for place in _places(v, value, k))]


@st.composite
def mutated_json(draw: st.DrawFn, text: bytes, fields: tuple[str, ...] = ()) -> bytes:
    """One to three values replaced, removed, retyped, nested, moved or added; `fields` are names worth adding
    at the top."""
    root = [json.loads(text)]
    for _ in range(draw(st.integers(1, 3))):
        places = _places(root[0], root, 0)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(["replace", "remove", "wrap", "move", "add", "number", "word", "name"]))
        if action == "add" and fields and isinstance(root[0], dict):
            root[0][draw(st.sampled_from(fields))] = draw(JUNK)
        elif action == "name" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*WORDS[:12], *NASTY[:4]]))] = holder.pop(key)
        elif action == "remove" and holder is not root:
            del holder[key]
        elif action == "wrap":
            holder[key] = draw(
                st.sampled_from([[holder[key]], {"x": holder[key]}, [holder[key]] * 2, str(holder[key])])
            )
        elif action == "move":
            other, at = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = json.loads(json.dumps(other[at]))
        elif action == "number" and isinstance(holder[key], int):
            holder[key] = draw(
                st.sampled_from(
                    [holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, float(holder[key])]
                )
            )
        elif action == "word" and isinstance(holder[key], str):
            holder[key] = draw(
                st.sampled_from([holder[key] + "x", holder[key][1:], holder[key].upper(), f"x/{holder[key]}"])
            )
        else:
            holder[key] = draw(JUNK)
    return _spelled(json.dumps(root[0]).encode(), draw)


def _spelled(text: bytes, draw: st.DrawFn) -> bytes:
    for word, spelling in SPELLED.items():
        text = text.replace(word, spelling)
    if text.startswith(b"{") and draw(st.integers(0, 15)) == 0:  # a name twice
        text = b"{" + text[1:-1] + b"," + text[1:] if len(text) > 2 else text
    return text


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, start: int = 0, *, same_length: bool = False) -> bytes:
    """One to four runs of bytes flipped, replaced, removed or repeated, from `start` on."""
    actions = ["flip", "fill"] if same_length else ["flip", "put", "fill", "cut", "repeat", "end"]
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(start, max(start, len(out) - 1)))
        action = draw(st.sampled_from(actions))
        if action == "flip" and at < len(out):
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "put":
            out[at : at + draw(st.integers(0, 2))] = draw(
                st.sampled_from([b"", b'"', b"{", b"0", b"\0", b"\xff", b"\\", b"e9"])
            )
        elif action == "fill":
            n = min(draw(st.integers(1, 64)), len(out) - at)
            out[at : at + n] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f"])) * n
        elif action == "cut":
            del out[at : at + draw(st.integers(1, 9))]
        elif action == "repeat":
            out[at:at] = out[at : at + draw(st.integers(1, 9))]
        elif action == "end":
            del out[at:]
    return bytes(out)


def tensors_of(file: bytes) -> Tensors:
    (n,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + n])
    header.pop("__metadata__", None)
    data = file[8 + n :]
    return {k: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for k, e in header.items()}


def metadata_of(file: bytes) -> dict[str, str]:
    """What the header says beside tensors."""
    (n,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + n]).get("__metadata__", {})


def file_of(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return raw_file(header, data)


@st.composite
def mutated_header(draw: st.DrawFn, file: bytes) -> bytes:
    """The header's values changed, or its bytes, or the length that stands before it."""
    (n,) = struct.unpack("<Q", file[:8])
    header, data = file[8 : 8 + n], file[8 + n :]
    kind = draw(st.sampled_from(["json", "bytes", "length"]))
    if kind == "length":
        length = st.sampled_from(
            [0, 1, 7, n - 1, n + 1, n + 8, len(file), len(file) - 8, 10**8 + 1, 2**63, 2**64 - 1]
        )
        return raw_file(header, data, length=draw(length | st.integers(0, 2**64 - 1)))
    header = draw(mutated_json(header) if kind == "json" else mutated_bytes(header))
    return raw_file(header, data)


@st.composite
def mutated_tensors(draw: st.DrawFn, file: bytes, words: tuple[str, ...]) -> bytes:
    """A valid file of other tensors: renamed (one of `words` for another), removed, retyped, reshaped,
    resized, filled."""
    tensors = tensors_of(file)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors) or [""]))
        if name not in tensors:
            break
        dtype, shape, raw = tensors[name]
        action = draw(
            st.sampled_from(
                ["rename", "copy", "remove", "retype", "turn", "flatten", "nest", "resize", "fill"]
            )
        )
        if action in ("rename", "copy"):
            found = [word for word in words if word in name] or [name]
            new = name.replace(
                draw(st.sampled_from(found)),
                draw(st.sampled_from(words) | st.sampled_from([*WORDS[:9], *NASTY[:4]])),
            )
            if action == "rename":
                del tensors[name]
            tensors[new.encode("utf-8", "replace").decode()] = (dtype, shape, raw)
        elif action == "remove":
            del tensors[name]
        elif action == "fill":
            value = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80\x7f"]))
            tensors[name] = (dtype, shape, (value * len(raw))[: len(raw)])
        else:
            tensors[name] = draw(_reshaped(dtype, shape, raw, action))
    return file_of(tensors, metadata_of(file))


@st.composite
def _reshaped(
    draw: st.DrawFn, dtype: str, shape: list[int], raw: bytes, action: str
) -> tuple[str, list[int], bytes]:
    if action == "retype":
        same = [other for other, nbytes in ITEM_NBYTES.items() if nbytes == ITEM_NBYTES[dtype]]
        return draw(st.sampled_from(same)), shape, raw
    if action == "turn":
        return dtype, shape[::-1], raw
    if action == "flatten":
        return dtype, [len(raw) // ITEM_NBYTES[dtype]], raw
    if action == "nest":
        at = draw(st.integers(0, len(shape)))
        return dtype, [*shape[:at], 1, *shape[at:]], raw
    shape = [*shape] or [1]
    at = draw(st.integers(0, len(shape) - 1))
    shape[at] = (
        draw(st.sampled_from([0, 1, shape[at] - 1, shape[at] + 1, shape[at] * 2]) | st.integers(0, 40)) % 4096
    )
    nbytes = ITEM_NBYTES[dtype]
    for n in shape:
        nbytes *= n
    return dtype, shape, (raw * (nbytes // max(len(raw), 1) + 1))[:nbytes].ljust(nbytes, b"\0")
