"""What a user can ask for, checked without torch, so that a wrong option is refused at once."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorafuse.errors import UsageError, shown

DTYPE_CHOICES = ("auto", "float32", "float16", "bfloat16")
FORMAT_CHOICES = ("dense", "base", "light", "mixed", "nf4", "fp4", "int8", "fp8", "w8a16", "w4a16")
QUANTIZING_FORMATS = ("nf4", "fp4", "int8")
ROUNDING_CHOICES = ("unbiased", "nearest")
AUTO = "auto"  # as --base-quant: what the files beside the adapter say
BASE_QUANT_CHOICES = ("none", AUTO, "nf4", "fp4", "int8")
QUANT_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes 0.50 functional.py, quantize_4bit
JOB_NAME = "{name}"  # in --push-to-hub of a batch
THE_BASE = ("auto", "-")  # for CKPT: the base that the adapter's config names
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{i}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for i, base in (("", 1000), ("I", 1024))
}
_BARE = 1000  # a smaller number without a unit was meant with one
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class BaseQuant:
    """How training quantized a base that is stored in full precision, in the terms of transformers'
    BitsAndBytesConfig.

    `skip` is its llm_int8_skip_modules: names or regular expressions of modules, which replace transformers'
    own choice; None is that choice. `skip_version`: the version of transformers 4 whose rule and names read
    it, None for 5. `experts`: the experts of a mixture were quantized too, each by itself, as transformers 4
    did; `stacked_experts`: those of a layer together, as axolotl does. Raises UsageError.
    """

    kind: str
    double_quant: bool = True
    blocksize: int = 64
    skip: tuple[str, ...] | None = None
    skip_version: str | None = None
    experts: bool = False
    stacked_experts: bool = False

    def __post_init__(self) -> None:
        if self.kind not in BASE_QUANT_CHOICES[1:]:
            raise UsageError(
                f"--base-quant is {shown(self.kind)}; expected one of {', '.join(BASE_QUANT_CHOICES)}."
            )
        if self.blocksize not in QUANT_BLOCKSIZES:
            raise UsageError(
                f"--quant-blocksize is {shown(self.blocksize)}; expected one of "
                f"{', '.join(map(str, QUANT_BLOCKSIZES))}."
            )
        for name in (self.skip or ()) if self.skip_version is None else ():
            try:
                re.compile(name)
            except re.error as e:
                raise UsageError(
                    f"--quant-skip: {shown(name)!r} is no name or regular expression of modules: {e}."
                ) from None

    @property
    def that_decide_bytes(self) -> dict[str, Any]:
        """The settings that the weights depend on; int8 has neither blocks nor double quantization."""
        four_bit = (
            {"double_quant": self.double_quant, "blocksize": self.blocksize} if self.kind != "int8" else {}
        )
        return {
            "kind": self.kind,
            **four_bit,
            "skip": None if self.skip is None else list(self.skip),
            "experts": self.experts,
            **({"skip_version": self.skip_version} if self.skip_version else {}),
            **({"stacked_experts": True} if self.stacked_experts else {}),
        }

    @classmethod
    def of_receipt(cls, that_decide_bytes: Mapping[str, Any]) -> "BaseQuant":
        """What a receipt's `base_quant` came from. Raises UsageError, or what Python raises for fields that
        are missing or of another kind."""
        skip = that_decide_bytes["skip"]
        return cls(
            kind=that_decide_bytes["kind"],
            double_quant=bool(that_decide_bytes.get("double_quant", True)),
            blocksize=that_decide_bytes.get("blocksize", QUANT_BLOCKSIZES[1]),
            skip=None if skip is None else tuple(skip),
            skip_version=that_decide_bytes.get("skip_version"),
            experts=bool(that_decide_bytes["experts"]),
            stacked_experts=bool(that_decide_bytes.get("stacked_experts", False)),
        )

    def __str__(self) -> str:
        if self.kind == "int8":
            return "int8"
        return (
            f"{self.kind} in blocks of {self.blocksize}, {'double' if self.double_quant else 'single'} "
            "quantization"
        )


@dataclass(frozen=True)
class Push:
    """Where on the hub a result goes: a repository, which is made if it is not there, and a branch of it. In
    that of a batch {name} stands for the names of its jobs. Raises UsageError."""

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.repo.replace(JOB_NAME, "name")):
            raise UsageError(
                f"{shown(self.repo)!r} is no repository on the hub; expected a name such as me/merged."
            )
        if self.revision and self.create_pr:
            raise UsageError("A pull request has a branch of its own; it does not go with a revision.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a conversion. `dtype`, `format`, `max_shard_nbytes`, `adapter_scale` and `base_quant` decide
    the bytes written; `adapter_name` decides which files are read, `allow_nonfinite` what is refused; the
    rest none of it."""

    dtype: str = "auto"
    max_shard_nbytes: int = 5 * 10**9
    memory_nbytes: int = 100 * 10**6
    device: str = "auto"
    adapter_scale: float = 1.0
    adapter_name: str | None = None
    base_quant: BaseQuant | None = None
    allow_nonfinite: bool = False
    format: str = "dense"  # a word of formats.FORMATS
    keep_dense: tuple[str, ...] = ()
    rounding: str | None = None
    quant_anew: BaseQuant | None = None  # of QUANTIZING_FORMATS, unless `base_quant` says it
    n_threads: int = 0  # 0: as many as this process may use

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_named(self.dtype))
        if self.dtype not in DTYPE_CHOICES:
            raise UsageError(f"--dtype is {shown(self.dtype)}; expected one of {', '.join(DTYPE_CHOICES)}.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device is {shown(self.device)}; expected auto, cpu, cuda or cuda:N.")
        if self.rounding not in (None, *ROUNDING_CHOICES):
            raise UsageError(
                f"--rounding is {shown(self.rounding)}; expected one of {', '.join(ROUNDING_CHOICES)}."
            )
        if not math.isfinite(self.adapter_scale):
            raise UsageError(f"--adapter-scale is {self.adapter_scale}; expected a finite number.")
        name = self.adapter_name
        if name is not None and (name in ("", ".", "..") or set(name) & set("/\\\0")):
            raise UsageError(
                f"--adapter-name is {shown(name)!r}; expected the name of an adapter, not a path."
            )

    @property
    def n_workers(self) -> int:
        return self.n_threads or len(os.sched_getaffinity(0))

    @property
    def quantization(self) -> BaseQuant:
        """How one of QUANTIZING_FORMATS quantizes: as training quantized the base, but for the kind."""
        known = self.base_quant or self.quant_anew or BaseQuant(kind=self.format)
        return known if known.kind == self.format else replace(known, kind=self.format)

    @property
    def that_decide_bytes(self) -> dict[str, Any]:
        """The settings that the output depends on."""
        found = {
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_nbytes,
            "adapter_scale": self.adapter_scale,
        }
        light: dict[str, Any] = {"format": self.format} if self.format != "dense" else {}
        light |= {"keep_dense": list(self.keep_dense)} if self.keep_dense else {}
        light |= {"rounding": self.rounding} if self.rounding else {}
        if self.format in QUANTIZING_FORMATS and not self.base_quant:
            light["quantization"] = self.quantization.that_decide_bytes
        return found | light | ({"base_quant": self.base_quant.that_decide_bytes} if self.base_quant else {})

    @classmethod
    def of_receipt(
        cls, that_decide_bytes: Mapping[str, Any], *, device: str, memory_nbytes: int
    ) -> "Settings":
        """The settings that a receipt's `settings` came from, as far as the output depends on them. Raises
        UsageError."""
        try:
            quant, anew = (that_decide_bytes.get(name) for name in ("base_quant", "quantization"))
            return cls(
                dtype=that_decide_bytes["dtype"],
                max_shard_nbytes=that_decide_bytes["max_shard_size"],
                adapter_scale=float(that_decide_bytes["adapter_scale"]),
                format=str(that_decide_bytes.get("format", "dense")),
                keep_dense=tuple(that_decide_bytes.get("keep_dense", ())),
                rounding=that_decide_bytes.get("rounding"),
                base_quant=BaseQuant.of_receipt(quant) if quant else None,
                quant_anew=BaseQuant.of_receipt(anew) if anew else None,
                device=device,
                memory_nbytes=memory_nbytes,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"The receipt's settings are broken: {shown(e)}.") from None


