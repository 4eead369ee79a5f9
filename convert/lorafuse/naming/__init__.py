"""Adapter parameter name → weights of this checkpoint.

`names.py`: the weights of one checkpoint · `resolve.py`: one rule for all of an adapter's
names · `aliases.py`: names in memory, and how weights make up parameters · `table.py`, `renames.json`: how
transformers renames.
"""

from lorafuse.naming.names import Names
from lorafuse.naming.resolve import Group
from lorafuse.naming.ties import Tie

__all__ = ["Group", "Names", "Tie"]
