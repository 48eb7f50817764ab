"""HAX-inspired: hash buckets and key selection, with nothing trained (after arXiv 2507.00449).

HAX (Zhan et al. 2025, "Overcoming Long-Context Limitations of State-Space Models via
Context-Dependent Sparse Attention") adds to a state-space layer a sparse attention in which a
query sees 64 keys: the 32 newest of its hash bucket, and 32 that a scorer ranks first whoever
asks. It is trained as a layer; what is kept here is how it chooses, and by what:

| HAX | here |
|---|---|
| the state-space layer beside it | sinks and local pages |
| trained queries and keys of the sparse attention | the model's own |
| mean of the whole sequence, which looks ahead | mean of the request's first window, frozen |
| unit norm, along the sequence by mistake | none: it would not change a sign |
| random planes | fixed by seed, layer and KV head |
| 1 round of 8 bits, the newest of a bucket | 32 rounds of 2, most rounds first, then newest |
| trained scorer of keys | attention mass that a key got while it was local |
| 32 keys and 32 keys | pages; half of a row each, by ``split`` |
| every query for itself | probes: last and most activated tokens of a window |

Why not one round of 8 bits. On the recall model, at 32,768 tokens, the needle's key and the query
of the group's first head point the same way (centred cosine 1.00, 99.9% of 64 bits equal; the
second head 0.91, 87%), so the bucket does hold the needle in 99 of 100 cases. But it holds 0.9% of
all tokens too, in 24% of the pages, and a window has several probes: newer pages fill the row.
10 of 100 needles are recalled with budget 2,048 (32 pages by hash), and 10 if all 64 are.
Counting the rounds in which two vectors meet brings the needle to the front: 4 rounds of 8 bits
do there.

Why 2 bits. Real keys do not equal queries. Of 64 bits, more rounds of fewer bits rank better: at
a cosine of 0.8 the share of 1,000 pages of 32 random tokens that two probes rank with or above the
right one is 58% for 8 rounds of 8 bits, 16% for 16 of 4, 3% for 32 of 2 and 1% for 64 of 1, which
is the Hamming distance of ``simhash``.

Measured with the defaults: 100 of 100 needles at 32,768 with budget 2,048; 97 with 512, where
eight pages by hash must do for the eight tokens that probe, and 100 again with ``split`` 0.75.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.buckets import Buckets
from kvplug.policies.base import Policy, Stages
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.select.union import Union


@dataclass(frozen=True)
class Hax(Policy):
    """Bucket index, probes from the last and the most activated tokens, union select."""

    bits: int = 2
    """Sign bits of a bucket's number."""
    rounds: int = 32
    """Independent hash rounds; ``bits * rounds`` is at most 64."""
    split: float = 0.5
    """Share of a row's pages, 0 to 1, that goes to hash hits; key selection takes the rest."""
    last: int = 4
    """Tokens at the end of a window that probe."""
    active: int = 4
    """Most activated other tokens of a window that probe, per KV head."""

    def __post_init__(self) -> None:
        """Refuses what a stage refuses."""
        self.stages()

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(
            index=Buckets(bits=self.bits, rounds=self.rounds),
            probe=LastAndActivatedProbe(last=self.last, active=self.active),
            select=Union(split=self.split),
        )
