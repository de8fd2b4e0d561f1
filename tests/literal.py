"""The method as the paper and the authors' code read: slow, literal, obviously right. The oracle of the tests.

Nothing here is shared with the package. Sums are recomputed from activations for every candidate, every output is
fitted by its own numpy.polyfit, and after every step the whole model runs again to see what comes out of it.
"""

import copy
import math

import numpy as np
import torch
from torch import nn


def contributions(head_inputs: torch.Tensor, output_weight: torch.Tensor) -> np.ndarray:
    """P_h = X_h W_O^h: (heads, tokens, hidden)."""
    _, count, head_dim = head_inputs.shape
    by_head = output_weight.double().reshape(-1, count, head_dim)
    return np.stack([(head_inputs[:, h].double() @ by_head[:, h].T).numpy() for h in range(count)])


def literal_similarity(p: np.ndarray, kept) -> float:
    """Sum over outputs of |numpy.corrcoef| of the kept heads' sum and the sum of all; 0 for what does not vary."""
    kept_sum, full = p[list(kept)].sum(0), p.sum(0)
    total = 0.0
    for j in range(full.shape[1]):
        if np.ptp(kept_sum[:, j]) > 0 and np.ptp(full[:, j]) > 0:
            total += abs(np.corrcoef(kept_sum[:, j], full[:, j])[0, 1])
    return total


def literal_select(p: np.ndarray, num_pruned: int, greedy: bool) -> list[int]:
    """Algorithm 1 as it reads: lists of heads, sim recomputed for every exchange."""
    everyone = range(len(p))
    without = [literal_similarity(p, [g for g in everyone if g != h]) for h in everyone]
    removal_order = sorted(everyone, key=lambda h: -without[h])
    pruned, kept = removal_order[:num_pruned], sorted(removal_order[num_pruned:])
    if greedy:
        best = literal_similarity(p, kept)
        for candidate in pruned:
            position_of_best = None
            for position in range(len(kept)):
                exchanged = [*kept[:position], candidate, *kept[position + 1 :]]
                value = literal_similarity(p, exchanged)
                if value > best:
                    best, position_of_best = value, position
            if position_of_best is not None:
                kept[position_of_best] = candidate
    return sorted(kept)


def literal_importance(inputs, activations, gate, up, down) -> np.ndarray:
    inputs, activations, gate, up, down = (t.double().numpy() for t in (inputs, activations, gate, up, down))
    w_down = down.T  # (intermediate, hidden), as the paper writes it
    y = activations @ w_down
    centred = y - y.mean(0)
    variances, q = np.linalg.eig(centred.T @ centred)  # unsymmetric, as in the authors' code
    order = np.argsort(variances.real)
    variances, q = variances.real[order], q.real[:, order]
    weights = [1 / (1 + math.exp(-m / variances.mean())) for m in variances]
    n = [np.sqrt((inputs[:, k] ** 2).sum()) for k in range(inputs.shape[1])]
    result = []
    for j in range(w_down.shape[0]):
        rotated = [sum(w_down[j, k] * q[k, i] for k in range(len(q))) for i in range(len(q))]
        direction = math.sqrt(sum((r * c) ** 2 for r, c in zip(rotated, weights, strict=True)))
        gate_term = math.sqrt(sum((a * b) ** 2 for a, b in zip(n, gate[j], strict=True)))
        up_term = math.sqrt(sum((a * b) ** 2 for a, b in zip(n, up[j], strict=True)))
        result.append(math.sqrt((activations[:, j] ** 2).sum()) * direction + gate_term + up_term)
    return np.array(result)


