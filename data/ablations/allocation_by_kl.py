"""Which layers give how much, found by trying: python data/ablations/allocation_by_kl.py [--seeds 3] [--exchanges 240]

From statistics of the dense model, every layer's heads and channels get levels: 0 to all but one of the heads, eighths
of the channels, each with what OBS (heads), SlimLLM (channels) and ridge regression make of it. From SlimLLM's ratios
on, one layer takes a level more and another one of the same kind gives one back, at random; kept when the divergence
KL(dense || pruned) falls on windows that the levels were not made from. Pruned for real with the ratios that are found,
beside SlimLLM's ratios, at equal parameters; what was measured goes to allocation_by_kl.json, seed by seed.
"""

import argparse
import copy
import random
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from slimllm_nb import sources
from slimllm_nb.calibration import embed, layer_context
from slimllm_nb.comparison import protocol_of
from slimllm_nb.comparison.judges import judged_blocks
from slimllm_nb.generated import generate_samples, windows
from slimllm_nb.llama import head_columns, layer_widths
from slimllm_nb.methods import as_method
from slimllm_nb.progress import bar
from slimllm_nb.pruning.budget import PruningTarget, removed_counts
from slimllm_nb.pruning.layer import move_on, recover, statistics_for
from slimllm_nb.pruning.prune import Layers, layer_similarities, walk
from slimllm_nb.pruning.sublayers import Attention, Mlp, Settings
from slimllm_nb.reproduce import load_profile
from trial import measure_seeds, side_by_side

METHOD = {"base": "obs_heads_ridge", "recovery": {"name": "ridge_fixed", "penalty": 0.03}}
EIGHTHS, WINDOWS = 8, 10
JUDGES = ("news", "wikipedia", "hamlet", "debates")
FOUND = Path(__file__).with_suffix(".json")
PLACES = {"heads": ("self_attn", "o_proj"), "channels": ("mlp", "down_proj")}


def counts(kind: str, widths) -> list[int]:
    """How many heads or channels go, by level."""
    if kind == "heads":
        return list(range(widths.heads))
    return [round(widths.channels * level / EIGHTHS) for level in range(EIGHTHS)]


@torch.no_grad()
def level_step(settings: Settings, layer, batches, context, index: int):
    """Output projections of a layer for every level, as wide as before, with zeros where nothing is left."""
    found, method = {}, settings.method
    for kind, parts in (("heads", method.head_parts), ("channels", method.channel_parts)):
        if kind == "heads":
            sublayer = Attention(layer, batches, index, settings, context)
        else:  # on what the attention left
            sublayer = Mlp(layer, batches, index, settings)
        *_, selection, recovery = parts
        statistics = statistics_for(sublayer, parts)
        for level, number in enumerate(counts(kind, layer_widths(layer))):
            weight, bias = sublayer.weight.clone(), sublayer.weight.new_zeros(len(sublayer.weight))
            if number:
                columns = head_columns(selection(statistics | {"num_pruned": number}), sublayer.size)
                new, bias, _ = recover(sublayer, statistics, columns, recovery)
                weight = torch.zeros_like(weight).index_copy_(1, columns, new)
            found |= {f"{kind}.{level}.weight": weight, f"{kind}.{level}.bias": bias}
        move_on(sublayer, sublayer.weight, sublayer.projection.bias)
    return None, found


class Masked:
    """The dense model with levels in the place of output projections; hidden states in front of every layer are kept,
    so that a change costs the layers from there on alone."""

    def __init__(self, model, levels: list[dict], ids: torch.Tensor):
        self.model, self.levels = copy.deepcopy(model), levels
        for layer in self.model.model.layers:
            for module, projection in PLACES.values():
                one = getattr(getattr(layer, module), projection)
                one.bias = nn.Parameter(one.weight.new_zeros(len(one.weight)), requires_grad=False)
        self.hidden = [embed(self.model, ids)] + [None] * len(levels)
        self.context = layer_context(self.model, self.hidden[0])
        self.dense = self.log_probabilities(self.run(0)[-1])

    def set(self, kind: str, layer: int, level: int) -> None:
        module, projection = PLACES[kind]
        one = getattr(getattr(self.model.model.layers[layer], module), projection)
        one.weight.data, one.bias.data = (self.levels[layer][f"{kind}.{level}.{name}"] for name in ("weight", "bias"))

    @torch.no_grad()
    def run(self, start: int) -> list[torch.Tensor]:
        """Hidden states in front of every layer, and behind the last."""
        found = self.hidden[: start + 1]
        for layer in self.model.model.layers[start:]:
            found.append(layer(found[-1], **self.context))
        return found

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """At every second position."""
        return self.model.lm_head(self.model.model.norm(hidden[:, ::2])).flatten(0, 1).log_softmax(-1)

    def divergence(self, hidden: torch.Tensor) -> float:
        """KL(dense || this) per position."""
        other = self.log_probabilities(hidden)
        return nn.functional.kl_div(other, self.dense, log_target=True, reduction="batchmean").item()


