"""Pruned models in vLLM: the same greedy tokens as transformers'. Outside the two commands: make test-engines."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from conftest import make_small_model
from slimllm_nb import calibration, pruning, sources
from slimllm_nb.export import save_checkpoint, to_even_groups
from slimllm_nb.export.even_groups import has_even_groups
from slimllm_nb.files import ROOT
from slimllm_nb.sources import as_llama

VLLM = os.environ.get("SLIMLLM_NB_VLLM", "")  # the Python of an environment that has it
pytestmark = pytest.mark.skipif(not VLLM, reason="make test-engines: vLLM has an environment of its own")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 320, "num_hidden_layers": 3}
TOKENS, PROMPTS = 32, [[5, 80, 3], [200, 7], [11, 12, 13, 14, 15], [300], [1, 2, 3, 4, 5, 6, 7, 8]]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    found = {}
    for name in json.loads(sys.argv[1]):
        model = LLM(name, trust_remote_code=True, dtype="float32", max_model_len=64, enforce_eager=True,
                    skip_tokenizer_init=True, disable_log_stats=True)
        how = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": one} for one in json.loads(sys.argv[3])]
        found[name] = [list(one.outputs[0].token_ids) for one in model.generate(asked, how, use_tqdm=False)]
        del model
    print("FOUND" + json.dumps(found))

if __name__ == "__main__":
    main()
"""


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@torch.no_grad()
def greedy(model, prompt: list[int]) -> list[int]:
    """Without a cache, and without generate()."""
    ids = torch.tensor([prompt])
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def qwen() -> LlamaForCausalLM:
    """With biases that are not zero."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"hidden_size": 256} | heads)).eval()
    for name, one in model.named_parameters():
        if name.endswith("bias"):
            one.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return as_llama(model)


def cases() -> dict[str, tuple[LlamaForCausalLM, dict]]:
    even = {"method": {"head_selection": {"name": "greedy", "even_groups": True}}}
    return {
        "multi-head": (make_small_model(8, **SHAPE), {}),
        "uneven groups": (make_small_model(2, **SHAPE), {}),
        "even groups": (make_small_model(2, **SHAPE), even),
        "tied": (make_small_model(2, **SHAPE, tie_word_embeddings=True), {}),
        "qwen": (qwen(), {}),
    }


def test_the_same_greedy_tokens(tmp_path):
    """Multi-head, grouped with even and with expanded groups, tied and untied heads, biases of Qwen2."""
    ids = torch.randint(0, 320, (8, 24), generator=torch.Generator().manual_seed(0))
    expected, uneven = {}, []
    for name, (dense, options) in cases().items():
        amount = {"pruning_ratio": 0.4, "pruned_layers": 2, "alpha": 1.0, "progress": False} | options
        pruned = pruning.prune(dense, ids, **amount)[0]
        uneven.append(not has_even_groups(pruned))
        served = to_even_groups(pruned) if uneven[-1] else pruned
        served.save_pretrained(tmp_path / name)
        expected[str(tmp_path / name)] = [greedy(pruned, one) for one in PROMPTS]
    assert uneven == [False, True, False, True, True]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)  # a file: vLLM starts processes, which read it again
    command = [VLLM, str(program), json.dumps(list(expected)), str(TOKENS), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("FOUND")]
    assert json.loads(line.removeprefix("FOUND")) == expected


def test_a_request_is_answered_by_the_server(tmp_path):
    """tools/export.py serve, and OpenAI's interface."""
    model, tokenizer = sources.load_model(), sources.load_tokenizer()
    ids = calibration.draw_samples(sources.load_texts("news", "calibration"), tokenizer, num_samples=4)
    pruned, report = pruning.prune(model, ids, pruning_ratio=0.25, pruned_layers=24, alpha=10, progress=False)
    save_checkpoint(pruned, tokenizer, tmp_path / "model", report=report)
    text = "The government said on Monday that"
    start = tokenizer(text, return_tensors="pt")["input_ids"]
    written = pruned.generate(start, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    options = ["--vllm", VLLM, "--port", "8765", "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "tools/export.py", "serve", str(tmp_path / "model"), *options, "--max-model-len", "256"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        body = {"model": str(tmp_path / "model-even"), "prompt": text, "max_tokens": TOKENS, "temperature": 0}
        request = urllib.request.Request("http://127.0.0.1:8765/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        answer, deadline = None, time.monotonic() + 400
        while answer is None and time.monotonic() < deadline and server.poll() is None:
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["text"]
            except OSError:
                time.sleep(3)
    finally:
        server.terminate()
        server.wait(60)
    assert "groups made even: " in (tmp_path / "log").read_text()
    assert answer == tokenizer.decode(written[0, start.shape[1] :], skip_special_tokens=True), answer
