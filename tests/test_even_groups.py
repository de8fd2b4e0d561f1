"""Head selections with even_groups, against versions that try every set of heads."""

from collections import Counter
from itertools import combinations

import pytest
import torch

import literal_methods
from conftest import make_small_model
from literal import contributions, literal_similarity
from slimllm_nb import heads
from slimllm_nb.export.even_groups import has_even_groups
from slimllm_nb.methods.even_groups import even_sizes, select_evenly
from slimllm_nb.methods.obs import obs_heads
from slimllm_nb.pruning import prune
from test_heads import case

OWNERS = [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5], [0] * 6]


def even_sets(owner: list[int], number: int) -> list[tuple[int, ...]]:
    """Those with the number of heads that is nearest to `number`; of two, the larger."""
    every = [
        kept
        for count in range(1, len(owner) + 1)
        for kept in combinations(range(len(owner)), count)
        if len(set(Counter(owner[h] for h in kept).values())) == 1
    ]
    nearest = min((abs(len(kept) - number), -len(kept)) for kept in every)
    return [kept for kept in every if (abs(len(kept) - number), -len(kept)) == nearest]


def shape(owner: list[int], kept) -> tuple[int, int]:
    counts = Counter(owner[h] for h in kept)
    return len(counts), max(counts.values())


@pytest.mark.parametrize("owner", OWNERS, ids=str)
@pytest.mark.parametrize("num_pruned", range(6))
def test_choices_are_those_of_every_set_tried(owner, num_pruned):
    """Of each shape, the heads go in turn while a set of that shape is left; then exchanges within such sets."""
    x, weight = case(num_pruned)
    p, owners, everyone = contributions(x, weight), torch.tensor(owner), range(6)
    sets = even_sets(owner, 6 - num_pruned)
    shapes = {shape(owner, kept) for kept in sets}
    assert set(even_sizes(owners, num_pruned)) == shapes

    without = [literal_similarity(p, [g for g in everyone if g != h]) for h in everyone]
    order, similarities, costs = sorted(everyone, key=lambda h: -without[h]), {}, {}
    flat, own = x.flatten(1).double().numpy(), weight.double().numpy()
    for one in shapes:
        ours = [set(kept) for kept in sets if shape(owner, kept) == one]
        left = set(everyone)
        for head in order:
            if any(kept <= left - {head} for kept in ours):
                left.remove(head)
        kept = sorted(left)
        for candidate in [head for head in order if head not in left]:
            tried = [[*kept[:i], candidate, *kept[i + 1 :]] for i in range(len(kept))]
            tried = [kept, *(new for new in tried if set(new) in ours)]
            kept = max(tried, key=lambda new: literal_similarity(p, new))
        similarities[tuple(sorted(kept))] = literal_similarity(p, kept)
        number = 6 - len(kept)
        reachable = lambda gone, ours=ours: any(not kept & set(gone) for kept in ours)  # noqa: E731
        kept = literal_methods.literal_obs(flat, own, 3, number, number, reachable)
        gone = {head * 3 + k for head in set(everyone) - set(kept) for k in range(3)}
        costs[tuple(kept)] = literal_methods.cost_without(literal_methods.damped(flat), own, gone) if gone else 0.0

    covariance = heads.head_covariance(x, weight)
    chosen = select_evenly(covariance, num_pruned, heads.head_importance(covariance), owners)
    assert tuple(chosen.tolist()) == max(similarities, key=similarities.get)
    sigma = torch.cov(x.double().flatten(1).T, correction=0)
    chosen = obs_heads(sigma, weight, 3, num_pruned, owners, even_groups=True)
    assert tuple(chosen.tolist()) == min(costs, key=costs.get)


@pytest.mark.parametrize("method", ["slimllm", "obs_heads_ridge"])
@pytest.mark.parametrize("key_value_heads", [8, 4, 2])
def test_groups_are_even_and_the_target_is_met(method, key_value_heads):
    ids = torch.randint(0, 101, (16, 10), generator=torch.Generator().manual_seed(0))
    model = make_small_model(key_value_heads, num_hidden_layers=6)
    plain = {"pruned_layers": 5, "alpha": 2.0, "target_parameters": 0.7, "target_of": "decoder", "progress": False}
    selection = {"name": "greedy" if method == "slimllm" else "obs", "even_groups": True}
    even, report = prune(model, ids, **plain, method={"base": method, "head_selection": selection})
    uneven, other = prune(model, ids, **plain, method=method)
    assert has_even_groups(even) and report.decoder.share_left == pytest.approx(0.7, abs=0.003)
    if key_value_heads == 8:  # groups of one cannot be uneven
        assert [one.kept_heads for one in report.layers] == [one.kept_heads for one in other.layers]
    else:
        assert not has_even_groups(uneven)
