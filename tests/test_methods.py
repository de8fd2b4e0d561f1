"""Parts of methods: rivals and recoveries against literal oracles, parts of one's own, and the errors."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import literal_methods as literal
from conftest import make_small_model
from literal import contributions, literal_importance, literal_select, literal_similarity
from slimllm_nb.methods import PartError, as_method, method_names, register
from slimllm_nb.methods.flap import global_threshold
from slimllm_nb.methods.gradients import loss_gradients
from slimllm_nb.methods.llm_pruner import middle_layers
from slimllm_nb.methods.obs import remove_groups
from slimllm_nb.methods.ridge import PENALTIES, fit_ridge, ridge
from slimllm_nb.pruning import prune

SETTINGS = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0, "progress": False}


@pytest.fixture
def input_ids(generator):
    return torch.randint(0, 101, (16, 10), generator=generator)


@pytest.fixture(params=[8, 2], ids=["multi-head", "groups-of-4"])
def tiny_model(request):
    """Small enough for oracles that fit every output anew for every candidate."""
    return make_small_model(request.param, hidden_size=24, intermediate_size=30, num_hidden_layers=3)


def wanted_score(heads):
    return lambda attention, x, number: literal.highest(heads(attention, x), number)


def wanted_channels(channels):
    return lambda mlp, x, a, number: literal.highest(channels(mlp, x, a), number)


def literal_greedy(attention, x, number, scores=None):
    p = contributions(torch.tensor(x).unflatten(1, (-1, attention.head_dim)), attention.o_proj.weight.detach())
    if scores is None:
        return literal_select(p, number, greedy=True)
    order = sorted(range(len(p)), key=lambda h: scores[h])
    pruned, kept = order[:number], sorted(order[number:])
    best = literal_similarity(p, kept)
    for candidate in pruned:
        tried = {i: literal_similarity(p, [*kept[:i], candidate, *kept[i + 1 :]]) for i in range(len(kept))}
        position = max(tried, key=tried.get)
        if tried[position] > best:
            best, kept[position] = tried[position], candidate
    return kept


def literal_feature_space(mlp, x, a, number):
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    order = np.argsort(literal_importance(torch.tensor(x), torch.tensor(a), *[w.detach() for w in weights]))
    lowest = round(0.01 * len(order))
    return [*order[:lowest], *order[lowest + number :]]


def literal_norm_product(mlp, x, a, number):
    order = sorted(range(a.shape[1]), key=literal.norm_product_channels(mlp, x, a).__getitem__)
    lowest = round(0.01 * len(order))
    return [*order[:lowest], *order[lowest + number :]]


def obs_heads(attention, x, number):
    return literal.literal_obs(x, literal.numpy(attention.o_proj.weight), attention.head_dim, number, number)


def obs_channels(mlp, x, a, number):
    return literal.literal_obs(a, literal.numpy(mlp.down_proj.weight), 1, number, 16)


ORACLES = {
    "magnitude": (
        wanted_score(literal.magnitude_heads),
        wanted_channels(literal.magnitude_channels),
        literal.no_mending,
    ),
    "wanda_sp": (
        wanted_score(literal.by_head(literal.wanda_column)),
        wanted_channels(literal.by_channel(literal.wanda_column)),
        literal.no_mending,
    ),
    "flap": (
        wanted_score(literal.by_head(literal.flap_column)),
        wanted_channels(literal.by_channel(literal.flap_column)),
        literal.mean_of_what_is_gone,
    ),
    "norm_product": (literal_greedy, literal_norm_product, literal.no_mending),
    "slimllm_ridge": (literal_greedy, literal_feature_space, literal.chosen_ridge),
    "obs_ridge": (obs_heads, obs_channels, literal.chosen_ridge),
}


@torch.no_grad()
@pytest.mark.parametrize("method", ORACLES)
def test_a_method_is_what_its_paper_says(method, tiny_model, input_ids):
    """Which heads and channels stay, each layer on what the pruned ones before give, and the model's function."""
    pruned, report = prune(tiny_model, input_ids, **SETTINGS, method=method, batch_size=5)
    counts = [(one.heads - len(one.kept_heads), one.channels - len(one.kept_channels)) for one in report.layers]
    assert any(heads for heads, _ in counts) and any(channels for _, channels in counts)
    expected, kept_heads, kept_channels = literal.literal_method(tiny_model, input_ids, counts, *ORACLES[method])
    assert [one.kept_heads for one in report.layers] == kept_heads
    assert [one.kept_channels for one in report.layers] == kept_channels
    x, y = pruned(input_ids).logits, expected(input_ids).logits
    assert (x - y).abs().max() <= 1e-5 * y.abs().max()
    assert report.method == method