def literal_prune(model, input_ids, pruning_ratio, pruned_layers, alpha, greedy=True, keep_lowest=0.01, recover=True):
    """SlimLLM on a copy of `model` in which what is pruned is set to zero; the model keeps its size.

    Returns the copy, and the kept heads and channels of every layer.
    """
    model = copy.deepcopy(model)
    hidden = model(input_ids, output_hidden_states=True).hidden_states
    # The last entry is behind the final norm; what leaves the last layer is what enters that norm.
    last = captured(model, input_ids, model.model.norm)
    pairs = list(zip(hidden[:-1], [*hidden[1:-1], last], strict=True))
    similarity = [nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean().item() for a, b in pairs]
    chosen = sorted(range(len(pairs)), key=lambda i: -similarity[i])[:pruned_layers]
    total = sum(math.exp(alpha * similarity[i]) for i in chosen)
    kept_heads, kept_channels = [], []
    for i, layer in enumerate(model.model.layers):
        ratio = pruning_ratio * pruned_layers * math.exp(alpha * similarity[i]) / total if i in chosen else 0.0
        attention, mlp = layer.self_attn, layer.mlp
        count = attention.o_proj.in_features // attention.head_dim
        x = captured(model, input_ids, attention.o_proj).flatten(0, 1).view(-1, count, attention.head_dim)
        kept = literal_select(contributions(x, attention.o_proj.weight), min(round(ratio * count), count - 1), greedy)
        positions = [h * attention.head_dim + k for h in kept for k in range(attention.head_dim)]
        keep_columns(attention, "o_proj", positions, x.flatten(1), recover)
        kept_heads.append(kept)

        inputs = captured(model, input_ids, mlp.gate_proj).flatten(0, 1)
        a = captured(model, input_ids, mlp.down_proj).flatten(0, 1)
        weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        kept = literal_keep_lowest(literal_importance(inputs, a, *weights), ratio, keep_lowest)
        keep_columns(mlp, "down_proj", kept, a, recover)
        kept_channels.append(kept)
    return model, kept_heads, kept_channels


def captured(model, input_ids, module) -> torch.Tensor:
    """What enters `module` when the whole model runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(input_ids)
    handle.remove()
    return seen[0]


def keep_columns(parent, name: str, kept: list[int], inputs: torch.Tensor, recover: bool) -> None:
    """Set all other columns of the projection to zero; with `recover`, fit every output and fold the fit in."""
    old = getattr(parent, name)
    if len(kept) == old.in_features:
        return
    new = nn.Linear(old.in_features, old.out_features, bias=recover or old.bias is not None)
    for parameter in new.parameters():
        parameter.data.zero_()
    new.weight.data[:, kept] = old.weight.data[:, kept]
    if recover:
        x = (inputs.double() @ new.weight.double().T).numpy()
        y = (inputs.double() @ old.weight.double().T).numpy()
        for j in range(old.out_features):
            scale, shift = np.polyfit(x[:, j], y[:, j], 1)
            new.weight.data[j] *= scale
            new.bias.data[j] = shift
    if old.bias is not None:
        new.bias.data += old.bias.data
    setattr(parent, name, new)


def literal_regression(inputs, weight, kept) -> tuple[torch.Tensor, torch.Tensor]:
    """A numpy.polyfit for every output; the kept columns' weight and the bias with the fit folded in."""
    full = (inputs.double() @ weight.double().T).numpy()
    left = (inputs[:, kept].double() @ weight[:, kept].double().T).numpy()
    new, bias = weight[:, kept].clone(), torch.zeros(len(weight))
    for j in range(len(weight)):
        scale, shift = np.polyfit(left[:, j], full[:, j], 1)
        new[j] *= scale
        bias[j] = shift
    return new, bias


def literal_channels(inputs, activations, gate, up, down) -> np.ndarray:
    """literal_importance with products of matrices in the place of its loops, as in the authors' code."""
    inputs, activations, gate, up, down = (t.double().numpy() for t in (inputs, activations, gate, up, down))
    y = activations @ down.T
    centred = y - y.mean(0)
    variances, q = np.linalg.eig(centred.T @ centred)
    weights = 1 / (1 + np.exp(-variances.real / variances.real.mean()))
    direction = np.linalg.norm((down.T @ q.real) * weights, axis=1)
    n = np.linalg.norm(inputs, axis=0)
    others = np.linalg.norm(n * gate, axis=1) + np.linalg.norm(n * up, axis=1)
    return np.linalg.norm(activations, axis=0) * direction + others


def literal_keep_lowest(importance, ratio: float, keep_lowest: float) -> list[int]:
    """The channels that stay: the lowest `keep_lowest` of all, and all above those that go."""
    order = np.argsort(importance, kind="stable").tolist()
    removed = min(round(ratio * len(order)), len(order) - 1)
    lowest = min(round(keep_lowest * len(order)), len(order) - removed)
    return sorted(order[:lowest] + order[lowest + removed :])
