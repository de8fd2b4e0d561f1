"""Some rows at a time, few enough that their float64 copies stay in the processor's cache."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 18  # numbers


def in_chunks(rows: Float[Tensor, "rows width"], *others: Float[Tensor, "rows *any"]) -> Iterator[tuple[Tensor, ...]]:
    """`rows`, and others with as many, side by side."""
    size = max(1, CHUNK // rows.shape[1])
    return zip(*(one.split(size) for one in (rows, *others)), strict=True)