def test_taylor(small_model, input_ids):
    """LLM-Pruner's scores are those of the dense model, whatever was pruned before."""
    _, report = prune(small_model, input_ids, **SETTINGS, method="llm_pruner")
    for line, (heads, channels) in zip(report.layers, literal.taylor(small_model, input_ids), strict=True):
        assert line.kept_heads == sorted(literal.highest(heads, line.heads - len(line.kept_heads)))
        assert line.kept_channels == sorted(literal.highest(channels, line.channels - len(line.kept_channels)))
    assert min(len(line.kept_heads) for line in report.layers) < 8


def test_gradients_are_those_of_backward(small_model, input_ids):
    before = [parameter.requires_grad for parameter in small_model.parameters()]
    found = loss_gradients(small_model, input_ids, ["mlp.up_proj.weight"], batch_size=5, progress=False)
    assert [parameter.requires_grad for parameter in small_model.parameters()] == before
    assert all(parameter.grad is None for parameter in small_model.parameters())
    small_model(input_ids, labels=input_ids).loss.backward()
    for layer, gradients in zip(small_model.model.layers, found, strict=True):
        torch.testing.assert_close(gradients["mlp.up_proj.weight"], layer.mlp.up_proj.weight.grad, rtol=1e-4, atol=1e-7)


def test_random_follows_the_seed(small_model, input_ids):
    kept = [
        [line.kept_channels for line in prune(small_model, input_ids, **SETTINGS, method="random", seed=seed)[1].layers]
        for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][0] != kept[0][1]


def test_uniform_and_middle_layers():
    ratios = as_method("wanda_sp").allocation({"pruning_ratio": 0.4, "pruned_layers": 15, "num_layers": 30})
    assert ratios.tolist() == pytest.approx([0.2] * 30)
    spared = middle_layers(0.25, 24, 32)
    assert spared.tolist() == pytest.approx([0.0] * 4 + [0.25 * 24 / 26] * 26 + [0.0] * 2)


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.8])
def test_one_threshold_for_the_whole_model(ratio, generator):
    heads = [torch.randn(4, generator=generator).exp().double() for _ in range(3)]
    channels = [10 * torch.randn(n, generator=generator).exp().double() for n in (9, 12, 15)]
    sizes = torch.tensor([50.0, 40.0, 60.0]).double(), torch.tensor([7.0, 7.0, 7.0]).double()
    found = global_threshold(heads, channels, *sizes, ratio, 3, 3)
    units = []
    for half, groups in enumerate((heads, channels)):
        for layer, scores in enumerate(groups):
            mean, deviation = np.mean(scores.numpy()), np.std(scores.numpy(), ddof=1)
            units += [((value - mean) / deviation, half, layer) for value in scores.numpy()]
    wanted, gone = np.zeros((3, 2)), 0.0
    whole = sum(sizes[half][layer].item() for _, half, layer in units)
    for _, half, layer in sorted(units):
        gone += sizes[half][layer].item()
        if gone > ratio * whole:
            break
        wanted[layer, half] += 1 / len((heads, channels)[half][layer])
    np.testing.assert_allclose(found.numpy(), wanted)


@torch.no_grad()
def test_every_method_meets_the_same_budget(input_ids):
    model = make_small_model(4, intermediate_size=300)
    settings = {"target_parameters": 0.7, "target_of": "decoder", "pruned_layers": 4, "alpha": 1.0, "progress": False}
    names = method_names()
    assert {"slimllm", "random", "magnitude", "wanda_sp", "flap", "llm_pruner", "norm_product", "obs_ridge"} <= set(
        names
    )
    for name in names:
        if name == "llm_pruner":  # spares a layer of this shallow model
            continue
        pruned, report = prune(model, input_ids, **settings, method=name)
        assert report.decoder.share_left == pytest.approx(0.7, abs=0.003), name
        assert torch.isfinite(pruned(input_ids).logits).all()


# Ridge and OBS on their own.


def case(seed, tokens=40, width=12, hidden=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 4, generator=g) @ torch.randn(4, width, generator=g) + 0.3 * torch.randn(
        tokens, width, generator=g
    )
    x = (x + torch.randn(width, generator=g)).double()
    return x, torch.randn(hidden, width, generator=g).double()


