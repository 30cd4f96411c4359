"""GPUs by the name that they report, and what their data sheets say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU, with its memory bandwidth in bytes per second."""

    name: str
    bandwidth: float


#: the first one whose name is part of the reported name; NVIDIA's data sheets of the H100 and H200 Tensor Core GPUs
CARDS = (
    Card("H200 NVL", 4.8e12),
    Card("H200", 4.8e12),
    Card("H100 NVL", 3.9e12),
    Card("H100 PCIe", 2.0e12),
    Card("H100", 3.35e12),
)


def recognised(device: str) -> Card | None:
    """The card of a device's name or description, or None."""
    return next((card for card in CARDS if card.name in device), None)
