"""Channels: two bits for each of the channels in which keys differ most, asked by whole probes.

After Double Sparsity (Yang et al. 2024, arXiv 2408.07092), which ranks every key by a few heavy
channels, calibrated offline and kept as 4-bit numbers, and attends to single tokens. Here a request
calibrates itself on its first tokens, a channel takes 2 bits, and pages are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.channels import Channels as ChannelCodes
from kvplug.policies.base import Policy, Stages
from kvplug.probe.last_activated import LastAndActivatedProbe


@dataclass(frozen=True)
class Channels(Policy):
    """Channel codes, probes from the last and the most activated tokens, top pages."""

    bits: int = 128
    """Of a token's code, per KV head: 64 or 128."""
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
            index=ChannelCodes(bits=self.bits),
            probe=LastAndActivatedProbe(last=self.last, active=self.active),
        )
