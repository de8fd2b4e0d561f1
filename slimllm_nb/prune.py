"""One command for a model of your own: python -m slimllm_nb.prune MODEL TARGET --keep 0.8 --texts my.txt

Prunes any LLaMA, Mistral or Qwen2, a folder or a hub id, from disk to disk, one decoder layer in memory at a time; what
is interrupted goes on where it was (disk.prune_checkpoint). Every other document is calibrated on; the perplexity is
that of the rest.
"""

import argparse
import sys
from pathlib import Path

from slimllm_nb.command import command

# The paper's settings for 32 layers: how many of them are pruned, and alpha. MILD: up to this share of the parameters.
MOST_MILD, MILD, STRONG = 0.35, (26, 10.0), (30, 7.0)


def main_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slimllm_nb.prune", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help='a folder with safetensors, a hub id, or "embedded"')
    parser.add_argument("target", type=Path, help="the folder of the pruned checkpoint")
    parser.add_argument("--keep", type=float, default=0.8, help="share of the parameters to be left (default: 0.8)")
    parser.add_argument("--of", choices=["model", "decoder"], default="model", help="whose parameters (default: model)")
    parser.add_argument("--texts", nargs="+", help=".txt or .jsonl files (default: embedded news)")
    parser.add_argument("--method", default="recommended", help="default: recommended; slimllm: as published")
    parser.add_argument("--channel-multiple", type=int, default=1, help="64 for speed on a GPU (default: 1)")
    parser.add_argument("--even-groups", action="store_true", help="as many query heads for every key/value head: vLLM")
    parser.add_argument("--pruned-layers", type=int, help="default: by --keep, in proportion to the paper's")
    parser.add_argument("--alpha", type=float, help="how much the layers' ratios differ; default: by --keep")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (default: 128)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--generated", type=int, default=0, help="so many of them the model's own text (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", help="of computation and checkpoint (default: the model's own)")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--tokens", type=int, default=8192, help="that perplexity is measured on (default: 8192)")
    return parser


def halves(files: list[str] | None) -> tuple[list[str], list[str], str]:
    """Documents to calibrate on, held-out ones, and what they are."""
    from slimllm_nb.corpora import TextSource
    from slimllm_nb.sources import load_texts

    if files is None:
        return load_texts("news", "calibration"), load_texts("news", "held-out"), "embedded news"
    texts = load_texts("texts", "calibration", {"texts": TextSource(files=files)})
    return texts[::2], texts[1::2], ", ".join(files)


def spread_of(options: argparse.Namespace, layers: int) -> dict:
    """pruned_layers and alpha as given, or the paper's for that much, in proportion to the number of layers."""
    of_32, alpha = MILD if 1 - options.keep <= MOST_MILD else STRONG
    pruned_layers = round(of_32 / 32 * layers) if options.pruned_layers is None else options.pruned_layers
    return {"pruned_layers": pruned_layers, "alpha": alpha if options.alpha is None else options.alpha}


def method_of(options: argparse.Namespace):
    """The method, with its own head selection told to keep groups even. Raises: PartError for one that cannot."""
    from slimllm_nb.methods import as_method

    method = as_method(options.method)
    if not options.even_groups:
        return method
    selection = {"name": method.head_selection.name, "even_groups": True}
    return as_method({"base": options.method, "head_selection": selection})


@command
def main(arguments: list[str] | None = None) -> int:
    options = main_parser().parse_args(arguments)
    from slimllm_nb.disk import checkpoint_perplexity, prune_checkpoint
    from slimllm_nb.evaluation import token_blocks
    from slimllm_nb.generated import real_and_generated
    from slimllm_nb.sources import load_model, load_tokenizer
    from slimllm_nb.sources.checkpoints import checkpoint_folder
    from slimllm_nb.sources.models import empty_model

    source = checkpoint_folder(options.model, options.revision)
    layers = empty_model(str(source)).config.num_hidden_layers
    spread, method = spread_of(options, layers), method_of(options)
    texts, held_out, named = halves(options.texts)
    tokenizer, place = load_tokenizer(str(source)), {"dtype": options.dtype, "device": options.device}
    sizes = options.samples, options.generated, options.length, options.seed
    input_ids = real_and_generated(texts, tokenizer, lambda: load_model(str(source), **place), *sizes)
    blocks = {"held-out texts": token_blocks(held_out, tokenizer, options.length, options.tokens)}
    named += f", {options.generated} of them the model's own text" if options.generated else ""
    samples = f"{options.samples} samples of {options.length} tokens from {named}"
    planned = f"{spread['pruned_layers']} of {layers} layers, alpha {spread['alpha']:g}"
    print(f"{method.name}: {planned}; {samples}", flush=True)
    report = prune_checkpoint(
        source,
        options.target,
        input_ids,
        target_parameters=options.keep,
        target_of=options.of,
        method=method,
        channel_multiple=options.channel_multiple,
        seed=options.seed,
        base_model=options.model,
        **spread,
        **place,
    )
    print(report, flush=True)
    (before,), (after,) = (checkpoint_perplexity(one, blocks, **place).values() for one in (source, options.target))
    print(f"perplexity on {blocks['held-out texts'].numel():,} held-out tokens: {before:.2f} -> {after:.2f}")
    print(f'load:  AutoModelForCausalLM.from_pretrained("{options.target}", trust_remote_code=True)')
    print(f'serve: make serve CHECKPOINT="{options.target.absolute()}"   (vLLM)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
