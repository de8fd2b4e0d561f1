"""Products with a symmetric result, or a symmetric factor, of which half is computed: the other half is its mirror."""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 256  # smaller blocks are multiplied more slowly than they save


def add_gram(total: Float[Tensor, "width width"], rows: Float[Tensor, "tokens width"]) -> None:
    """total += rows' rows, multiplied in the rows' own dtype, in the blocks on and above the diagonal; `mirrored` makes
    it whole."""
    for start in range(0, rows.shape[1], BLOCK):
        end = start + BLOCK
        if rows.dtype == total.dtype:
            total[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
        else:
            total[start:end, start:] += rows[:, start:end].T @ rows[:, start:]


def mirrored(matrix: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """`matrix` with the blocks below the diagonal filled from those above, in place."""
    for start in range(0, len(matrix), BLOCK):
        end = start + BLOCK
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix


def product(first: Float[Tensor, "width width"], second: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """first @ second of two symmetric matrices that commute, such as two polynomials of one: symmetric again."""
    total = torch.empty_like(first)
    for start in range(0, len(first), BLOCK):
        end = start + BLOCK
        torch.mm(first[start:end], second[:, start:], out=(block := torch.empty_like(first[start:end, start:])))
        total[start:end, start:] = block
    return mirrored(total)


def quadratic_forms(
    matrix: Float[Tensor, "width width"], vectors: Float[Tensor, "width vectors"]
) -> Float[Tensor, "vectors"]:
    """w' matrix w for every column w of `vectors`, matrix symmetric: blocks above the diagonal count twice. Float64."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for some, into in zip(vectors.split(BLOCK, dim=1), total.split(BLOCK), strict=True):
        for start in range(0, len(matrix), BLOCK):
            end = start + BLOCK
            through = matrix[start:end, start:end] @ some[start:end]
            if end < len(matrix):
                through.addmm_(matrix[start:end, end:], some[end:], alpha=2)
            into += through.mul_(some[start:end]).sum(0)
    return total
