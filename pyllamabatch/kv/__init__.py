"""KV memory as plain Python: which slot holds which cells, which prefixes stay cached, and what a
preemption should do. No libllama here: the engine and the simulator use the same objects."""

from .accounting import KvAccounting, Slots
from .prefix_cache import PrefixCache
from .radix_tree import RadixTree
from .sharing import Hit, KvOperation, Sharing
from .swap import Preemption, SwapChoice, SwapSpace

__all__ = [
    "Hit", "KvAccounting", "KvOperation", "Preemption", "PrefixCache", "RadixTree", "Sharing",
    "Slots", "SwapChoice", "SwapSpace",
]  # fmt: skip
