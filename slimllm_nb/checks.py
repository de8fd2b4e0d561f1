"""What every measurement and every file asks of a model first: that it is a LLaMA, and that its tokenizer fits it."""

from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


def require_llama(model: PreTrainedModel) -> None:
    """Errors: ValueError naming the architecture, when it is neither LLaMA's nor what prune() returns."""
    architecture = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if architecture not in ("llama", "slim_llama") or not isinstance(model, LlamaForCausalLM):
        raise ValueError(
            f"the model is a {type(model).__name__} of architecture {architecture!r}; "
            "allowed: a causal language model of architecture 'llama' (and what prune() returns)"
        )


def require_fitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Errors: ValueError when the tokenizer can give a token that the model has no embedding for."""
    vocabulary, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives tokens 0 to {largest}, the model's vocabulary is 0 to {vocabulary - 1}: "
            "take the tokenizer that belongs to this model"
        )