# Not everything that float() takes: no underscores, and nan and inf are refused by name.
_NUMBER = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE
)


def parse_weighted(text: str) -> tuple[str, float]:
    """`PATH[:WEIGHT]` → (path, weight), 1 where none is given. Raises UsageError for a weight that is no
    finite number.

    A directory of the whole name wins, and a colon before a slash or backslash belongs to the path.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight or os.path.isdir(text):
        return text, 1.0
    if not path or not _NUMBER.fullmatch(weight):
        raise UsageError(
            f"{shown(text)}: {shown(weight)!r} is no weight; expected PATH or PATH:WEIGHT, such as "
            "my-adapter:0.5."
        )
    return path, checked_weight(path, float(weight))


def checked_weight(path: object, weight: float) -> float:
    """The weight of an adapter as a float. Raises UsageError unless it is a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UsageError(f"The weight of {shown(path)} is {shown(weight)}; expected a finite number.")
    return float(weight)


def dtype_named(dtype: Any) -> Any:
    """`dtype` by the name that torch has for it, where it is a short one, in capitals, or torch's own."""
    if not isinstance(dtype, str) and type(dtype).__module__ != "torch":
        return dtype
    name = str(dtype).removeprefix("torch.").lower()
    return _SHORT.get(name, name)


def parse_nbytes(text: str | int) -> int:
    """`5GB` → 5·10⁹, as everywhere in the Hugging Face libraries; `5GiB` → 5·2³⁰. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?B?)\s*", str(text).upper())
    if not match or match[2] not in _UNITS:
        raise UsageError(
            f"{shown(text)!r} is no size; expected a number with a decimal unit, such as 100MB or 5GB."
        )
    nbytes = float(match[1]) * _UNITS[match[2]]
    if not match[2] and 1 <= nbytes < _BARE and isinstance(text, str):
        raise UsageError(f"{shown(text)!r} is so many bytes; did you mean {match[1]}MB or {match[1]}GB?")
    if not 1 <= nbytes < 2**63:
        raise UsageError(f"{shown(text)!r} is no size; expected at least 1 byte and less than 2^63.")
    return int(nbytes)
