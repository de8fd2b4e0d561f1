"""A method is one part of each kind, by name or as a function; here parts and methods are registered and looked up.

A part is a plain function. The names of its parameters say what it needs (statistics.STATISTICS); pruning gathers that
and nothing else:

    @register.channel_score("activation_times_weight")
    def score(input_norms, output_weight):
        return input_norms * output_weight.norm(dim=0)

A parameter of another name needs a default and is an option: {"channel_score": {"name": "mine", "power": 2}}.
"""

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from pydantic import ValidationError

from slimllm_nb.methods.checked import PartError, checked_choice
from slimllm_nb.methods.statistics import STATISTICS
from slimllm_nb.recipe import Recipe

KINDS = tuple(STATISTICS)
ALIASES = {"recommended": "obs_heads_ridge"}  # the best far from what was calibrated on


@dataclass(frozen=True)
class Part:
    """One function with its kind, its name, the statistics it needs and its options."""

    kind: str
    name: str
    function: Callable
    needs: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    adds_bias: bool = True  # a recovery: whether the projections that it works on get a bias

    def __call__(self, statistics: Mapping[str, object]):
        return self.function(**{name: statistics[name] for name in self.needs}, **self.options)

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(frozen=True)
class Method:
    """How heads and channels are scored and chosen, ratios, recovery; how compare() trains the pruned model, if so."""

    name: str
    head_score: Part
    head_selection: Part
    channel_score: Part
    channel_selection: Part
    allocation: Part
    recovery: Part
    tuning: Recipe | None = None

    @property
    def parts(self) -> list[Part]:
        return [part for one in fields(self) if isinstance(part := getattr(self, one.name), Part)]

    @property
    def identity(self) -> list:
        """All that decides what comes out; the name does not."""
        return [*self.parts, self.tuning] if self.tuning else self.parts

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
        """Whether the allocation looks at the scores of all layers before anything is pruned."""
        return bool({"head_scores", "channel_scores"} & set(self.allocation.needs))

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{part.kind} {part.name}" for part in self.parts)


MethodLike = str | Mapping[str, str | Callable | Mapping] | Callable | Method
_parts: dict[tuple[str, str], Part] = {}
_methods: dict[str, dict[str, object]] = {}


def _register_part(kind: str, name: str, adds_bias: bool = True) -> Callable[[Callable], Callable]:
    def registered(function: Callable) -> Callable:
        if not function.__module__.startswith(f"{__package__}."):
            load_built_in()
        known = _parts.get((kind, name))
        # A notebook's cell may run again; what the package brings keeps its name.
        if known and known.function.__module__ != function.__module__:
            raise PartError(f"{kind} {name!r} exists already, in {known.function.__module__}: choose another name")
        _parts[kind, name] = make_part(kind, name, function, adds_bias=adds_bias)
        return function

    return registered


def _register_method(name: str, **parts) -> None:
    if unknown := set(parts) - set(KINDS):
        raise PartError(f"method {name!r}: no part is called {', '.join(sorted(unknown))}; allowed: {listed(KINDS)}")
    _methods[name] = parts


register = SimpleNamespace(method=_register_method, **{kind: partial(_register_part, kind) for kind in KINDS})
"""Decorators by kind, @register.channel_score("name"), for functions that return, higher = more important:

head_score: (heads,); channel_score: (intermediate,); head_selection, channel_selection: the positions to keep, sorted;
allocation: (layers,) the ratio of every layer, or (layers, 2), of its heads and of its channels; recovery: the new
output projection, a pair (weight (hidden, kept), bias (hidden,)) or (scale (hidden,), shift (hidden,)) for the old one,
or None, and a third value, a dict of numbers, is noted in the report (adds_bias=False: its projections get no bias).
register.method("name", kind=part, ...) gives a whole method a name; a kind that is not given is SlimLLM's.
"""


