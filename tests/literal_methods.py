"""Rivals and recoveries beyond the paper, as their papers read: loops over weights and tokens. Oracles of the tests."""

import copy

import numpy as np
import torch
from torch import nn

from literal import captured


def literal_method(model, input_ids, counts, choose_heads, choose_channels, mend):
    """A method on a copy of `model` in which what is pruned is set to zero; the model keeps its size.

    counts: for every layer, how many heads and channels go. choose_heads(attention, x, number) and choose_channels(mlp,
    x, a, number) give what is kept; mend(x, weight, columns) gives weight and bias. Returns the copy and what was kept.
    """
    model = copy.deepcopy(model)
    kept_heads, kept_channels = [], []
    for layer, (heads_gone, channels_gone) in zip(model.model.layers, counts, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        x = captured(model, input_ids, attention.o_proj)
        everything = list(range(attention.o_proj.in_features // attention.head_dim))
        kept = sorted(choose_heads(attention, flat(x), heads_gone)) if heads_gone else everything
        if heads_gone:
            columns = [h * attention.head_dim + k for h in kept for k in range(attention.head_dim)]
            rewrite(attention, "o_proj", columns, x, mend)
        kept_heads.append(kept)
        inputs, a = captured(model, input_ids, mlp.gate_proj), captured(model, input_ids, mlp.down_proj)
        kept = list(range(a.shape[-1]))
        if channels_gone:
            kept = sorted(choose_channels(mlp, flat(inputs), flat(a), channels_gone))
            rewrite(mlp, "down_proj", kept, a, mend)
        kept_channels.append(kept)
    return model, kept_heads, kept_channels


def flat(x: torch.Tensor) -> np.ndarray:
    return x.flatten(0, 1).double().numpy()


def numpy(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().double().numpy()


def rewrite(parent, name, columns, x, mend) -> None:
    old = getattr(parent, name)
    weight, bias = mend(x.double().numpy(), numpy(old.weight), columns)
    new = nn.Linear(old.in_features, old.out_features, bias=bias is not None)
    new.weight.data.zero_()
    new.weight.data[:, columns] = torch.tensor(weight).float()
    if bias is not None:
        new.bias.data = torch.tensor(bias).float()
    setattr(parent, name, new)


def highest(scores, number: int) -> list[int]:
    """All but the `number` lowest."""
    return sorted(range(len(scores)), key=lambda i: scores[i])[number:]


# Scores. Heads: (attention, x); channels: (mlp, x, a).


def head_columns(attention, head: int) -> range:
    return range(head * attention.head_dim, (head + 1) * attention.head_dim)


def magnitude_heads(attention, x):
    query, output = numpy(attention.q_proj.weight), numpy(attention.o_proj.weight)
    heads = range(output.shape[1] // attention.head_dim)
    return [
        np.sqrt(sum((query[c] ** 2).sum() + (output[:, c] ** 2).sum() for c in head_columns(attention, h)))
        for h in heads
    ]


def magnitude_channels(mlp, x, a):
    gate, up, down = numpy(mlp.gate_proj.weight), numpy(mlp.up_proj.weight), numpy(mlp.down_proj.weight)
    return [np.sqrt((gate[j] ** 2).sum() + (up[j] ** 2).sum() + (down[:, j] ** 2).sum()) for j in range(len(gate))]


def wanda_column(x, weight, c):
    norm = np.sqrt((x[:, c] ** 2).sum())
    return sum(norm * abs(value) for value in weight[:, c])


def flap_column(x, weight, c):
    fluctuation = ((x[:, c] - x[:, c].mean()) ** 2).mean()
    return fluctuation * sum(value**2 for value in weight[:, c])


def by_head(column):
    def heads(attention, x):
        weight = numpy(attention.o_proj.weight)
        count = weight.shape[1] // attention.head_dim
        return [sum(column(x, weight, c) for c in head_columns(attention, h)) for h in range(count)]

    return heads


def by_channel(column):
    return lambda mlp, x, a: [column(a, numpy(mlp.down_proj.weight), j) for j in range(a.shape[1])]


def norm_product_channels(mlp, x, a):
    gate, up, down = numpy(mlp.gate_proj.weight), numpy(mlp.up_proj.weight), numpy(mlp.down_proj.weight)
    n = [np.sqrt((x[:, k] ** 2).sum()) for k in range(x.shape[1])]
    scores = []
    for j in range(len(gate)):
        through = np.sqrt((a[:, j] ** 2).sum()) * np.sqrt((down[:, j] ** 2).sum())
        terms = [np.sqrt(sum((n[k] * w[j, k]) ** 2 for k in range(len(n)))) for w in (gate, up)]
        scores.append(through + sum(terms))
    return scores


def taylor(dense, input_ids):
    """Head and channel scores of every layer, from gradients that the dense model's own backward() leaves."""
    model = copy.deepcopy(dense)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        model(input_ids, labels=input_ids).loss.backward()
    every_layer = []
    for layer in model.model.layers:
        d = layer.self_attn.head_dim
        s = {name: numpy((p * p.grad).abs()) for name, p in layer.named_parameters()}
        q, k, v, o = (s[f"self_attn.{name}_proj.weight"] for name in "qkvo")
        group = len(q) // len(k)
        heads = []
        for h in range(len(q) // d):
            own, g = range(h * d, (h + 1) * d), h // group
            shared = range(g * d, (g + 1) * d)
            total = sum(q[c].sum() + o[:, c].sum() for c in own)
            heads.append(total + sum(k[c].sum() + v[c].sum() for c in shared) / group)
        gate, up, down = (s[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        every_layer.append((heads, [gate[j].sum() + up[j].sum() + down[:, j].sum() for j in range(len(gate))]))
    return every_layer


# Recoveries: mend(x (samples, length, width), weight (hidden, width), columns) -> weight, bias.


def no_mending(x, weight, columns):
    return weight[:, columns], None


def mean_of_what_is_gone(x, weight, columns):
    gone = [c for c in range(weight.shape[1]) if c not in columns]
    tokens = x.reshape(-1, x.shape[-1])
    return weight[:, columns], (tokens[:, gone] @ weight[:, gone].T).mean(0)


def literal_ridge(tokens, weight, columns, penalty):
    """Least squares on centred tokens with one more equation per kept weight, which asks it to stay as it was."""
    centred = tokens - tokens.mean(0)
    kept = centred[:, columns]
    strength = np.sqrt(penalty * kept.var(0).mean() * len(tokens))
    left = np.concatenate([kept, strength * np.eye(len(columns))])
    new = []
    for row in weight:
        right = np.concatenate([centred @ row, strength * row[columns]])
        new.append(np.linalg.lstsq(left, right, rcond=None)[0])
    new = np.array(new)
    return new, tokens.mean(0) @ weight.T - tokens[:, columns].mean(0) @ new.T


def chosen_ridge(x, weight, columns, penalties=(0.01, 0.03, 0.1, 0.3, 1.0)):
    held_out = np.arange(len(x)) % 8 == 4
    fitted, unseen = (part.reshape(-1, x.shape[-1]) for part in (x[~held_out], x[held_out]))
    errors = []
    for penalty in penalties:
        new, bias = literal_ridge(fitted, weight, columns, penalty)
        errors.append(((unseen[:, columns] @ new.T + bias - unseen @ weight.T) ** 2).sum())
    return literal_ridge(x.reshape(-1, x.shape[-1]), weight, columns, penalties[int(np.argmin(errors))])


# Optimal Brain Surgeon.


def damped(x):
    h = np.cov(x, rowvar=False, bias=True)
    return h + 0.01 * np.trace(h) / len(h) * np.eye(len(h))


def cost_without(h, weight, gone):
    """Half the squared error, in the norm of h, when the columns `gone` are zero and the others are fitted anew."""
    kept = [c for c in range(len(h)) if c not in gone]
    new = np.zeros_like(weight)
    new[:, kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ weight.T).T
    return np.trace((new - weight) @ h @ (new - weight).T) / 2


def literal_obs(x, weight, size, number, rounds, may_go=lambda gone: True):
    """Groups of neighbouring columns, the cheapest first; every cost from a fit of its own."""
    h, gone = damped(x), []
    groups = list(range(weight.shape[1] // size))

    def columns(chosen):
        return {g * size + k for g in chosen for k in range(size)}

    for this_round in range(rounds):
        going = number * (this_round + 1) // rounds - number * this_round // rounds
        costs = {
            g: cost_without(h, weight, columns([*gone, g])) for g in groups if g not in gone and may_go([*gone, g])
        }
        gone += sorted(costs, key=costs.get)[:going]
    return [g for g in groups if g not in gone]
