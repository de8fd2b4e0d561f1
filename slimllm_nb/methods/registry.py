"""Parts by name: what kinds there are, what each may ask for, and how one of your own gets its name.

A part is a plain function. The names of its parameters say what it needs; pruning gathers that and nothing else:

    @register.channel_score("activation_times_weight")
    def score(input_norms, output_weight):
        return input_norms * output_weight.norm(dim=0)

A parameter that is not one of the names below needs a default and is an option: {"channel_score": {"name": "mine",
"power": 2}}. Scores: higher = more important. Everything that is summed over tokens is float64.
"""

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

KINDS = ("head_score", "channel_score", "head_selection", "channel_selection", "allocation", "recovery")

_HALF = {
    "inputs": "(tokens, width): what enters the output projection, o_proj or down_proj",
    "input_norms": "(width,): L2 norms of the columns of `inputs` over all tokens",
    "input_means": "(width,): their means",
    "input_variances": "(width,): their variances, divided by the number of tokens",
    "input_covariance": "(width, width): their covariance, divided by the number of tokens",
    "output_scatter": "(hidden, hidden): (Y - mean)'(Y - mean) of what leaves the output projection",
    "output_weight": "(hidden, width): weight of o_proj or down_proj, as in nn.Linear",
    "output_gradient": "(hidden, width): gradient of the dense model's mean loss with respect to it",
    "layer_index": "int: which decoder layer",
    "generator": "torch.Generator on the CPU, seeded by prune()'s seed, the layer and the half",
}
_HEADS = {
    "contribution_covariance": "(hidden, heads, heads): covariance of the heads' contributions to every output",
    "query_weight": "(heads * head_dim, hidden)",
    "key_weight": "(key_value_heads * head_dim, hidden)",
    "value_weight": "(key_value_heads * head_dim, hidden)",
    "query_gradient": "as query_weight",
    "key_gradient": "as key_weight",
    "value_gradient": "as value_weight",
    "key_value_owner": "(heads,): the key/value head that each query head reads",
    "head_dim": "int: width of a head; `inputs` has heads * head_dim columns, head by head",
}
_CHANNELS = {
    "mlp_inputs": "(tokens, hidden): what enters the MLP",
    "mlp_input_norms": "(hidden,): L2 norms of its columns",
    "gate_weight": "(intermediate, hidden)",
    "up_weight": "(intermediate, hidden)",
    "gate_gradient": "as gate_weight",
    "up_gradient": "as up_weight",
}
_CHOICE = {
    "scores": "(heads,) or (intermediate,): what the score gave",
    "num_pruned": "int: how many heads or channels go",
}
_RECOVERY = {
    "kept": "(kept,): the columns of `output_weight` that stay",
    "moments": "regression.Moments of the kept part's output and the full one",
    "fitted_covariance": "(width, width): input_covariance of seven in eight samples",
    "fitted_means": "(width,): input_means of seven in eight samples",
    "held_out_covariance": "(width, width): input_covariance of every eighth sample",
    "held_out_means": "(width,): input_means of every eighth sample",
}
_ALLOCATION = {
    "similarity": "(layers,): cosine similarity between a dense layer's input and output (ratios.layer_similarity)",
    "pruning_ratio": "float: mean ratio over `pruned_layers` layers",
    "pruned_layers": "int",
    "alpha": "float: how strongly the layers differ (ratios.allocate)",
    "num_layers": "int: decoder layers",
    "head_scores": "list of (heads,): the head scores of the dense model, layer by layer",
    "channel_scores": "list of (intermediate,): the channel scores of the dense model, layer by layer",
    "head_parameters": "(layers,): parameters that go with one head, key/value heads shared out",
    "channel_parameters": "(layers,): parameters that go with one channel",
}
QUANTITIES: dict[str, dict[str, str]] = {
    "head_score": _HALF | _HEADS,
    "channel_score": _HALF | _CHANNELS,
    "head_selection": _HALF | _HEADS | _CHOICE,
    "channel_selection": _HALF | _CHANNELS | _CHOICE,
    "allocation": _ALLOCATION,
    "recovery": _HALF | _RECOVERY,
}
"""What a part of each kind may ask for by the names of its parameters."""


class PartError(ValueError):
    """A part, or a method, that does not exist or does not do what its kind must."""


@dataclass(frozen=True)
class Part:
    """One function with its kind, its name, the quantities it needs and its options."""

    kind: str
    name: str
    function: Callable
    needs: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    adds_bias: bool = True  # a recovery: whether the projections that it works on get a bias

    def __call__(self, quantities: Mapping[str, object]):
        return self.function(**{name: quantities[name] for name in self.needs}, **self.options)

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


_parts: dict[tuple[str, str], Part] = {}
_methods: dict[str, dict[str, object]] = {}


