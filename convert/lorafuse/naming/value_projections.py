"""Which weights the values of attention are computed with."""

import re
from collections.abc import Mapping
from typing import Any

from lorafuse.naming.table import Renames

# Values alone; then modules whose output has them beside queries or keys; then the two matrices of latent
# attention that values go through, as keys do. RWKV calls a part of its feed-forward "value" as well.
_HOLDS_VALUES = re.compile(
    r"(?:.*\.)?(?:"
    r"v_proj|(?<!feed_forward\.)value|value_proj|v|to_v|wv|v_lin|linear_v|"
    r"qkv|qkv_proj|[Ww]qkv|W_pack|c_attn|query_key_value|kv_proj|in_proj_qkv|in_proj_qkvz|"
    r"kv_a_proj_with_mqa|kv_b_proj)\.weight"
)


class ValueProjections:
    """Those of one checkpoint, by the names on disk or those in memory."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._renames = Renames(dict(config))

    def has(self, weight: str) -> bool:
        """Whether a weight holds some of them, perhaps beside queries and keys."""
        in_memory = (parameter for parameter, _ in self._renames.memory_names(weight))
        return any(map(_HOLDS_VALUES.fullmatch, (weight, *in_memory)))
