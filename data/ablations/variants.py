"""Variants of OBS and of ridge regression that the sweep tries (group "variants" of plan.yaml), one idea each.

Parts of a method as anybody may register them: what does not pay stays here, outside the package.
"""

import torch

from slimllm_nb.llama import head_columns
from slimllm_nb.methods import register
from slimllm_nb.methods.obs import DAMPING


@register.head_selection("obs_first_order")
def obs_first_order(input_covariance, output_weight, head_dim, num_pruned):
    """OBS with what a head and the whole output have in common added to its cost, tr(W_g (W H)_g') (Tyr-the-Pruner,
    arXiv 2503.09657). After every head that goes the others are fitted anew."""
    damped, weight = input_covariance.clone(), output_weight.to(input_covariance)
    damped.diagonal().add_(DAMPING * input_covariance.diagonal().mean())
    alive, current = list(range(weight.shape[1] // head_dim)), weight
    for _ in range(num_pruned):
        kept = head_columns(alive, head_dim).to(weight.device)
        inverse = torch.linalg.inv(damped[kept][:, kept])
        total, costs = current @ damped[kept][:, kept], []
        for place in range(len(alive)):
            own = slice(place * head_dim, (place + 1) * head_dim)
            second = torch.linalg.solve(inverse[own, own], current[:, own].T)
            costs.append((current[:, own] * second.T).sum() / 2 + (current[:, own] * total[:, own]).sum())
        alive.pop(int(torch.stack(costs).argmin()))
        kept = head_columns(alive, head_dim).to(weight.device)
        current = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
    return torch.tensor(alive, device=weight.device)


@register.channel_score("ridge_leverage")
def ridge_leverage(input_covariance):
    """How little a channel follows from the others: the diagonal of C (C + t I)^-1, t a hundredth of the mean variance
    (MoDeGPT, arXiv 2408.09632)."""
    shrink = DAMPING * input_covariance.diagonal().mean()
    damped = input_covariance + shrink * torch.eye(len(input_covariance)).to(input_covariance)
    return 1 - shrink * torch.linalg.inv(damped).diagonal()


@register.recovery("rotation")
def rotation(input_covariance, input_means, output_weight, kept):
    """The outputs of what is kept, turned towards the full ones: W_K becomes Q W_K with the orthogonal Q that leaves
    the smallest squared error, and a bias (RCPU, arXiv 2510.07782)."""
    weight = output_weight.to(input_covariance)
    left, _, right = torch.linalg.svd(weight @ input_covariance[:, kept] @ weight[:, kept].T)
    new = left @ right @ weight[:, kept]
    return new, weight @ input_means - new @ input_means[kept]
