"""What ridge regression is fitted to, found by trying: python data/ablations/targets.py [--seeds 3] [--setting 50]

After heads by OBS and SlimLLM's channels, output projections are fitted to what the whole layer gives on the pruned
model's hidden states ("prefix", which is the recovery `ridge`). Here also a share of the way towards the dense model's
hidden states (QEP, arXiv 2504.09629), and with tokens weighted by how much the dense model's loss depends on them
(GuidedQuant, arXiv 2505.07004). Judged on texts that are for choosing alone (group "variants" of plan.yaml), at equal
parameters; what was measured goes to targets.json, seed by seed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimllm_nb import calibration, pruning, sources
from slimllm_nb.comparison.judges import judged_blocks
from slimllm_nb.comparison.plan import load_plan
from slimllm_nb.generated import windows
from slimllm_nb.methods import MethodLike
from slimllm_nb.methods.ridge import PENALTIES, Normal
from slimllm_nb.pruning.statistics import HOLD_OUT
from slimllm_nb.reproduce import load_profile
from trial import measure_seeds, side_by_side

FOUND = Path(__file__).with_suffix(".json")
VARIANTS = {  # share of the way from prefix to dense, of the attention's outputs and of the MLP's; token weights
    "prefix": (0.0, 0.0, False),
    "a quarter": (0.25, 0.25, False),
    "half": (0.5, 0.5, False),
    "half, attention alone": (0.5, 0.0, False),
    "token weights": (0.0, 0.0, True),
}
CLIP = 10.0  # times the mean: no token counts more


def weighted_ridge(
    inputs: Tensor, targets: Tensor, old: Tensor, weights: Tensor, penalties: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """For each penalty the W (hidden, kept) and b that minimise sum_t w_t |W x_t + b - y_t|^2 / sum(w) + penalty * mean
    variance of x * |W - old|^2; inputs (tokens, kept), targets (tokens, hidden), float64."""
    share = (weights / weights.sum())[:, None]
    means = (share * inputs).sum(0), (share * targets).sum(0)
    x, left = inputs - means[0], targets - means[1] - (inputs - means[0]) @ old.T
    normal = Normal(x.T @ (share * x), x.T @ (share * left))
    fitted = [old + normal.change(penalty) for penalty in penalties]
    return [(new, means[1] - new @ means[0]) for new in fitted]


class Refit:
    """A recovery. It walks its samples through the model beside prune(): the dense model's hidden states, and those of
    the pruned one. Sublayers are numbered: attention 0, MLP 0, attention 1, ..."""

    def __init__(self, model, samples: Tensor, shares: tuple[float, float], weights: dict[int, Tensor] | None = None):
        self.layers, self.shares, self.weights, self.at = model.model.layers, shares, weights, 0
        self.own = calibration.embed(model, samples)
        self.dense, self.context = self.own.clone(), calibration.layer_context(model, self.own)

    def output(self, hidden: Tensor) -> Tensor:
        """Of the whole sublayer where the walk stands."""
        layer = self.layers[self.at // 2]
        if self.at % 2 == 0:
            inputs = calibration.head_inputs(layer, hidden, self.context).flatten(1)
            return layer.self_attn.o_proj(inputs).view_as(hidden)
        return layer.mlp(layer.post_attention_layernorm(hidden))

    def __call__(self, inputs, output_weight, kept, layer_index):
        wanted = 2 * layer_index + (output_weight is not self.layers[layer_index].self_attn.o_proj.weight)
        while self.at < wanted:  # what is not pruned is the dense model's
            self.own, self.dense = self.own + self.output(self.own), self.dense + self.output(self.dense)
            self.at += 1
        self.dense = self.dense + self.output(self.dense)
        share, old = self.shares[self.at % 2], output_weight.double()
        inputs, towards = inputs.double(), (self.dense - self.own).flatten(0, 1).double()
        targets = share * towards + (1 - share) * inputs @ old.T
        length = self.own.shape[1]
        weights = torch.ones(len(inputs)).to(inputs) if self.weights is None else self.weights[self.at].to(inputs)
        held = (torch.arange(len(self.own)) % HOLD_OUT == HOLD_OUT // 2).repeat_interleave(length)
        x, old = inputs[:, kept], old[:, kept]
        errors = [
            (weights[held] * (x[held] @ new.T + bias - targets[held]).square().sum(1)).sum()
            for new, bias in weighted_ridge(x[~held], targets[~held], old, weights[~held], PENALTIES)
        ]
        best = PENALTIES[int(torch.stack(errors).argmin())]
        ((new, bias),) = weighted_ridge(x, targets, old, weights, [best])
        self.own = self.own + (x @ new.T + bias).view_as(self.own).to(self.own)
        self.at += 1
        return new, bias, {"penalty": best}


def token_weights(model, samples: Tensor, batch_size: int = 8) -> dict[int, Tensor]:
    """For every sublayer, (tokens,): mean over outputs of the squared gradient of the loss with respect to its output,
    over its mean over tokens, at most CLIP."""
    found: dict[int, list[Tensor]] = {}

    def keep(number: int):
        def hook(module, inputs, output):
            output.register_hook(lambda g: found.setdefault(number, []).append(g.square().mean(-1).flatten().double()))

        return hook

    pairs = [one for layer in model.model.layers for one in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(pairs)]
    with torch.enable_grad():
        for batch in samples.split(batch_size):
            embedded = calibration.embed(model, batch).detach().requires_grad_()
            loss = model(inputs_embeds=embedded, labels=batch.to(model.device), use_cache=False).loss
            torch.autograd.grad(loss, embedded)
    for handle in handles:
        handle.remove()
    weights = {number: torch.cat(some) for number, some in found.items()}
    return {number: (one / one.mean()).clamp_max(CLIP) for number, one in weights.items()}


@torch.no_grad()
def measured(model, setting, samples: Tensor, blocks: dict) -> dict:
    """Perplexities of SlimLLM and of every variant, with as many parameters."""

    def methods() -> Iterator[tuple[str, MethodLike]]:
        yield "slimllm", "slimllm"
        for name, (*shares, weighted) in VARIANTS.items():
            refit = Refit(model, samples, shares, token_weights(model, samples) if weighted else None)
            # prune() reads a part's needs off its parameters
            yield name, {"base": "obs_heads_ridge", "recovery": refit.__call__}

    similarity = pruning.layer_similarities(model, samples, progress=False)
    return side_by_side(model, setting, samples, similarity, methods(), blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--setting", default="50")
    options = parser.parse_args()
    profile = load_profile("embedded")
    protocol, setting = load_plan()["variants"].protocol(profile), profile.settings[options.setting]
    model, tokenizer = sources.load_model().requires_grad_(False), sources.load_tokenizer()
    texts, blocks = protocol.calibration_texts(), judged_blocks(protocol, {}, tokenizer, lambda: model)

    def of_seed(seed: int) -> dict:
        samples = windows(texts, tokenizer, protocol.num_samples, protocol.length, seed)
        return measured(model, setting, samples, blocks)

    measure_seeds(FOUND, options.seeds, options.setting, of_seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
