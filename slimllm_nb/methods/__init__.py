"""Pruning methods, made of parts: SlimLLM as published, its rivals, and yours.

`registry` says what a part may ask for and gives it a name, `method` puts six parts together; each other file holds the
parts of one method and says where they come from. prune(..., method=...) takes a name or a mapping of parts.
"""

from slimllm_nb.methods.method import Method, MethodLike, as_method
from slimllm_nb.methods.registry import KINDS, QUANTITIES, Part, PartError, load_file, method_names, register

__all__ = [
    "KINDS",
    "QUANTITIES",
    "Method",
    "MethodLike",
    "Part",
    "PartError",
    "as_method",
    "load_file",
    "method_names",
    "register",
]