def make_part(kind: str, name: str, function: Callable, options: Mapping | None = None, adds_bias: bool = True) -> Part:
    """A Part; raises PartError for a parameter that is no statistic of this kind, or an option that does not exist."""
    allowed, needs, free = STATISTICS[kind], [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PartError(f"{kind} {name!r}: {parameter} cannot be filled in; name what it needs, one by one")
        if parameter.name in allowed:
            needs.append(parameter.name)
        elif parameter.default is not parameter.empty:
            free.append(parameter.name)
        else:
            raise PartError(
                f"{kind} {name!r} asks for {parameter.name!r}; allowed: {listed(allowed)}, and options with a default"
            )
    if unknown := set(options or {}) - set(free):
        raise PartError(f"{kind} {name!r} has no option {listed(sorted(unknown))}; allowed: {listed(free) or 'none'}")
    part = Part(kind, name, function, tuple(needs), dict(options or {}), adds_bias)
    if set(needs) == {"scores", "num_pruned"}:  # tried at once: a wrong option or shape need not cost minutes
        checked_choice(part, part({"scores": torch.arange(10.0).double(), "num_pruned": 3}), 10, 3, str(part))
    return part


def find_part(kind: str, wanted: str | Callable | Mapping | Part) -> Part:
    """The part by its name, a function as it is, or {"name": ..., option: value}. Raises: PartError if unknown."""
    if isinstance(wanted, Part):
        return wanted
    if callable(wanted):
        known = {part.function: part for (each, _), part in _parts.items() if each == kind}
        return known.get(wanted) or make_part(kind, getattr(wanted, "__name__", type(wanted).__name__), wanted)
    options = {}
    if isinstance(wanted, Mapping):
        options = dict(wanted)
        wanted = options.pop("name", None)
    load_built_in()
    if (kind, wanted) not in _parts:
        names = listed(sorted(name for each, name in _parts if each == kind))
        raise PartError(f"unknown {kind} {wanted!r}; allowed: {names}, or a function")
    part = _parts[kind, wanted]
    return make_part(kind, part.name, part.function, options, part.adds_bias) if options else part


def registered_parts(function: Callable) -> list[Part]:
    """The parts that this function was registered as. Raises: PartError where it was not."""
    found = [part for part in _parts.values() if part.function is function]
    if not found:
        name = getattr(function, "__name__", function)
        raise PartError(f"{name} is not registered: say what it is, {{'channel_score': {name}}}, or register it")
    return found


def as_method(wanted: MethodLike) -> Method:
    """A method by its name ("slimllm", "recommended"), or by what it changes: {"base": "flap", "recovery": mine}.

    A mapping may also hold "base" (the method that is changed; default: slimllm), "name" (default: says what is
    changed) and "tuning" (the fields of a Recipe). A part is a name, a function, or {"name": ..., option: value, ...}.
    A function that was registered as a part stands for SlimLLM with that part.
    Raises: PartError for an unknown method, kind or part, with what is allowed.
    """
    if isinstance(wanted, Method):
        return wanted
    if isinstance(wanted, str):
        wanted = {"base": wanted}
    if callable(wanted):
        wanted = {part.kind: part for part in registered_parts(wanted)}
    changed = dict(wanted)
    base, name, tuning = changed.pop("base", "slimllm"), changed.pop("name", None), changed.pop("tuning", None)
    base = ALIASES.get(base, base)
    try:
        recipe = None if tuning is None else Recipe.model_validate(tuning)
    except ValidationError as error:
        raise PartError(f"tuning of a method: {error}") from error
    if unknown := set(changed) - set(KINDS):
        allowed = listed(["name", "base", "tuning", *KINDS])
        raise PartError(f"a method has no {listed(sorted(map(str, unknown)))}; allowed: {allowed}")
    parts = {kind: find_part(kind, one) for kind, one in (find_method("slimllm") | find_method(base) | changed).items()}
    if name is None:
        name = ", ".join([base, *(f"{kind}={_short(parts[kind])}" for kind in changed), *(["tuned"] if recipe else [])])
    return Method(name, **parts, tuning=recipe)


def find_method(name: str) -> dict[str, object]:
    """The parts of a named method. Raises: PartError for an unknown one (lists the known ones)."""
    load_built_in()
    if name not in _methods:
        raise PartError(f"unknown method {name!r}; allowed: {listed([*method_names(), *ALIASES])}, or a mapping")
    return _methods[name]


def method_names() -> list[str]:
    """All methods that have a name."""
    load_built_in()
    return sorted(_methods)


@cache
def load_built_in() -> None:
    """Import every file of this folder, once."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")


def load_file(path: Path) -> Path:
    """Run a Python file that registers parts of one's own. Raises: PartError naming the file and what went wrong."""
    specification = importlib.util.spec_from_file_location(f"slimllm_nb_parts_{path.stem}", path)
    try:
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        raise PartError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return path


def listed(names) -> str:
    return ", ".join(map(str, names))


def _used(score: Part, selection: Part) -> list[Part]:
    return [score, selection] if "scores" in selection.needs else [selection]


def _short(part: Part) -> str:
    options = ", ".join(f"{name}={value}" for name, value in part.options.items())
    return f"{part.name}({options})" if options else part.name