class Register:
    """`register.head_score("name")` and its like for every kind are decorators; `register.method` names a method."""

    def head_score(self, name: str):
        """(heads,) importance of every query head."""
        return self._decorator("head_score", name)

    def channel_score(self, name: str):
        """(intermediate,) importance of every channel."""
        return self._decorator("channel_score", name)

    def head_selection(self, name: str):
        """(kept,) the heads to keep, sorted."""
        return self._decorator("head_selection", name)

    def channel_selection(self, name: str):
        """(kept,) the channels to keep, sorted."""
        return self._decorator("channel_selection", name)

    def allocation(self, name: str):
        """(layers,) the ratio of every layer, or (layers, 2): of its heads and of its channels."""
        return self._decorator("allocation", name)

    def recovery(self, name: str, adds_bias: bool = True):
        """The new output projection: a pair (weight (hidden, kept), bias (hidden,)), or a pair (scale (hidden,), shift
        (hidden,)) for the old one, or None: as it is. A third value, a dict of numbers, is noted in the report."""
        return self._decorator("recovery", name, adds_bias)

    def method(self, name: str, **parts) -> None:
        """Give a whole method a name; a kind that is not given is SlimLLM's."""
        if unknown := set(parts) - set(KINDS):
            raise PartError(
                f"method {name!r}: no part is called {', '.join(sorted(unknown))}; allowed: {listed(KINDS)}"
            )
        _methods[name] = parts

    def _decorator(self, kind: str, name: str, adds_bias: bool = True):
        def registered(function: Callable) -> Callable:
            known = _parts.get((kind, name))
            # A notebook's cell may run again; what the package brings keeps its name.
            if known and known.function.__module__ != function.__module__:
                raise PartError(f"{kind} {name!r} exists already, in {known.function.__module__}: choose another name")
            _parts[kind, name] = make_part(kind, name, function, adds_bias=adds_bias)
            return function

        return registered


register = Register()


def make_part(kind: str, name: str, function: Callable, options: Mapping | None = None, adds_bias: bool = True) -> Part:
    """A Part; raises PartError for a parameter that is no quantity of this kind, or an option that does not exist."""
    allowed, needs, free = QUANTITIES[kind], [], []
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
    """The part of this kind by its name, a function as it is, or {"name": ..., option: value, ...}.

    Raises: PartError for an unknown name (lists the known ones).
    """
    if isinstance(wanted, Part):
        return wanted
    if callable(wanted):
        known = {part.function: part for (each, _), part in _parts.items() if each == kind}
        return known.get(wanted) or make_part(kind, getattr(wanted, "__name__", type(wanted).__name__), wanted)
    options = {}
    if isinstance(wanted, Mapping):
        options = dict(wanted)
        wanted = options.pop("name", None)
    if (kind, wanted) not in _parts:
        load_built_in()
    if (kind, wanted) not in _parts:
        names = sorted(name for each, name in _parts if each == kind)
        raise PartError(f"unknown {kind} {wanted!r}; allowed: {listed(names)}, or a function")
    part = _parts[kind, wanted]
    return make_part(kind, part.name, part.function, options, part.adds_bias) if options else part


def registered_parts(function: Callable) -> list[Part]:
    """The parts that this function was registered as. Raises: PartError where it was not."""
    found = [part for part in _parts.values() if part.function is function]
    if not found:
        name = getattr(function, "__name__", function)
        raise PartError(f"{name} is not registered: say what it is, {{'channel_score': {name}}}, or register it")
    return found


def find_method(name: str) -> dict[str, object]:
    """The parts of a named method. Raises: PartError for an unknown one (lists the known ones)."""
    if name not in _methods:
        load_built_in()
    if name not in _methods:
        raise PartError(f"unknown method {name!r}; allowed: {listed(method_names())}, or a mapping of parts")
    return _methods[name]


def method_names() -> list[str]:
    """All methods that have a name."""
    load_built_in()
    return sorted(_methods)


def load_built_in() -> None:
    """Import every file of this folder."""
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


def checked_scores(part: Part, scores, count: int, where: str) -> torch.Tensor:
    """Raises: PartError unless a score for each, all finite."""
    if not isinstance(scores, torch.Tensor) or scores.shape != (count,):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise PartError(f"{where}: {part} returned {found}; allowed: a tensor of shape ({count},), a score for each")
    if not torch.isfinite(scores).all():
        raise PartError(f"{where}: {part} returned scores that are not finite")
    return scores


def checked_choice(part: Part, kept, count: int, num_pruned: int, where: str) -> torch.Tensor:
    """Raises: PartError unless `count - num_pruned` different positions, sorted."""
    wanted = count - num_pruned
    right = isinstance(kept, torch.Tensor) and kept.shape == (wanted,) and not kept.is_floating_point()
    if not right or kept.min() < 0 or kept.max() >= count or (kept.diff() <= 0).any():
        found = f"shape {tuple(kept.shape)}" if isinstance(kept, torch.Tensor) else type(kept).__name__
        raise PartError(
            f"{where}: {part} returned {found}: {kept}; allowed: {wanted} different positions of {count}, sorted"
        )
    return kept


def checked_allocation(part: Part, found, layers: int) -> torch.Tensor:
    """In float64 on the CPU. Raises: PartError unless a ratio, or two, for every layer, finite and not negative."""
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape not in ((layers,), (layers, 2)):
        raise PartError(f"{part} returned {shape}; allowed: ({layers},), or ({layers}, 2) for heads, channels")
    if not torch.isfinite(found).all() or (found < 0).any():
        raise PartError(f"{part} returned {found.tolist()}; allowed: finite ratios, not negative")
    return found.double().cpu()


def checked_recovery(
    part: Part, result, weight: torch.Tensor, kept: int, where: str
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