def search(
    masked: Masked, levels: dict[str, list[int]], most: dict[str, int], exchanges: int, seed: int
) -> list[float]:
    """Change `levels` in place; returns the divergence at the start and after every exchange that was kept."""
    rng = random.Random(seed)
    for kind, chosen in levels.items():
        for layer, level in enumerate(chosen):
            masked.set(kind, layer, level)
    masked.hidden = masked.run(0)
    best = [masked.divergence(masked.hidden[-1])]
    shown = bar(range(exchanges), desc="exchanges", unit="exchange")
    for _ in shown:
        kind, step = rng.choice(list(levels)), rng.choice((1, 1, 2))
        chosen = levels[kind]
        more = [layer for layer, level in enumerate(chosen) if level + step <= most[kind]]
        less = [layer for layer, level in enumerate(chosen) if level >= step]
        a, b = rng.choice(more), rng.choice(less)
        if a == b:
            continue
        masked.set(kind, a, chosen[a] + step)
        masked.set(kind, b, chosen[b] - step)
        hidden = masked.run(min(a, b))
        if (value := masked.divergence(hidden[-1])) < best[-1]:
            chosen[a], chosen[b], masked.hidden = chosen[a] + step, chosen[b] - step, hidden
            best.append(value)
            shown.set_postfix_str(f"KL {value:.3f}", refresh=False)
        else:
            masked.set(kind, a, chosen[a])
            masked.set(kind, b, chosen[b])
    return best


def start_of(model, setting, similarity: torch.Tensor) -> dict[str, list[int]]:
    """The levels nearest to SlimLLM's ratios."""
    target = PruningTarget(setting.pruning_ratio, None, "model", setting.pruned_layers, setting.alpha)
    plan = target.plan(as_method("obs_heads_ridge"), model, {"similarity": similarity})
    widths, ratios = layer_widths(model.model.layers[0]), plan.layer_ratios.tolist()
    return {
        "heads": [removed_counts(widths, one)[0] for one, _ in ratios],
        "channels": [round(EIGHTHS * one) for _, one in ratios],
    }


def measured(model, setting, samples, others, blocks: dict, exchanges: int, seed: int) -> dict:
    """Search for levels on `others`, then prune for real: perplexities of SlimLLM, and with both kinds of ratios."""
    similarity = layer_similarities(model, samples)
    step = partial(level_step, Settings(as_method(METHOD)))
    levels = [tensors for _, tensors in walk(Layers(model, 8), "levels", step, samples, True)]
    most = {kind: len(counts(kind, layer_widths(model.model.layers[0]))) - 1 for kind in PLACES}
    chosen = start_of(model, setting, similarity)
    divergences = search(Masked(model, levels, others), chosen, most, exchanges, seed)
    found = [[a / (most["heads"] + 1), b / EIGHTHS] for a, b in zip(*chosen.values(), strict=True)]

    def given(pruning_ratio):
        ratios = torch.tensor(found, dtype=torch.float64)
        return ratios * pruning_ratio / ratios.mean()

    ours = {"base": "obs_heads_ridge", "allocation": given}
    row = {"exchanges_kept": len(divergences) - 1, "divergence": [divergences[0], divergences[-1]], "ratios": found}
    methods = [("slimllm", "slimllm"), ("by similarity", "obs_heads_ridge"), ("found", ours)]
    return row | side_by_side(model, setting, samples, similarity, methods, blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--exchanges", type=int, default=240)
    parser.add_argument("--setting", default="50")
    parser.add_argument("--searched-on", choices=["windows", "generated"], default="windows")
    options = parser.parse_args()
    profile = load_profile("embedded")
    protocol, setting = protocol_of(profile, judge_on=JUDGES), profile.settings[options.setting]
    model, tokenizer = sources.load_model(), sources.load_tokenizer()
    texts, blocks = protocol.calibration_texts(), judged_blocks(protocol, {}, tokenizer)

    def of_seed(seed: int) -> dict:
        both = windows(texts, tokenizer, protocol.num_samples + WINDOWS, protocol.length, seed)
        samples, others = both[: protocol.num_samples], both[protocol.num_samples :]
        if options.searched_on == "generated":
            others = generate_samples(model, tokenizer, WINDOWS, protocol.length, seed=10_000 + seed)
        return measured(model, setting, samples, others, blocks, options.exchanges, seed)

    measure_seeds(FOUND, options.seeds, options.setting, of_seed, searched_on=options.searched_on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
