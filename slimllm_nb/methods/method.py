"""A method is one part of each kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from slimllm_nb.methods import published  # noqa: F401  the parts that SlimLLM is made of
from slimllm_nb.methods.registry import KINDS, Part, PartError, find_method, find_part, listed, registered_parts


@dataclass(frozen=True)
class Method:
    """A pruning method: how heads and channels are scored and chosen, how layers share, how the rest is mended."""

    name: str
    head_score: Part
    head_selection: Part
    channel_score: Part
    channel_selection: Part
    allocation: Part
    recovery: Part

    @property
    def parts(self) -> list[Part]:
        return [getattr(self, one.name) for one in fields(self) if one.name != "name"]

    @property
    def head_parts(self) -> list[Part]:
        """What works on the attention half; a score that its selection does not ask for is not among them."""
        return [*_used(self.head_score, self.head_selection), self.recovery]

    @property
    def channel_parts(self) -> list[Part]:
        """What works on the MLP half."""
        return [*_used(self.channel_score, self.channel_selection), self.recovery]

    @property
    def scores_dense_model(self) -> bool:
        """Whether the allocation looks at the scores of all layers before anything goes."""
        return bool({"head_scores", "channel_scores"} & set(self.allocation.needs))

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{part.kind} {part.name}" for part in self.parts)


MethodLike = str | Mapping[str, str | Callable | Mapping] | Callable | Method


def as_method(wanted: MethodLike) -> Method:
    """A method by its name ("slimllm", "flap"), or by what it changes: {"channel_score": "wanda_sp", "recovery": mine}.

    A mapping may also hold "base" (the method that is changed; default: slimllm) and "name" (default: says what is
    changed). A part is a name, a function, or {"name": ..., option: value, ...}. A function that was registered as a
    part stands for SlimLLM with that part.
    Raises: PartError for an unknown method, kind or part, with what is allowed.
    """
    if isinstance(wanted, Method):
        return wanted
    if isinstance(wanted, str):
        wanted = {"base": wanted, "name": wanted}
    if callable(wanted):
        wanted = {part.kind: part for part in registered_parts(wanted)}
    changed = dict(wanted)
    base, name = changed.pop("base", "slimllm"), changed.pop("name", None)
    if unknown := set(changed) - set(KINDS):
        allowed = listed(["name", "base", *KINDS])
        raise PartError(f"a method has no {listed(sorted(map(str, unknown)))}; allowed: {allowed}")
    parts = {kind: find_part(kind, one) for kind, one in (find_method("slimllm") | find_method(base) | changed).items()}
    if name is None:
        name = ", ".join([base, *(f"{kind}={_short(parts[kind])}" for kind in changed)])
    return Method(name, **parts)


def _used(score: Part, selection: Part) -> list[Part]:
    return [score, selection] if "scores" in selection.needs else [selection]


def _short(part: Part) -> str:
    options = ", ".join(f"{name}={value}" for name, value in part.options.items())
    return f"{part.name}({options})" if options else part.name
