"""What compressed-tensors' part of config.json tells of layouts: group sizes, blocks and bits, of any group
of modules. Which modules a group has is not looked at: what is stored has to fit."""

from collections.abc import Iterator, Mapping
from typing import Any

from lorafuse.codecs.other_formats import quantizations
from lorafuse.codecs.scaled import Block, block_of, fitting_block

MX_GROUP = 32
_DEFAULT_BLOCK = Block(128, 128)


def _weights(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What each group says of its weights; presets ({"FP8": ["Linear"]}) say nothing here."""
    for section in quantizations(config):
        groups = section.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                yield weights


def all_asymmetric(config: Mapping[str, Any]) -> bool:
    """Whether every group has zero points of its weights."""
    said = [weights.get("symmetric") for weights in _weights(config)]
    return bool(said) and all(symmetric is False for symmetric in said)


def _numbers(config: Mapping[str, Any], name: str) -> set[int]:
    found = (weights.get(name) for weights in _weights(config))
    return {number for number in found if type(number) is int and number > 0}


def group_width(n_cols: int, n_groups: int, config: Mapping[str, Any]) -> int | None:
    """Columns that share a scale, where a row has so many: a group_size of the config, or what divides a row
    evenly. None where nothing fits, or two sizes do."""
    if n_groups == 1:
        return n_cols
    fitting = {size for size in _numbers(config, "group_size") if -(-n_cols // size) == n_groups}
    if n_groups and n_cols % n_groups == 0 and (not fitting or n_cols // n_groups in fitting):
        return n_cols // n_groups
    return fitting.pop() if len(fitting) == 1 else None


def block_structure(shape: tuple[int, ...], grid: tuple[int, ...], config: Mapping[str, Any]) -> Block | None:
    """Rows and columns that share a scale: a block_structure of the config, or what is usual, or what divides
    the weight evenly. None where nothing fits, or two do."""
    said = [weights.get("block_structure") for weights in _weights(config)]
    blocks = {
        Block(*sizes)
        for sizes in said
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int for size in sizes)
    }
    for candidates in (blocks, {_DEFAULT_BLOCK}):
        fitting = {block for block in candidates if fitting_block(shape, grid, block)}
        if fitting:
            return fitting.pop() if len(fitting) == 1 else None
    return block_of(shape, grid)


def packing(n_words: int, n_cols: int, config: Mapping[str, Any]) -> tuple[int, bool] | None:
    """(bits of a code, whether none crosses two words) of rows of so many words; None where nothing fits, or
    two layouts do. Until 2026, words of 3, 5, 6 and 7 bits were padded."""
    said = _numbers(config, "num_bits")
    found = [
        (bits, padded)
        for padded in (False, True)
        for bits in range(1, 9)
        if (not said or bits in said)
        and (not padded or 32 % bits)
        and n_words == (-(-n_cols // (32 // bits)) if padded else -(-n_cols * bits // 32))
    ]
    if not said:  # of the layouts that are usual
        found = [layout for layout in found if 32 % layout[0] == 0] or found
    if len(found) == 2 and found[0][0] == found[1][0] and n_cols <= 32 // found[0][0]:
        return found[0]  # in one word there is no difference
    return found[0] if len(found) == 1 else None


def group_size_by_headers(
    n_words: int, n_groups: int, layout: tuple[int, bool] | None, config: Mapping[str, Any]
) -> int:
    """The size in the config of which so many groups fill a row of so many words; 0 where not one does."""
    sizes = _numbers(config, "group_size")
    fitting = [size for size in sizes if layout and packing(n_words, size * n_groups, config) == layout]
    return fitting[0] if len(fitting) == 1 else 0


def mx_bits(n_bytes: int, n_groups: int, config: Mapping[str, Any]) -> int:
    """Bits of a code of rows of so many bytes, in groups of 32: 4 (E2M1) or 6 (E2M3). Where a short last
    group leaves room for both, what the config says."""
    widths = {bits: 8 * n_bytes // bits for bits in (4, 6) if 8 * n_bytes % bits == 0}
    fitting = {bits for bits, width in widths.items() if -(-width // MX_GROUP) == n_groups}
    if len(fitting) > 1:
        fitting = fitting & _numbers(config, "num_bits")
    return 6 if fitting == {6} else 4


def packing_by_headers(n_words: int, n_groups: int, config: Mapping[str, Any]) -> tuple[int, bool] | None:
    """The same where the number of columns is not known: that of whole groups, of a size in the config."""
    found = set()
    for weights in _weights(config):
        size, bits = weights.get("group_size"), weights.get("num_bits")
        if type(size) is int and size > 0 and type(bits) is int and 1 <= bits <= 8:
            found.add(packing(n_words, size * n_groups, config))
    if not found and n_groups == 1 and len(said := _numbers(config, "num_bits")) == 1:
        return min(said), False
    return found.pop() if len(found) == 1 else None