@pytest.mark.parametrize("penalty", [0.001, 0.1, 10.0])
def test_ridge_is_augmented_least_squares(penalty):
    x, weight = case(0)
    kept = torch.tensor([0, 1, 4, 5, 7, 9, 11])
    covariance = torch.cov(x.T, correction=0)
    new, bias = fit_ridge(covariance, x.mean(0), weight, kept, penalty)
    expected = literal.literal_ridge(x.numpy(), weight.numpy(), kept.tolist(), penalty)
    np.testing.assert_allclose(new.numpy(), expected[0], atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), expected[1], atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_ridge_takes_the_penalty_that_is_best_on_what_is_held_out(seed):
    x, weight = case(seed, tokens=24)
    kept, fitted, held_out = torch.tensor([0, 1, 4, 5, 7, 9, 11]), x[:14], x[14:]
    errors = []
    for penalty in PENALTIES:
        new, bias = map(torch.from_numpy, literal.literal_ridge(fitted.numpy(), weight.numpy(), kept.tolist(), penalty))
        errors.append(((held_out[:, kept] @ new.T + bias - held_out @ weight.T) ** 2).sum(1).mean().item())
    sets = [(torch.cov(one.T, correction=0), one.mean(0)) for one in (x, fitted, held_out)]
    found, _, notes = ridge(*sets[0], *sets[1], *sets[2], weight, kept)
    assert notes["penalty"] == PENALTIES[errors.index(min(errors))]
    torch.testing.assert_close(found, fit_ridge(*sets[0], weight, kept, notes["penalty"])[0])


def test_held_out_samples_choose_different_penalties():
    """Otherwise the comparison above would not have tried the choice."""
    chosen = set()
    for seed in range(6):
        x, weight = case(seed, tokens=24)
        sets = [(torch.cov(one.T, correction=0), one.mean(0)) for one in (x, x[:14], x[14:])]
        chosen.add(ridge(*sets[0], *sets[1], *sets[2], weight, torch.arange(7))[2]["penalty"])
    assert len(chosen) > 1


