"""What pruning gathers batch by batch is what the method's functions make of all tokens at once."""

import pytest
import torch

from slimllm_nb import calibration, channels, heads, regression
from slimllm_nb.pruning import prune, sublayers

SETTINGS = {"pruning_ratio": 0.5, "pruned_layers": 4, "alpha": 0.0, "progress": False}


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_the_first_layer_is_pruned_as_the_whole_forms_say(small_model, generator, batch_size):
    input_ids = torch.randint(0, 101, (12, 10), generator=generator)
    seen = {}

    def watched(mlp_input_norms, input_norms, output_scatter, gate_weight, up_weight, output_weight):
        norms = mlp_input_norms, input_norms
        scores = channels.importance_from_statistics(*norms, output_scatter, gate_weight, up_weight, output_weight)
        seen.setdefault("importance", scores)
        return scores

    method = {"channel_score": watched}
    pruned, report = prune(small_model, input_ids, **SETTINGS, batch_size=batch_size, method=method)
    layer, new, line = small_model.model.layers[0], pruned.model.layers[0], report.layers[0]
    hidden = calibration.embed(small_model, input_ids)
    x = calibration.head_inputs(layer, hidden, calibration.layer_context(small_model, hidden))
    weight = layer.self_attn.o_proj.weight
    kept = heads.select_heads(heads.head_covariance(x, weight), 4)
    assert line.kept_heads == kept.tolist()
    columns = torch.isin(torch.arange(8).repeat_interleave(4), kept)
    scale, shift = regression.fit(x.flatten(1)[:, columns] @ weight[:, columns].T, x.flatten(1) @ weight.T)
    torch.testing.assert_close(new.self_attn.o_proj.weight.double(), scale[:, None] * weight[:, columns].double())
    torch.testing.assert_close(new.self_attn.o_proj.bias.double(), shift, rtol=1e-5, atol=1e-6)

    after = hidden + new.self_attn.o_proj(x.flatten(1)[:, columns]).view_as(hidden)
    inputs = calibration.mlp_inputs(layer, after)
    activations = calibration.mlp_activations(layer, inputs)
    mlp = layer.mlp
    importance = channels.channel_importance(
        inputs, activations, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    )
    torch.testing.assert_close(seen["importance"], importance, rtol=1e-5, atol=0)
    kept = channels.select_channels(importance, 40)
    assert line.kept_channels == kept.tolist()
    down = mlp.down_proj.weight
    scale, shift = regression.fit(activations[:, kept] @ down[:, kept].T, activations @ down.T)
    torch.testing.assert_close(new.mlp.down_proj.weight.double(), scale[:, None] * down[:, kept].double())
    torch.testing.assert_close(new.mlp.down_proj.bias.double(), shift, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kept_in_memory", [True, False])
def test_how_often_activations_are_computed(small_model, generator, kept_in_memory, monkeypatch):
    """Kept: once. Not kept: once in full, then what is kept for moments, and again for the output."""
    if not kept_in_memory:
        monkeypatch.setattr(sublayers, "activation_limit", lambda layer: 0)
    input_ids = torch.randint(0, 101, (6, 10), generator=generator)
    computed = []
    for index, layer in enumerate(small_model.model.layers):
        layer.mlp.up_proj.register_forward_hook(
            lambda module, inputs, output, index=index: computed.append((index, output.shape[-1]))
        )
    similarity = torch.tensor([0.5, 0.9, 0.9, 0.1])
    settings = SETTINGS | {"pruned_layers": 3, "pruning_ratio": 0.25, "similarity": similarity}
    pruned, report = prune(small_model, input_ids, **settings)
    width = small_model.config.intermediate_size
    expected = []
    for layer in report.layers[:-1]:  # behind the last pruned layer nothing is computed
        expected.append((layer.index, width))
        if not kept_in_memory:
            expected += [(layer.index, len(layer.kept_channels))] * (2 if layer.ratio else 1)
    assert computed == expected
    last, own = pruned.model.layers[-1], small_model.model.layers[-1]
    for name, tensor in own.state_dict().items():
        assert torch.equal(last.state_dict()[name], tensor)
        assert last.state_dict()[name].data_ptr() != tensor.data_ptr()
    assert report.layers[-1].kept_channels == list(range(width)) and report.layers[-1].mlp_error_before is None
