"""Devices by name: memory and bf16 rate as their makers state them, for plans of machines that are not this one."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
REACHED = 0.4
"""Share of the stated rate that training is assumed to reach."""


@dataclass(frozen=True, slots=True)
class Device:
    """`memory` in bytes, `rate` in dense bf16 (fp16 where there is no bf16) operations a second."""

    name: str
    memory: int
    rate: float


DEVICES = (
    Device("T4", 16 * GIB, 65e12),
    Device("RTX 3060", 12 * GIB, 51e12),
    Device("RTX 3090", 24 * GIB, 71e12),
    Device("RTX 4090", 24 * GIB, 165e12),
    Device("L4", 24 * GIB, 121e12),
    Device("A10G", 24 * GIB, 70e12),
    Device("A100-40", 40 * GIB, 312e12),
    Device("A100-80", 80 * GIB, 312e12),
    Device("H100", 80 * GIB, 989e12),
    Device("H200", 141 * GIB, 989e12),
)


def find_device(name: str) -> Device | None:
    """The device of that name, however it is written."""
    return next((d for d in DEVICES if _plain(d.name) == _plain(name)), None)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
