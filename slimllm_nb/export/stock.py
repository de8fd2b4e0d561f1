"""The same function as a stock LlamaForCausalLM, for engines that load nothing else.

A stock model has one width for all layers, so every layer is padded with heads and channels of zeros up to the widest
layer, or to the next counts that the stock configuration accepts. What that costs: the padding is stored and computed
like everything else. The published settings leave some layers dense, so those models pad back to the dense size (plus
the biases): a stock copy runs elsewhere, but saves nothing. See `padding_cost`.
"""

import copy
from itertools import product

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slimllm_nb.checks import require_plain
from slimllm_nb.evaluation import count_parameters
from slimllm_nb.llama import head_columns, queries_per_key_value_head

OWN_SETTINGS = ("queries_per_key_value_head", "o_proj_bias", "down_proj_bias", "per_layer_config")


@torch.no_grad()
def to_stock(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A stock LlamaForCausalLM with the same logits; `model` (dense or pruned) is left as it is.

    Heads: the counts with the fewest parameters that hold every layer, the hidden size divisible by the heads and the
    heads by the key/value heads. A key/value head that more query heads read than one of the stock model's can serve
    is written down several times. Biases: where one layer has one, all have (zeros), as a stock configuration wants
    it: for o_proj those of q, k and v too, for down_proj those of gate and up.

    Raises: ValueError for an architecture that is not LLaMA's, and layers that are not as the config says or no plain
    linear ones.
    """
    require_plain(model)
    groups = [queries_per_key_value_head(layer.self_attn) for layer in model.model.layers]
    heads, key_value_heads = _stock_heads(groups, model.config.hidden_size)
    channels = max(layer.mlp.gate_proj.out_features for layer in model.model.layers)
    biases = [name for name, _ in model.model.layers.named_parameters() if name.endswith("bias")]
    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "quantization_config", *OWN_SETTINGS):
        settings.pop(key, None)
    settings |= {
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": model.model.layers[0].self_attn.head_dim,
        "intermediate_size": channels,
        "attention_bias": any("self_attn" in name for name in biases),
        "mlp_bias": any("mlp" in name for name in biases),
    }
    config = LlamaConfig(**settings)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        stock = LlamaForCausalLM(config).to(model.dtype)
    stock.to_empty(device=model.device).tie_weights()
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    stock.load_state_dict(own, strict=False)
    stock.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are not in the state dict
    for layer, target, counts in zip(model.model.layers, stock.model.layers, groups, strict=True):
        _fill_attention(layer.self_attn, target.self_attn, counts, heads // key_value_heads)
        for name in ("gate_proj", "up_proj", "down_proj"):
            _fill(getattr(target.mlp, name), getattr(layer.mlp, name))
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(target, name).load_state_dict(getattr(layer, name).state_dict())
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def padding_cost(model: LlamaForCausalLM, stock: LlamaForCausalLM) -> str:
    """One sentence: the widths of the stock copy, and how many parameters the padding added."""
    before, after = (count_parameters(one)["model"] for one in (model, stock))
    config = stock.config
    return (
        f"padded to {config.num_attention_heads} heads, {config.num_key_value_heads} key/value heads and "
        f"{config.intermediate_size} channels in every layer: {before:,} -> {after:,} parameters "
        f"({after / before - 1:+.1%})"
    )


def _stock_heads(groups: list[list[int]], hidden_size: int) -> tuple[int, int]:
    """The cheapest (heads, key/value heads) that hold every layer; a group of 1 and hidden_size heads always do."""

    def fits(heads: int, key_value_heads: int) -> bool:
        size = heads // key_value_heads
        return all(sum(-(-count // size) for count in counts) <= key_value_heads for counts in groups)

    divisors = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
    allowed = [(h, k) for h, k in product(divisors, divisors) if h % k == 0 and fits(h, k)]
    return min(allowed, key=lambda counts: (sum(counts), counts))


def _fill_attention(source: nn.Module, target: nn.Module, counts: list[int], group: int) -> None:
    """Fill `target`, a wider layer with `group` query heads per key/value head, so that it does what `source` does.

    counts: queries_per_key_value_head(source). Every query head goes to the place next to its key/value head, which is
    written down once more where it has more than `group` of them; all other places are zeros.
    """
    dim, slot = source.head_dim, 0
    places, owners = [], []  # of every query head; of every key/value place that is used
    for owner, count in enumerate(counts):
        for start in range(0, count, group):
            places += [slot * group + i for i in range(min(group, count - start))]
            owners.append(owner)
            slot += 1
    queries, keys = head_columns(places, dim), head_columns(range(slot), dim)
    _fill(target.q_proj, source.q_proj, rows=queries)
    for name in ("k_proj", "v_proj"):
        _fill(getattr(target, name), getattr(source, name), rows=keys, source_rows=head_columns(owners, dim))
    _fill(target.o_proj, source.o_proj, columns=queries)


def _fill(target: nn.Linear, source: nn.Linear, rows=None, columns=None, source_rows=None) -> None:
    """Zeros, and the source's weights at these rows and columns (by default the first ones)."""
    weight = source.weight if source_rows is None else source.weight[source_rows]
    rows = torch.arange(len(weight)) if rows is None else rows
    columns = torch.arange(weight.shape[1]) if columns is None else columns
    target.weight.zero_()
    target.weight[rows[:, None], columns] = weight
    if target.bias is not None:
        target.bias.zero_()
    if source.bias is not None:
        target.bias[rows] = source.bias if source_rows is None else source.bias[source_rows]
