"""What a part of each kind may ask for, by the names of its parameters. What is summed over tokens is float64."""

_HALF = {
    "inputs": "(tokens, width): the input of the output projection, o_proj or down_proj",
    "input_norms": "(width,): L2 norms of the columns of `inputs` over all tokens",
    "input_means": "(width,): their means",
    "input_variances": "(width,): their variances, divided by the number of tokens",
    "input_covariance": "(width, width): their covariance, divided by the number of tokens",
    "output_scatter": "(hidden, hidden): (Y - mean)'(Y - mean), Y the output of the output projection",
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
    "mlp_inputs": "(tokens, hidden): the input of the MLP",
    "mlp_input_norms": "(hidden,): L2 norms of its columns",
    "gate_weight": "(intermediate, hidden)",
    "up_weight": "(intermediate, hidden)",
    "gate_gradient": "as gate_weight",
    "up_gradient": "as up_weight",
}
_CHOICE = {
    "scores": "(heads,) or (intermediate,): what the score gave",
    "num_pruned": "int: how many heads or channels are pruned",
}
_RECOVERY = {
    "kept": "(kept,): the columns of `output_weight` that are kept",
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
    "head_parameters": "(layers,): parameters pruned with one head, key/value heads shared out",
    "channel_parameters": "(layers,): parameters pruned with one channel",
}
STATISTICS: dict[str, dict[str, str]] = {
    "head_score": _HALF | _HEADS,
    "channel_score": _HALF | _CHANNELS,
    "head_selection": _HALF | _HEADS | _CHOICE,
    "channel_selection": _HALF | _CHANNELS | _CHOICE,
    "allocation": _ALLOCATION,
    "recovery": _HALF | _RECOVERY,
}
"""What a part of each kind may ask for by the names of its parameters."""
