"""A pruned LLaMA as a GGUF file for llama.cpp, layer by layer as narrow as it is.

llama.cpp's `llama` architecture has one width for all layers. Its `deci` architecture (made for DeciLM and Nemotron) is
the same computation, but reads heads, key/value heads and feed-forward length per layer, and takes the biases that
pruning adds to o_proj and down_proj. One thing it cannot say: key/value heads that serve uneven numbers of query heads.
Those of such a layer are written down more than once (even_groups.py).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from slimllm_nb.checks import require_fitting, require_plain
from slimllm_nb.export.even_groups import has_even_groups, to_even_groups
from slimllm_nb.files import replacing

ARCHITECTURE = "deci"
FILE_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# llama.cpp's names, as src/llama-vocab.cpp has them (November 2026), without those of encoders.
PRE_TOKENIZERS = """default llama3 llama-v3 llama-bpe llama4 falcon falcon3 falcon-h1 pixtral midm-2.0 lfm2 minicpm5 mpt
deepseek-llm deepseek-coder deepseek-v3 deepseek-r1-qwen youtu starcoder gpt-2 phi-2 gpt-4o gigachat a.x-4.0 mellum
mellum2 jais jais-2 refact command-r qwen2 qwen35 kormo megrez stablelm2 olmo dbrx smaug-bpe poro-chat glm4 chatglm-bpe
viking tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b kanana2 tiny_aya afmoe
superbpe trillion bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense kimi-k2 grok-2 minimax-m2 solar-open
k2-horizon"""
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
RECOGNISED = {  # name -> kind, expression and use_regex of each step of `tokenizers`
    "smollm": [("Digits", None, None), ("ByteLevel", None, True)],
    "llama-bpe": [("Split", LLAMA_3, None), ("ByteLevel", None, False)],
    "gpt-2": [("ByteLevel", None, True)],
}
SMOLLM_MERGES = "c914f93f16015304198f632636548d9651bac62217658ae3a498304cd92bc017"  # SHA-256
ROTATIONS = ("default", "linear", "llama3")


@torch.no_grad()
def write_gguf(
    model: LlamaForCausalLM,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pre_tokenizer: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the model (dense or pruned) as one GGUF file; returns its path.

    tokenizer: a byte-level BPE tokenizer that goes into the file; without one the file has no vocabulary, and llama.cpp
    takes token numbers alone. pre_tokenizer: llama.cpp's name for how that tokenizer cuts text into words; None: as it
    is recognised (SmolLM's, LLaMA 3's, GPT-2's). dtype: "float32", "float16", "bfloat16" or "q8_0" (8 bits, a scale for
    every 32 weights), by default the model's; vectors stay in float32.

    The file appears whole or not at all. Raises: ValueError for an architecture other than LLaMA's, adapters and
    quantized weights; for a tokenizer that does not fit, is not byte-level BPE or is not recognised; for an unknown
    name or dtype; for a width that q8_0 cannot cut into blocks; and for a rotation that changes with the length of the
    text.
    """
    require_plain(model)
    path, dtype = Path(path), dtype or str(model.dtype).removeprefix("torch.")
    rotation = model.config.rope_parameters["rope_type"]
    if dtype not in FILE_TYPES or rotation not in ROTATIONS:
        raise ValueError(
            f"dtype is {dtype!r} and the model's rope_type {rotation!r}; allowed: {', '.join(FILE_TYPES)}, and "
            f"{', '.join(ROTATIONS)}"
        )
    vocabulary = None
    if tokenizer is not None:
        require_fitting(model, tokenizer)
        vocabulary = _byte_level_bpe(tokenizer)
        pre_tokenizer = pre_tokenizer or _recognised(vocabulary)
        if pre_tokenizer not in (known := PRE_TOKENIZERS.split()):
            raise ValueError(f"pre_tokenizer is {pre_tokenizer!r}; allowed: {', '.join(known)}")
    if not has_even_groups(model):
        model = to_even_groups(model)
    block = gguf.GGML_QUANT_SIZES[FILE_TYPES[dtype][0]][0]
    for name, tensor in _tensors(model):
        if tensor.ndim > 1 and tensor.shape[-1] % block:
            says = f"{name} has {tensor.shape[-1]} columns; {dtype} takes multiples of {block}"
            raise ValueError(f"{says} (channel_multiple={block} prunes ffn_down to them)")
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        _write_settings(writer, model, FILE_TYPES[dtype][1])
        _write_vocabulary(writer, tokenizer, vocabulary, pre_tokenizer, model.config)
        for name, tensor in _tensors(model):
            kind = FILE_TYPES[dtype][0] if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
            data = np.ascontiguousarray(tensor.float().cpu().numpy())
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _write_settings(writer: gguf.GGUFWriter, model: LlamaForCausalLM, file_type) -> None:
    config, attentions = model.config, [layer.self_attn for layer in model.model.layers]
    dim = attentions[0].head_dim
    writer.add_file_type(file_type)
    writer.add_block_count(len(attentions))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count([one.q_proj.out_features // dim for one in attentions])
    writer.add_head_count_kv([one.k_proj.out_features // dim for one in attentions])
    writer.add_feed_forward_length([layer.mlp.gate_proj.out_features for layer in model.model.layers])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The tokenizer's own description of its tokens and merges."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}; allowed: byte-level BPE of tokenizers")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(described["pre_tokenizer"]):
        raise ValueError(
            f"the tokenizer is of type {described['model']['type']}, not byte-level BPE: write a file without a "
            "vocabulary (PRE_TOKENIZER=none; in Python, no tokenizer)"
        )
    return described


def _recognised(described: dict) -> str:
    """llama.cpp's name for how a tokenizer cuts text. Raises: ValueError where that is not known."""
    if hashlib.sha256(json.dumps(described["model"]["merges"]).encode()).hexdigest() == SMOLLM_MERGES:
        return "smollm"  # also read from GGUF, where its step that parts digits is lost
    steps = described["pre_tokenizer"].get("pretokenizers", [described["pre_tokenizer"]])
    found = [(step["type"], step.get("pattern", {}).get("Regex"), step.get("use_regex")) for step in steps]
    if found not in RECOGNISED.values():
        raise ValueError(
            f"how the tokenizer cuts text is not recognised: {json.dumps(described['pre_tokenizer'])[:200]}; give "
            "llama.cpp's name for it (PRE_TOKENIZER=llama-bpe, say), or none for a file without a vocabulary"
        )
    return next(name for name, one in RECOGNISED.items() if one == found)


def _write_vocabulary(writer, tokenizer, described: dict | None, pre_tokenizer: str, config) -> None:
    if described is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {one["id"] for one in described["added_tokens"] if one["special"]}
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    numbers = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([tokens.get(number, f"[unused{number}]") for number in numbers])
    writer.add_token_types(
        [control if number in special else normal if number in tokens else unused for number in numbers]
    )
    merges = described["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    for kind, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under llama.cpp's name."""
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    dim, base = model.model.layers[0].self_attn.head_dim, model.config.rope_parameters["rope_theta"]
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors = plain / model.model.rotary_emb.inv_freq.double().cpu()
    if (factors - 1).abs().max() > 1e-5:
        yield "rope_freqs.weight", factors
    for index, layer in enumerate(model.model.layers):
        named = {
            "attn_norm": layer.input_layernorm,
            "attn_q": layer.self_attn.q_proj,
            "attn_k": layer.self_attn.k_proj,
            "attn_v": layer.self_attn.v_proj,
            "attn_output": layer.self_attn.o_proj,
            "ffn_norm": layer.post_attention_layernorm,
            "ffn_gate": layer.mlp.gate_proj,
            "ffn_up": layer.mlp.up_proj,
            "ffn_down": layer.mlp.down_proj,
        }
        for name, module in named.items():
            for kind, tensor in module.named_parameters():
                turned = _interleaved(tensor, dim) if name in ("attn_q", "attn_k") else tensor
                yield f"blk.{index}.{name}.{kind}", turned


def _interleaved(rows: Tensor, dim: int) -> Tensor:
    """llama.cpp turns neighbouring values of a head together, transformers those half a head apart."""
    return rows.reshape(-1, 2, dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
