"""A folder laid out like the hub: a small LLaMA in shards, its tokenizer, data sets in the hub's columns and splits.

The model has eight layers with multi-head attention, random weights, and an output head fitted to the text, so
that it knows which tokens are frequent: a tokenizer that gives other numbers is noticed.
"""

import json
import shutil
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimllm_nb.sources import load_texts

LAYERS, HEADS, VOCABULARY = 8, 4, 1000
QUESTIONS = 4
CONFIGS = """---
configs:
{}
---
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 1,000 tokens, trained on news; it puts <s> in front, as LLaMA's does, and knows <unk>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(load_texts("news", "calibration"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random, but for the output head: logistic regression from the last hidden states to the next token of news."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=172, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = tokenizer("\n\n".join(load_texts("news", "calibration")), return_tensors="pt", verbose=False)["input_ids"]
    blocks = ids[0, : 64 * 128].view(64, 128)
    with torch.no_grad():
        hidden = model.model(blocks).last_hidden_state[:, :-1].flatten(0, 1)
    head, optimizer = model.lm_head.weight, torch.optim.Adam([model.lm_head.weight], lr=0.003)
    torch.nn.init.zeros_(head)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(hidden @ head.T, blocks[:, 1:].flatten()).backward()
        optimizer.step()
    return model.bfloat16()


def write_hub(folder: Path) -> None:
    """models/stand-in/llama, models/stand-in/spoilt (another numbering of tokens), and all data sets of the paper."""
    tokenizer = make_tokenizer()
    llama, spoilt = (folder / "models" / "stand-in" / name for name in ("llama", "spoilt"))
    make_model(tokenizer).save_pretrained(llama, max_shard_size="1MB")
    tokenizer.save_pretrained(llama)
    shutil.copytree(llama, spoilt)
    content = json.loads((spoilt / "tokenizer.json").read_text())
    content["model"]["vocab"] = {
        token: number if number < 3 else 3 + (number + 300) % (VOCABULARY - 3)
        for token, number in content["model"]["vocab"].items()
    }
    (spoilt / "tokenizer.json").write_text(json.dumps(content))
    _write_texts(folder / "datasets")
    _write_questions(folder / "datasets")
    _write_instructions(folder / "datasets")


def _write_texts(folder: Path) -> None:
    news, articles = load_texts("news", "calibration"), load_texts("wikipedia", "held-out")
    rows = [row for document in news for row in (document, document[:90])]
    _write(folder / "bookcorpus/bookcorpus", {"plain_text/train/0000.parquet": Dataset.from_dict({"text": rows})})
    lines = [line for article in articles[:2] for line in (f" = {article[:20]} = ", "", article[:2500])]
    _write(
        folder / "Salesforce/wikitext",
        {f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": Dataset.from_dict({"text": lines})
         for split in ("train", "validation", "test")},
        configs={"wikitext-2-raw-v1": ("train", "validation", "test")},
    )  # fmt: skip
    sentences = [f"{one.strip().lower()} <unk>" for one in ". ".join(load_texts("news", "held-out")[:4]).split(".")]
    _write(
        folder / "ptb-text-only/ptb_text_only",
        {f"penn_treebank/{split}/0000.parquet": Dataset.from_dict({"sentence": sentences[start:]})
         for split, start in (("train", 0), ("validation", 0), ("test", 8))},
    )  # fmt: skip


def _write_instructions(folder: Path) -> None:
    sentences = [one.strip() for one in ". ".join(load_texts("news", "calibration")).split(". ") if 60 < len(one) < 150]
    rows = [
        {"instruction": f"Continue ({number}).", "input": one[:40] if number % 2 else "", "output": one[40:]}
        for number, one in enumerate(sentences[:64])
    ]
    _write(folder / "yahma/alpaca-cleaned", {"data/train-00000-of-00001.parquet": Dataset.from_list(rows)})


def _write_questions(folder: Path) -> None:
    sentences = [one.strip() for one in ". ".join(load_texts("news", "held-out")).split(". ") if 60 < len(one) < 150]
    parts = [sentences[4 * i : 4 * i + 4] for i in range(QUESTIONS)]
    choices = [{"text": [text[:30] for text in part], "label": ["A", "B", "C", "D"]} for part in parts]
    answers = ["ABCD"[i % 4] for i in range(QUESTIONS)]
    boolq = Features({"question": Value("string"), "passage": Value("string"), "idx": Value("int32"),
                      "label": ClassLabel(names=["False", "True"])})  # fmt: skip
    piqa = Features({"goal": Value("string"), "sol1": Value("string"), "sol2": Value("string"),
                     "label": ClassLabel(names=["0", "1"])})  # fmt: skip
    sets = {
        ("aps/super_glue", "boolq"): Dataset.from_list(
            [{"question": p[0][:40], "passage": p[1], "idx": i, "label": int(i < 3)} for i, p in enumerate(parts)],
            boolq,
        ),
        ("baber/piqa", None): Dataset.from_list(
            [{"goal": p[0], "sol1": p[1][:30], "sol2": p[2][:30], "label": i % 2} for i, p in enumerate(parts)], piqa
        ),
        ("Rowan/hellaswag", None): Dataset.from_list(
            [{"ind": i, "activity_label": "News", "ctx_a": p[0], "ctx_b": "the", "ctx": p[0], "endings": p,
              "source_id": "x", "split": "val", "split_type": "indomain", "label": str(i % 4)}
             for i, p in enumerate(parts)]
        ),
        ("allenai/winogrande", "winogrande_xl"): Dataset.from_list(
            [{"sentence": f"{p[0][:30]} because _ was right.", "option1": "Ann", "option2": "Bob",
              "answer": "12"[i % 2]} for i, p in enumerate(parts)]
        ),
        ("allenai/openbookqa", "main"): Dataset.from_list(
            [{"id": str(i), "question_stem": p[0], "choices": choices[i], "answerKey": answers[i]}
             for i, p in enumerate(parts)]
        ),
    }  # fmt: skip
    arc = Dataset.from_list(
        [{"id": str(i), "question": p[0], "choices": choices[i], "answerKey": answers[i]} for i, p in enumerate(parts)]
    )
    splits = ("train", "validation", "test")
    for (name, config), rows in sets.items():
        files = {f"{config or 'data'}/{split}-00000-of-00001.parquet": rows for split in splits}
        _write(folder / name, files, configs={config or "default": splits}, place=config or "data")
    files = {f"{config}/{split}-00000-of-00001.parquet": arc for config in ("ARC-Easy", "ARC-Challenge")
             for split in splits}  # fmt: skip
    _write(folder / "allenai/ai2_arc", files, configs=dict.fromkeys(("ARC-Easy", "ARC-Challenge"), splits))


def _write(folder: Path, files: dict[str, Dataset], configs: dict | None = None, place: str | None = None) -> None:
    """Parquet files, and the card that tells `datasets` which of them belong to which config, as on the hub."""
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / name)
    if configs:
        lines = []
        for config, splits in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in splits:
                lines += [f"  - split: {split}", f"    path: {place or config}/{split}-*"]
        (folder / "README.md").write_text(CONFIGS.format("\n".join(lines)))
