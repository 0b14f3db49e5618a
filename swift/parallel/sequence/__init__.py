"""Sequence parallelism: processes that share each sequence, by Ulysses, a ring, or both.

Every process of the group gets the same batch. ``split`` leaves it its part; outside of attention a token needs no other.
What a policy makes of a part is a part of a sum over the group: losses, right predictions, and gradients of all parameters,
as over processes that see other rows. A ``PartPolicy`` does both and gives the sums of the passes; gradients stay parts.
"""

from swift.parallel.sequence.attend import use_sequence_parallel
from swift.parallel.sequence.policy import PartPolicy, in_parts
from swift.parallel.sequence.share import Share, make_share
from swift.parallel.sequence.split import split

__all__ = ["PartPolicy", "Share", "in_parts", "make_share", "split", "use_sequence_parallel"]