def test_ridge_between_least_squares_and_the_weights_that_are_left():
    x, weight = case(1)
    kept = torch.arange(8)
    covariance, means = torch.cov(x.T, correction=0), x.mean(0)
    errors = []
    for penalty in (1e-9, 0.01, 0.1, 1.0, 1e9):
        new, bias = fit_ridge(covariance, means, weight, kept, penalty)
        errors.append(((x[:, kept] @ new.T + bias - x @ weight.T) ** 2).sum(1).mean().item())
    assert errors == sorted(errors)
    torch.testing.assert_close(new, weight[:, kept], rtol=1e-6, atol=1e-6)  # of the strongest penalty
    with pytest.raises(ValueError, match="penalty is 0; allowed: above 0"):
        fit_ridge(covariance, means, weight, kept, 0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_obs_costs_are_those_of_fits_anew(size, rounds, seed):
    x, weight = case(seed)
    for number in range(12 // size):
        kept, _ = remove_groups(torch.cov(x.T, correction=0), weight, size, number, rounds)
        assert kept.tolist() == literal.literal_obs(x.numpy(), weight.numpy(), size, number, rounds)


def test_obs_and_ridge_where_inputs_do_not_vary():
    covariance, weight = torch.zeros(6, 6).double(), torch.randn(3, 6).double()
    kept, _ = remove_groups(covariance, weight, 2, 1, 1)
    new, bias = fit_ridge(covariance, torch.ones(6).double(), weight, torch.arange(4), 0.1)
    assert len(kept) == 2
    torch.testing.assert_close(new, weight[:, :4])
    torch.testing.assert_close(bias, weight[:, 4:].sum(1))


def test_ridge_needs_a_sample_to_hold_out(input_ids):
    with pytest.raises(ValueError, match="attention: 3 samples are too few to hold one in 8 out: give at least 5"):
        prune(make_small_model(4), input_ids[:3], **SETTINGS, method="obs_ridge")


# Parts of one's own.


def test_scores_of_your_own(small_model, input_ids):
    def last_heads(output_weight, head_dim):
        return torch.arange(output_weight.shape[1] // head_dim).double()

    def few_channels(input_norms):
        return -torch.arange(len(input_norms)).double()

    settings = {"pruning_ratio": 0.5, "pruned_layers": 4, "alpha": 0.0, "progress": False}
    method = {"head_score": last_heads, "head_selection": "lowest"}
    method |= {"channel_score": few_channels, "channel_selection": "lowest"}
    _, report = prune(small_model, input_ids, method=method, **settings)
    for layer in report.layers:
        assert layer.kept_heads == [4, 5, 6, 7]
        assert layer.kept_channels == list(range(40))
    assert report.method.startswith("slimllm, head_score=last_heads, head_selection=lowest")


@torch.no_grad()
def test_a_head_score_of_your_own_with_the_greedy_search(small_model, input_ids):
    def score(layer_index, output_weight, head_dim):
        return (torch.arange(output_weight.shape[1] // head_dim) * (5 + layer_index) % 8).double()

    _, report = prune(small_model, input_ids, **SETTINGS, method={"head_score": score})
    first = next(layer for layer in report.layers if layer.ratio > 0)
    scores = [h * (5 + first.index) % 8 for h in range(8)]
    hidden = small_model(input_ids, output_hidden_states=True).hidden_states[first.index]
    layer = small_model.model.layers[first.index]
    from slimllm_nb import calibration

    x = calibration.head_inputs(layer, hidden, calibration.layer_context(small_model, hidden)).flatten(1)
    kept = literal_greedy(layer.self_attn, x.double().numpy(), 8 - len(first.kept_heads), scores)
    if all(one.ratio == 0 for one in report.layers[: first.index]):
        assert first.kept_heads == sorted(kept)
    assert sorted(kept) != sorted(literal.highest(scores, 8 - len(first.kept_heads)))


def test_what_a_part_asks_for_is_what_it_gets(small_model, input_ids):
    """On the first layer, against numpy on the activations themselves."""
    seen = {}

    def heads(inputs, input_norms, input_means, input_variances, input_covariance, key_value_owner, head_dim):
        seen.setdefault("heads", (inputs, input_norms, input_means, input_variances, input_covariance))
        assert key_value_owner.tolist() == [h * small_model.config.num_key_value_heads // 8 for h in range(8)]
        return inputs.unflatten(1, (-1, head_dim)).double().norm(dim=(0, 2))

    def channels(inputs, mlp_inputs, input_means, input_variances, mlp_input_norms):
        seen.setdefault("channels", (inputs, mlp_inputs, input_means, input_variances, mlp_input_norms))
        return input_variances

    settings = SETTINGS | {"pruned_layers": 4, "alpha": 0.0}
    prune(small_model, input_ids, **settings, method={"head_score": heads, "channel_score": channels}, batch_size=5)
    x, norms, means, variances, covariance = (one.double().numpy() for one in seen["heads"])
    assert x.shape == (160, 32)
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=0))
    np.testing.assert_allclose(means, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x, rowvar=False, bias=True), atol=1e-12)
    np.testing.assert_allclose(variances, x.var(0))
    a, inputs, means, variances, norms = (one.double().numpy() for one in seen["channels"])
    assert (a.shape, inputs.shape) == ((160, 80), (160, 48))
    np.testing.assert_allclose(means, a.mean(0), atol=1e-12)
    np.testing.assert_allclose(variances, a.var(0))
    np.testing.assert_allclose(norms, np.linalg.norm(inputs, axis=0))


def test_an_allocation_and_a_recovery_of_your_own(small_model, input_ids):
    def first_layers(num_layers):
        return torch.tensor([[0.5, 0.0]] * 2 + [[0.0, 0.25]] * (num_layers - 2))

    def twice(output_weight, kept):
        return 2 * output_weight[:, kept], None

    pruned, report = prune(small_model, input_ids, **SETTINGS, method={"allocation": first_layers, "recovery": twice})
    assert [len(layer.kept_heads) for layer in report.layers] == [4, 4, 8, 8]
    assert [len(layer.kept_channels) for layer in report.layers] == [80, 80, 60, 60]
    kept = [h * 4 + k for h in report.layers[0].kept_heads for k in range(4)]
    new, old = pruned.model.layers[0].self_attn.o_proj, small_model.model.layers[0].self_attn.o_proj
    assert torch.equal(new.weight, 2 * old.weight[:, kept]) and new.bias is None
    assert report.layers[0].similarity is None
    line = report.layers[0]
    assert line.attention_error_after > line.attention_error_before


def test_options_and_names(small_model, input_ids):
    method = {"base": "flap", "recovery": {"name": "ridge_fixed", "penalty": 0.5}, "name": "mine"}
    assert str(as_method(method)).startswith("mine: head_score flap, head_selection lowest")
    assert as_method({"recovery": {"name": "ridge_fixed", "penalty": 0.5}}).name == (
        "slimllm, recovery=ridge_fixed(penalty=0.5)"
    )
    weak, strong = (
        prune(small_model, input_ids, **SETTINGS, method={"recovery": {"name": "ridge_fixed", "penalty": p}})[1]
        for p in (0.001, 10.0)
    )
    first = next(i for i, layer in enumerate(weak.layers) if layer.ratio > 0)
    assert weak.layers[first].attention_error_after < strong.layers[first].attention_error_after


def test_the_recommended_method_says_what_it_is():
    assert as_method("recommended") == as_method("obs_heads_ridge")
    changed = {"head_selection": {"name": "obs", "even_groups": True}}
    assert as_method({"base": "recommended", **changed}) == as_method({"base": "obs_heads_ridge", **changed})


def test_registered_parts():
    @register.channel_score("my_own")
    def score(input_norms):
        return input_norms

    assert as_method({"channel_score": "my_own"}).channel_score.function is score
    register.channel_score("my_own")(lambda input_means: input_means)  # a cell that runs again
    assert as_method({"channel_score": "my_own"}).channel_score.needs == ("input_means",)
    with pytest.raises(PartError, match=r"'norm_product' exists already, in slimllm_nb\.methods\.norm_product"):
        register.channel_score("norm_product")(score)


@pytest.mark.slow
def test_a_name_is_taken_in_a_process_that_has_looked_nothing_up_yet():
    code = "from slimllm_nb.methods import register\nregister.head_score('pearson')(lambda inputs: inputs)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'pearson' exists already, in slimllm_nb.methods.slimllm" in done.stderr


WRONG = {
    "asks": (lambda norms: norms, "channel_score '<lambda>' asks for 'norms'; allowed: inputs, input_norms"),
    "heads only": (lambda head_dim: head_dim, "asks for 'head_dim'"),
    "anything": (lambda **everything: 0, r"\*\*everything cannot be filled in"),
    "shape": (
        lambda input_norms: input_norms[:3],
        r"MLP: channel_score '<lambda>' returned shape \(3,\); allowed: a te",
    ),
    "type": (lambda input_norms: input_norms.tolist(), "returned list; allowed: a tensor"),
    "nan": (lambda input_norms: input_norms * float("nan"), "decoder layer [01], MLP: .*scores that are not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scores(name, input_ids):
    score, message = WRONG[name]
    with pytest.raises(PartError, match=message):
        prune(make_small_model(4), input_ids, **SETTINGS, method={"channel_score": score})


WRONG_PARTS = {
    "selection count": ("channel_selection", lambda scores, num_pruned: torch.arange(3), r"allowed: 7 different pos"),
    "selection order": (
        "head_selection",
        lambda scores, num_pruned, layer_index: scores.argsort()[num_pruned:].sort(descending=True).values,
        "attention: head_selection '<lambda>' returned shape",
    ),
    "allocation shape": ("allocation", lambda: torch.ones(3), r"returned \(3,\); allowed: \(4,\), or \(4, 2\)"),
    "allocation sign": ("allocation", lambda num_layers: -torch.ones(num_layers), "finite ratios, not negative"),
    "recovery type": (
        "recovery",
        lambda: 3,
        "recovery '<lambda>' returned int; allowed: a pair of tensors .and a dict of notes., None",
    ),
    "recovery shape": ("recovery", lambda kept: (torch.ones(3, 3), torch.ones(3)), r"shapes \(3, 3\), \(3,\); allowed"),
    "recovery nan": (
        "recovery",
        lambda output_weight, kept: (output_weight[:, kept] * float("nan"), None),
        "returned values that are not finite",
    ),
    "option": (
        "recovery",
        {"name": "ridge_fixed", "lambda": 1},
        "'ridge_fixed' has no option lambda; allowed: penalty",
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_wrong_parts(name, input_ids):
    kind, part, message = WRONG_PARTS[name]
    with pytest.raises(PartError, match=message):
        prune(make_small_model(4), input_ids, **SETTINGS, method={kind: part})


def test_a_partial_is_a_part(input_ids):
    from slimllm_nb.methods.ridge import ridge_fixed

    _, report = prune(
        make_small_model(4), input_ids, **SETTINGS, method={"recovery": partial(ridge_fixed, penalty=2.0)}
    )
    assert any(layer.mlp_error_after for layer in report.layers)
