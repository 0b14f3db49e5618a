"""Sequence parallelism: processes that share each sequence, by Ulysses, a ring, or both.

Every process of the group gets the same batch. ``split`` leaves it its part; outside of attention a token needs no other.
Losses, metrics and gradients of all parameters are parts of sums over the group, as over processes that see other rows.
"""

from swift.parallel.sequence.attend import use_sequence_parallel
from swift.parallel.sequence.share import Share, make_share
from swift.parallel.sequence.split import split

__all__ = ["Share", "make_share", "split", "use_sequence_parallel"]
