"""SlimLLM (ICML 2025) as a small library: the ground that the notebooks stand on.

Importing the package loads nothing heavy; import the module that holds the idea you need, such as `slimllm_nb.heads`.
"""

__version__ = "0.1.0"
