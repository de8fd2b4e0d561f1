"""prune() against the literal method on a model that keeps its size, and against what it promises."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from conftest import make_small_model
from literal import literal_prune
from slimllm_nb import calibration
from slimllm_nb.calibration import draw_samples
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.pruning import layer_similarities, prune, sublayers
from slimllm_nb.sources import load_model, load_texts, load_tokenizer

SETTINGS = {"pruning_ratio": 0.4, "pruned_layers": 3, "alpha": 2.0}


@pytest.fixture
def input_ids(generator):
    return torch.randint(0, 101, (12, 10), generator=generator)


def same_function(a, b, input_ids):
    """Two ways to compute the same function: within 1e-5 relative in float32."""
    x, y = a(input_ids).logits, b(input_ids).logits
    assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"greedy": False},
        {"recover": False},
        {"keep_lowest": 0.1},
        {"pruning_ratio": 0.7, "pruned_layers": 4, "alpha": 0.0},
    ],
    ids=str,
)
def test_prune_equals_the_literal_method(small_model, input_ids, options):
    settings = SETTINGS | options
    literal, kept_heads, kept_channels = literal_prune(small_model, input_ids, **settings)
    method = {
        "head_selection": "greedy" if settings.pop("greedy", True) else "lowest",
        "channel_selection": {"name": "keep_lowest", "keep_lowest": settings.pop("keep_lowest", 0.01)},
        "recovery": "regression" if settings.pop("recover", True) else "none",
    }
    pruned, report = prune(small_model, input_ids, **settings, method=method, progress=False)
    assert [layer.kept_heads for layer in report.layers] == kept_heads
    assert [layer.kept_channels for layer in report.layers] == kept_channels
    same_function(pruned, literal, input_ids)


@torch.no_grad()
def test_a_model_with_biases_of_its_own(input_ids):
    model = make_small_model(4, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    pruned, report = prune(model, input_ids, **SETTINGS, progress=False)
    # Zeroed in the dense model by hand, with the report's choice and the pruned model's own output projections.
    zeroed = copy.deepcopy(model)
    for new, old, layer in zip(pruned.model.layers, zeroed.model.layers, report.layers, strict=True):
        columns = [h * 4 + k for h in layer.kept_heads for k in range(4)]
        for projection, source, kept in (
            (old.self_attn.o_proj, new.self_attn.o_proj, columns),
            (old.mlp.down_proj, new.mlp.down_proj, layer.kept_channels),
        ):
            projection.weight.zero_()
            projection.weight[:, kept] = source.weight
            projection.bias.copy_(source.bias)
    same_function(pruned, zeroed, input_ids)
    first = next(layer for layer in report.layers if layer.attention_error_after is not None)
    assert first.attention_error_after < first.attention_error_before


@torch.no_grad()
def test_ratio_zero_is_the_same_model(small_model, input_ids):
    pruned, report = prune(small_model, input_ids, pruning_ratio=0, pruned_layers=3, alpha=1, progress=False)
    assert torch.equal(pruned(input_ids).logits, small_model(input_ids).logits)
    assert count_parameters(pruned) == count_parameters(small_model)
    assert report.model.share_left == 1.0
    assert all(layer.kept_heads == list(range(8)) and layer.mlp_error_before is None for layer in report.layers)


def test_the_model_that_came_in_is_not_changed(small_model, input_ids):
    before = copy.deepcopy(small_model.state_dict())
    pruned, _ = prune(small_model, input_ids, **SETTINGS, progress=False)
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    addresses = {p.data_ptr() for p in small_model.parameters()}
    assert not addresses & {p.data_ptr() for p in pruned.parameters()}


@pytest.mark.parametrize("changed", ["memory", {"batch_size": 5}, {"batch_size": 100}], ids=str)
def test_batches_and_memory_do_not_change_the_answer(small_model, input_ids, changed, monkeypatch):
    pruned, report = prune(small_model, input_ids, **SETTINGS, progress=False)
    if changed == "memory":
        monkeypatch.setattr(sublayers, "activation_limit", lambda layer: 0)
        changed = {}
    other, other_report = prune(small_model, input_ids, **SETTINGS, **changed, progress=False)
    for a, b in zip(report.layers, other_report.layers, strict=True):
        assert (a.kept_heads, a.kept_channels) == (b.kept_heads, b.kept_channels)
        assert a.mlp_error_after == pytest.approx(b.mlp_error_after)
    same_function(other, pruned, input_ids)


def test_same_input_same_result(small_model, input_ids):
    first, _ = prune(small_model, input_ids, **SETTINGS, progress=False)
    second, _ = prune(small_model, input_ids, **SETTINGS, progress=False)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_report(small_model, input_ids):
    pruned, report = prune(small_model, input_ids, **SETTINGS, progress=False)
    assert report.model.after == sum(p.numel() for p in pruned.parameters())
    assert report.decoder.after == sum(p.numel() for p in pruned.model.layers.parameters())
    assert report.model.before - report.model.after == report.decoder.before - report.decoder.after
    ratios = [layer.ratio for layer in report.layers]
    assert sorted(ratios)[0] == 0.0 and sum(ratios) / 3 == pytest.approx(0.4)
    for layer, module in zip(report.layers, pruned.model.layers, strict=True):
        assert module.self_attn.q_proj.out_features == 4 * len(layer.kept_heads)
        assert module.self_attn.k_proj.out_features == 4 * len(layer.kept_key_value_heads)
        assert module.mlp.gate_proj.out_features == len(layer.kept_channels)
        group = 8 // small_model.config.num_key_value_heads
        assert sorted({h // group for h in layer.kept_heads}) == layer.kept_key_value_heads
        if layer.ratio:
            assert layer.attention_error_after <= layer.attention_error_before
            assert layer.mlp_error_after <= layer.mlp_error_before
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_a_ratio_that_takes_everything_is_clipped_and_said(small_model, input_ids):
    settings = {"pruning_ratio": 0.6, "pruned_layers": 4, "alpha": 300.0}
    pruned, report = prune(small_model, input_ids, **settings, progress=False)
    clipped = [layer for layer in report.layers if layer.clipped]
    assert clipped and all(len(layer.kept_heads) == 1 and len(layer.kept_channels) == 1 for layer in clipped)
    assert f"layers {[layer.index for layer in clipped]}" in str(report)
    assert torch.isfinite(pruned(input_ids).logits).all()


def test_pruning_again(small_model, input_ids):
    once, _ = prune(small_model, input_ids, **SETTINGS, progress=False)
    same, _ = prune(once, input_ids, pruning_ratio=0, pruned_layers=3, alpha=1.0, progress=False)
    assert torch.equal(same(input_ids).logits, once(input_ids).logits)
    twice, report = prune(once, input_ids, **SETTINGS, progress=False)
    with torch.no_grad():
        literal, kept_heads, kept_channels = literal_prune(once, input_ids, **SETTINGS)
    assert [layer.kept_heads for layer in report.layers] == kept_heads
    assert [layer.kept_channels for layer in report.layers] == kept_channels
    same_function(twice, literal, input_ids)
    assert count_parameters(twice)["model"] < count_parameters(once)["model"]


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("target", [0.9, 0.75, 0.6])
def test_target(part, target, input_ids):
    model = make_small_model(4, intermediate_size=300)
    settings = {"target_parameters": target, "target_of": part, "pruned_layers": 4, "alpha": 1.0}
    pruned, report = prune(model, input_ids, **settings, progress=False)
    assert count_parameters(pruned)[part] / count_parameters(model)[part] == pytest.approx(target, abs=0.003)
    assert getattr(report, part).share_left == pytest.approx(target, abs=0.003)
    assert (report.target_parameters, report.target_of) == (target, part)


@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("options", [{}, {"method": {"recovery": "none"}}, {"alpha": 40.0}], ids=str)
def test_target_with_heads_of_every_kind(key_value_heads, options, input_ids):
    model = make_small_model(key_value_heads, intermediate_size=300)
    for target in (0.95, 0.85, 0.75):
        settings = {"target_parameters": target, "target_of": "decoder", "pruned_layers": 3, "alpha": 1.0} | options
        _, report = prune(model, input_ids, **settings, progress=False)
        # Exact to half a channel of the last pruned layer: 72 of 190,000 parameters.
        assert report.decoder.share_left == pytest.approx(target, abs=0.0005)


@pytest.mark.slow
def test_targets_of_the_embedded_model():
    """Nine heads that share three key/value heads: the steps that a target has to get over."""
    model, tokenizer = load_model(), load_tokenizer()
    samples = draw_samples(load_texts("news", "calibration"), tokenizer, 2, 64)
    similarity = layer_similarities(model, samples, progress=False)
    for target in (0.9, 0.8, 0.7, 0.6, 0.5):
        settings = {"target_parameters": target, "target_of": "decoder", "pruned_layers": 28, "alpha": 7.0}
        pruned, report = prune(model, samples, **settings, similarity=similarity, progress=False)
        assert report.decoder.share_left == pytest.approx(target, abs=0.0003)
        assert count_parameters(pruned)["decoder"] == report.decoder.after


BAD = {
    "negative": ({"pruning_ratio": -0.1}, "pruning_ratio is -0.1; allowed: 0"),
    "one": ({"pruning_ratio": 1}, "pruning_ratio is 1; allowed"),
    "more than one": ({"pruning_ratio": 1.2}, "pruning_ratio is 1.2; allowed"),
    "layers": ({"pruned_layers": 5}, "pruned_layers is 5; allowed: 0 to 4"),
    "both": ({"target_parameters": 0.8}, "pruning_ratio is 0.4 and target_parameters is 0.8: give exactly one"),
    "neither": ({"pruning_ratio": None}, "give exactly one"),
    "target": (
        {"pruning_ratio": None, "target_parameters": 0.01},
        "target_parameters is 0.01 of the model, but at least",
    ),
    "target range": ({"pruning_ratio": None, "target_parameters": 1.5}, "target_parameters is 1.5; allowed"),
    "target of": (
        {"pruning_ratio": None, "target_parameters": 0.8, "target_of": "head"},
        "target_of is 'head'; allowed",
    ),
    "batch": ({"batch_size": 0}, "batch_size is 0; allowed"),
    "keep_lowest": (
        {"method": {"channel_selection": {"name": "keep_lowest", "keep_lowest": 1.0}}},
        "keep_lowest is 1.0; allowed",
    ),
    "method": ({"method": "flapp"}, "unknown method 'flapp'; allowed: .*slimllm"),
    "part": ({"method": {"recovery": "rigde"}}, "unknown recovery 'rigde'; allowed: .*regression, .*or a function"),
    "kind": (
        {"method": {"chanel_score": "norm_product"}},
        "a method has no chanel_score; allowed: name, base, tuning, head_score",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name, input_ids):
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        prune(make_small_model(4), input_ids, **(SETTINGS | changed), progress=False)


@pytest.mark.parametrize("name", sorted(set(BAD) - {"target"}))
def test_bad_settings_are_refused_before_the_first_forward_pass(name, input_ids, monkeypatch):
    def embedded(*_):
        raise AssertionError("the model was run")

    monkeypatch.setattr(calibration, "embed", embedded)
    test_bad_settings(name, input_ids)


def test_samples_longer_than_the_models_limit(input_ids):
    with pytest.raises(ValueError, match="a sample of input_ids has 10 tokens; the model's limit is 9"):
        prune(make_small_model(4, max_position_embeddings=9), input_ids, **SETTINGS)


def test_bad_tokens(unchecked, input_ids):
    model = make_small_model(4)
    with pytest.raises(ValueError, match="holds tokens 0 to 500; allowed: 0 to 100: the tokenizer does not fit"):
        prune(model, torch.tensor([[0, 500]]), **SETTINGS)
    with pytest.raises(ValueError, match=r"shape \(10,\)"):
        prune(model, input_ids[0], **SETTINGS)


def test_another_architecture(unchecked, input_ids):
    from transformers import LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match="a Qwen2ForCausalLM of architecture 'qwen2'; allowed: a causal"):
        prune(Qwen2ForCausalLM(config), input_ids, **SETTINGS)
    classifier = LlamaForSequenceClassification(make_small_model(4).config)
    with pytest.raises(ValueError, match="a LlamaForSequenceClassification of architecture 'llama'; allowed: a causal"):
        prune(classifier, input_ids, **SETTINGS)


@torch.no_grad()
@pytest.mark.parametrize("pruned_layers", [4, 0])
@pytest.mark.parametrize(("projection", "part"), [("mlp.up_proj", "MLP"), ("self_attn.v_proj", "attention")])
def test_not_a_number(projection, part, pruned_layers, small_model, input_ids):
    """Found in layers that are pruned and in layers that are not, with the similarities given and without. Behind the
    last pruned layer nothing is computed: there it is the weights that are looked at."""
    what = "activations" if pruned_layers else "weights"
    settings = SETTINGS | {"pruned_layers": pruned_layers, "progress": False}
    similarity = layer_similarities(small_model, input_ids, progress=False)
    small_model.model.layers[2].get_submodule(projection).weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="decoder layer 2: activations are not finite"):
        prune(small_model, input_ids, **settings)
    with pytest.raises(ValueError, match=f"decoder layer 2, {part}: {what} are not finite"):
        prune(small_model, input_ids, **settings, similarity=similarity)


@torch.no_grad()
@pytest.mark.parametrize("small_model", [4], indirect=True)
def test_later_layers_see_what_the_saved_weights_give(small_model, input_ids):
    """In bfloat16 a scale folded into the weight and the same scale applied to the output round differently."""
    model = small_model.bfloat16()
    entered = []
    original = calibration.head_inputs

    def watched(layer, hidden, context):
        entered.append(hidden.clone())
        return original(layer, hidden, context)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibration, "head_inputs", watched)
        pruned, _ = prune(model, input_ids, **SETTINGS | {"pruned_layers": 4}, batch_size=12, progress=False)
    own = pruned.model(input_ids, output_hidden_states=True).hidden_states
    for before, now in zip(entered, own[:-1], strict=True):
        assert torch.equal(before, now)


@pytest.mark.parametrize("spread", ["meta", "hook"])
def test_a_model_that_a_device_map_spread(spread, input_ids):
    """Offloaded by accelerate: activations would be wrong, or fail in the middle."""
    model = make_small_model(4)
    if spread == "meta":
        model.model.layers[2].to("meta")
    else:
        cpu_offload(model, "cpu")
    with pytest.raises(ValueError, match=r"load it whole"):
        prune(model, input_ids, **SETTINGS, progress=False)
