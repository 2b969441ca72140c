"""The least time that a number of operations and bytes can take on a machine of known peak rates.

The roofline model of Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from metabench.errors import Unsupported

Limit = Literal["compute", "memory"]


def bound(flops: float, bytes: float, roofs: Mapping[str, float], precision: str) -> tuple[float, Limit]:
    """Least seconds that `flops` operations of `precision` and `bytes` moved can take, and what sets them.

    `roofs` is what `metabench.roofs.measure` gives: operations per second under "<precision>_flops", bytes per second
    under "bytes". Divided by the measured seconds this is the share of the roof. It bounds real time only as far as
    the bytes truly go to memory: `metabench.counts.bytes_moved` counts un-fused execution with cold caches, so small
    tensors that stay in a cache can give a share above 1 (and so can a roof measured on a busy machine). A tie is
    "compute".

    Raises:
        Unsupported: no roof for this precision.
        ValueError: a negative or non-finite amount, or a roof that is not positive and finite.
    """
    key = f"{precision}_flops"
    if key not in roofs:
        known = ", ".join(sorted(k.removesuffix("_flops") for k in roofs if k.endswith("_flops")))
        raise Unsupported(f"no roof was measured for precision {precision!r} (measured: {known or 'none'})")
    amounts, rates = (flops, bytes), (roofs[key], roofs["bytes"])
    if not all(math.isfinite(x) and x >= 0 for x in amounts):
        raise ValueError(f"flops and bytes must be finite and not negative, got {flops} and {bytes}")
    if not all(math.isfinite(x) and x > 0 for x in rates):
        raise ValueError(f"roofs must be finite and positive, got {key} {rates[0]} and bytes {rates[1]}")
    computing, moving = flops / rates[0], bytes / rates[1]
    return (moving, "memory") if moving > computing else (computing, "compute")
