"""What widths in multiples and quantized weights cost in perplexity: tools/quantized.py (pip install torchao)

SlimLLM at the profile's settings, the same share of the decoder left in every row; three draws of calibration samples.
Kept in data/quantized.json, from which `make results` writes its table. Weights alone are quantized, and computed with
in float32: int8 with a scale for every row, int4 with one for every 32 weights (torchao; all projections), q8_0 as in
the GGUF file (embedding and output head, too).
"""

import copy
import json
import sys
from importlib.metadata import version

import gguf
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from results import QUANTIZED
from slimllm_nb import evaluation, pruning
from slimllm_nb.comparison import protocol_of
from slimllm_nb.comparison.judges import judged_blocks
from slimllm_nb.files import commit, write_text
from slimllm_nb.generated import windows
from slimllm_nb.reproduce import load_profile
from slimllm_nb.sources import load_model, load_tokenizer

MULTIPLES, SEEDS = (1, 32, 64), 3


def by_torchao(model: nn.Module, kind: str) -> None:
    config = Int8WeightOnlyConfig() if kind == "int8" else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    quantize_(model.model, config)


@torch.no_grad()
def by_gguf(model: nn.Module, kind: str) -> None:
    for parameter in (one for one in model.parameters() if one.ndim > 1):
        packed = gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType.Q8_0)
        parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))


QUANTIZERS = {"int8": by_torchao, "int4": by_torchao, "q8_0": by_gguf}


def perplexities(model: nn.Module, blocks: dict, quantized: bool) -> dict[str, dict[str, float]]:
    """By weights and corpus; quantized: the other weights too."""
    found = {}
    for kind in ("float32", *(QUANTIZERS if quantized else ())):
        one = copy.deepcopy(model)
        if kind in QUANTIZERS:
            QUANTIZERS[kind](one, kind)
        found[kind] = {name: evaluation.perplexity(one, some, progress=False) for name, some in blocks.items()}
    return found


def main() -> int:
    profile, rows = load_profile("embedded"), []
    protocol, model, tokenizer = protocol_of(profile), load_model(), load_tokenizer()
    texts, blocks = protocol.calibration_texts(), judged_blocks(protocol, {}, tokenizer)
    dense = perplexities(model, blocks, quantized=True)
    for seed in range(SEEDS):
        samples = windows(texts, tokenizer, protocol.num_samples, protocol.length, seed)
        for key, setting in profile.settings.items():
            amount = dict(setting.amount)
            for multiple in MULTIPLES:
                pruned, report = pruning.prune(model, samples, **amount, channel_multiple=multiple, progress=False)
                amount = {"target_parameters": report.decoder.share_left, "target_of": "decoder", **setting.spread}
                row = {"setting": key, "seed": seed, "channel_multiple": multiple}
                row["decoder_share"] = report.decoder.share_left
                for kind, measured in perplexities(pruned, blocks, multiple == 32).items():
                    rows.append(row | {"weights": kind} | measured)
                    print(json.dumps(rows[-1]), flush=True)
    versions = {package: version(package) for package in ("torch", "torchao", "gguf")}
    content = {"commit": commit(), "corpora": list(blocks), "versions": versions, "dense": dense, "rows": rows}
    write_text(QUANTIZED, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
