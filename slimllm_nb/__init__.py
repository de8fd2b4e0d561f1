"""SlimLLM (ICML 2025) as a small library: the ground that the notebooks stand on. In the order in which to read it:

1. The paper, tensors in and tensors out: `heads` (section 4.1), `channels` (4.2), `regression` (4.3), `ratios` (4.4).
2. `calibration`: the samples, and what a decoder layer makes of them.
3. `pruning`: the four ideas in order, `prune(model, input_ids, ...)`; `modeling`: the model that comes out.
4. `evaluation`: perplexity, size, zero-shot accuracy, speed; `export`: checkpoints that travel, stock models, GGUF.
5. What stands around it: `sources` (models and texts), `reproduce` (profiles, the paper's claims, verdicts and the
   steps of `make reproduce`), `plots`, `llama` (what is asked of a model), `files`.

Importing the package loads nothing heavy; import the module that holds the idea you need, such as `slimllm_nb.heads`.
"""

__version__ = "0.1.0"
