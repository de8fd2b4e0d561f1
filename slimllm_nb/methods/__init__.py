"""Pruning methods, made of parts: SlimLLM as published, its rivals, and yours.

`statistics` lists what a part may ask for, `registry` gives it a name and puts six parts together, `checked` looks at
what they return; each other file holds the parts of one method and says where they come from. prune(..., method=...)
takes a name or a mapping of parts.
"""

from slimllm_nb.methods.checked import PartError
from slimllm_nb.methods.registry import KINDS, Method, MethodLike, Part, as_method, load_file, method_names, register
from slimllm_nb.methods.statistics import STATISTICS

__all__ = [
    "KINDS",
    "STATISTICS",
    "Method",
    "MethodLike",
    "Part",
    "PartError",
    "as_method",
    "load_file",
    "method_names",
    "register",
]
