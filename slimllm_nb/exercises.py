"""The notebooks' exercises: what a reader wrote beside what the library gives."""

from collections.abc import Callable, Sequence

import torch

TINY = 1e-12  # what rounding leaves of 0


def check(mine: Callable, library: Callable, cases: Sequence[tuple], relative: float = 1e-6) -> None:
    """Print "passed" when mine(*case) is library(*case) for every case, else what was expected and found in the first
    that differs. A function that returns None is not written yet. What it raises is not caught: it says most."""
    name = mine.__name__
    for number, case in enumerate(cases, 1):
        found = mine(*case)
        if found is None:
            print(f"{name}: not written yet (it returns None)")
            return
        if problem := difference(found, library(*case), relative):
            print(f"{name}: not passed. Case {number} of {len(cases)}: {problem}")
            return
    print(f"{name}: passed, {len(cases)} cases")


def difference(found, expected, relative: float) -> str | None:
    """What is wrong with a tensor, a number, a list of numbers, or a tuple of them; None: nothing."""
    if isinstance(expected, tuple):
        if not isinstance(found, tuple) or len(found) != len(expected):
            size = f" of {len(found)}" if isinstance(found, tuple) else ""
            return f"expected a tuple of {len(expected)}, found a {type(found).__name__}{size}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True), 1):
            if problem := difference(one, other, relative):
                return f"value {number}: {problem}"
        return None
    try:
        found = torch.as_tensor(found).double()
    except (TypeError, ValueError, RuntimeError):
        return f"expected numbers, found a {type(found).__name__}"
    expected = torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        return f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}"
    gap = (found - expected).abs().nan_to_num(nan=torch.inf)
    if not len(gap.flatten()) or (gap <= relative * expected.abs().max() + TINY).all():
        return None
    worst = int(gap.argmax())
    place = [index.item() for index in torch.unravel_index(torch.tensor(worst), gap.shape)]
    at = f" at {place}" if place else ""
    return f"expected {expected.flatten()[worst]:.6g}{at}, found {found.flatten()[worst]:.6g}"
