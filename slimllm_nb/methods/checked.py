"""What the parts of a method return, checked: a wrong shape or a number that is not finite is named with its part."""

import torch


class PartError(ValueError):
    """A part, or a method, that does not exist or does not do what its kind must."""


def checked_scores(part: object, scores, count: int, where: str) -> torch.Tensor:
    """Raises: PartError unless a score for each, all finite."""
    if not isinstance(scores, torch.Tensor) or scores.shape != (count,):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise PartError(f"{where}: {part} returned {found}; allowed: a tensor of shape ({count},), a score for each")
    if not torch.isfinite(scores).all():
        raise PartError(f"{where}: {part} returned scores that are not finite")
    return scores


def checked_choice(part: object, kept, count: int, num_pruned: int | None, where: str) -> torch.Tensor:
    """Raises: PartError unless `count - num_pruned` different positions, sorted; None: any number of them."""
    wanted = "any number of" if num_pruned is None else count - num_pruned
    right = isinstance(kept, torch.Tensor) and kept.ndim == 1 and len(kept) and not kept.is_floating_point()
    right = right and num_pruned in (None, count - len(kept))
    if not right or kept.min() < 0 or kept.max() >= count or (kept.diff() <= 0).any():
        found = f"shape {tuple(kept.shape)}" if isinstance(kept, torch.Tensor) else type(kept).__name__
        raise PartError(
            f"{where}: {part} returned {found}: {kept}; allowed: {wanted} different positions of {count}, sorted"
        )
    return kept


def checked_allocation(part: object, found, layers: int) -> torch.Tensor:
    """(layers, 2), of heads and of channels, in float64 on the CPU. Raises: PartError unless a ratio, or two, for every
    layer, finite and not negative."""
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape not in ((layers,), (layers, 2)):
        raise PartError(f"{part} returned {shape}; allowed: ({layers},), or ({layers}, 2) for heads, channels")
    if not torch.isfinite(found).all() or (found < 0).any():
        raise PartError(f"{part} returned {found.tolist()}; allowed: finite ratios, not negative")
    return found.double().cpu().view(layers, -1).expand(layers, 2)


def checked_recovery(
    part: object, result, weight: torch.Tensor, kept: int, where: str
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, float]]:
    """What a recovery returned, in float64 on the weight's device, and its notes.

    Raises: PartError unless it is a scale and a shift, or a weight and a bias (or None), all finite.
    """
    hidden = len(weight)
    shapes = [((hidden,), (hidden,)), ((hidden, kept), (hidden,))]
    try:
        first, second, notes = (*result, {})[:3] if len(result) in (2, 3) else result
        found = (tuple(first.shape), (hidden,) if second is None else tuple(second.shape))
    except (TypeError, ValueError, AttributeError) as error:
        raise PartError(
            f"{where}: {part} returned {type(result).__name__}; allowed: a pair of tensors (and a dict of notes), None"
        ) from error
    if found not in shapes or (first.ndim == 1 and second is None):
        raise PartError(f"{where}: {part} returned shapes {found[0]}, {found[1]}; allowed: {shapes[0]} or {shapes[1]}")
    if not torch.isfinite(first).all() or (second is not None and not torch.isfinite(second).all()):
        raise PartError(f"{where}: {part} returned values that are not finite")
    first, second = (None if one is None else one.to(weight.device, torch.float64) for one in (first, second))
    return first, second, notes
