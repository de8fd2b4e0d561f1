# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [raw]
# # ASSIGNMENT CONFIG
# name: a5_your_own_method
# export_cell: false
# check_all_cell: true
# show_question_points: true
# tests:
#   ok_format: false

# %% [markdown]
# # Assignment 5 · A method of your own, judged fairly
#
# | | |
# |---|---|
# | Points | 29 (21 graded by themselves, 8 by a reader) |
# | Time | 90 to 120 minutes, of which the computer takes 3 |
# | Difficulty | medium |
# | After | notebook `07_ablations` and `08_your_own_method` |
#
# **Goal.** Think of a channel score of your own, test it, and find out whether it is better than the published one: at the same number of parameters, on the same samples, over several draws of them, with an interval. The grade does not depend on whether it wins.
#
# Write your code where a cell says `...`; `grader.check("q1")` runs the tests that you can see. Run the notebook from top to bottom before you hand it in.

# %%
import math

import torch

from slimllm_nb.comparison import compare
from slimllm_nb.methods import STATISTICS

# %% [markdown]
# ## Question 1: the idea (5 points, 25 minutes)
#
# A channel score is a function whose parameters name what it needs and that returns a score for every channel: higher is more important. Yours may ask for any of these, and must look at activations in some way:

# %%
ALLOWED = [
    "input_norms",
    "input_means",
    "input_variances",
    "mlp_input_norms",
    "gate_weight",
    "up_weight",
    "output_weight",
]
for name in ALLOWED:
    print(f"{name}: {STATISTICS['channel_score'][name]}")

# %% [markdown]
# `input_...` are statistics of the input of `down_proj`, one for every channel. It must choose neither the same channels as SlimLLM nor the same as notebook 08's score, the deviation of a channel times the L2 norm of its weights.

# %% [raw]
# # BEGIN QUESTION
# name: q1
# points: 5

# %% [raw]
# # BEGIN SOLUTION

# %%
# BEGIN PROMPT
# def my_score(...):  # the statistics that it needs, by name
#     ...
my_score = None


# END PROMPT
# BEGIN SOLUTION NO PROMPT
def my_score(input_variances, output_weight):
    """How far a channel moves the outputs, added up over them: its deviation times the sum of its weights' sizes."""
    return input_variances.sqrt() * output_weight.to(input_variances).abs().sum(dim=0)


# END SOLUTION

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_is_a_part(my_score, ALLOWED):
    from slimllm_nb.methods.registry import make_part

    assert callable(my_score), f"my_score: expected a function, found {type(my_score).__name__}"
    needs = make_part("channel_score", "my_score", my_score).needs
    assert set(needs) <= set(ALLOWED), f"my_score asks for {sorted(set(needs) - set(ALLOWED))}; allowed: {ALLOWED}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_prunes(my_score):
    import torch
    from slimllm_nb.pruning import prune

    def small():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "vocab_size": 60,
        }
        return LlamaForCausalLM(LlamaConfig(**shape)).eval(), torch.randint(0, 60, (6, 16))

    model, ids = small()
    _, report = prune(
        model, ids, pruning_ratio=0.5, pruned_layers=3, alpha=0.0, method={"channel_score": my_score}, progress=False
    )
    kept = [len(line.kept_channels) for line in report.layers]
    assert kept == [24, 24, 24], f"half of 48 channels of 3 layers: expected 24 to stay in each, found {kept}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_is_another_choice_and_looks_at_activations(my_score):
    import torch
    from slimllm_nb.methods.registry import make_part
    from slimllm_nb.pruning import prune

    def small():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "vocab_size": 60,
        }
        return LlamaForCausalLM(LlamaConfig(**shape)).eval(), torch.randint(0, 60, (6, 16))

    model, ids = small()
    amount = {"pruning_ratio": 0.5, "pruned_layers": 3, "alpha": 0.0, "progress": False}

    def notebook_08(input_variances, output_weight):
        return input_variances.sqrt() * output_weight.norm(dim=0)

    mine, slimllm, fluctuation = (
        [line.kept_channels for line in prune(model, ids, **amount, method={"channel_score": score})[1].layers]
        for score in (my_score, "feature_space", notebook_08)
    )
    assert mine != slimllm, "expected other channels than SlimLLM's in some layer, found the same in all"
    assert mine != fluctuation, "expected other channels than notebook 08's score in some layer, found the same in all"
    activations = {"input_norms", "input_means", "input_variances", "mlp_input_norms"}
    needs = make_part("channel_score", "my_score", my_score).needs
    assert set(needs) & activations, (
        f"expected one of {sorted(activations)} among what it asks for, found {list(needs)}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 2: its oracle (5 points, 15 minutes)
#
# The same once more, as slow and as plain as you can: a loop over channels and plain Python numbers. It takes the same statistics by the same names.

# %% [raw]
# # BEGIN QUESTION
# name: q2
# points: 5

# %% [raw]
# # BEGIN SOLUTION

# %%
# BEGIN PROMPT
literal_score = None


# END PROMPT
# BEGIN SOLUTION NO PROMPT
def literal_score(input_variances, output_weight):
    scores = []
    for channel in range(len(input_variances)):
        sizes = [abs(float(output_weight[output, channel])) for output in range(len(output_weight))]
        scores.append(math.sqrt(float(input_variances[channel])) * sum(sizes))
    return torch.tensor(scores, dtype=torch.float64)


# END SOLUTION

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_loops(literal_score):
    import ast
    import inspect
    import textwrap

    assert callable(literal_score), f"literal_score: expected a function, found {type(literal_score).__name__}"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(literal_score)))
    except OSError:
        return
    loops = (ast.For, ast.ListComp, ast.GeneratorExp)
    assert any(isinstance(one, loops) for one in ast.walk(tree)), (
        "literal_score: expected a loop over channels, found none"
    )


# %%
""" # BEGIN TEST CONFIG
points: 4
hidden: true
"""  # END TEST CONFIG


def test_both_agree(my_score, literal_score):
    import inspect
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {"input_norms": (9,), "input_means": (9,), "input_variances": (9,), "mlp_input_norms": (5,)}
    shapes |= {"gate_weight": (9, 5), "up_weight": (9, 5), "output_weight": (5, 9)}
    known = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    known |= {name: known[name].abs() for name in shapes if name.endswith(("norms", "variances"))}
    wanted = {name: known[name] for name in inspect.signature(my_score).parameters if name in known}
    one, other = my_score(**wanted), literal_score(**wanted)
    off = (torch.as_tensor(one).double() - torch.as_tensor(other).double()).abs().max().item()
    assert off < 1e-9, (
        f"my_score and literal_score on random statistics: expected the same, found scores that differ by {off:.3g}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 3: compare (4 points, 10 minutes)
#
# Compare your score with SlimLLM at the "20" setting of the default model: three draws of eight calibration samples each, every model with as many decoder parameters as SlimLLM's (`compare` sees to that, and puts SlimLLM in by itself). Judge on `news`, of which other documents are calibrated on, and on `hamlet`, of which nothing is. Give your method the name `mine`. It takes two to three minutes.

# %% [raw]
# # BEGIN QUESTION
# name: q3
# points: 4

# %% [raw]
# # BEGIN SOLUTION

# %%
found = ...
# BEGIN SOLUTION NO PROMPT
mine, judge_on = {"name": "mine", "channel_score": my_score}, ["news", "hamlet"]
found = compare([mine], settings=["20"], seeds=3, num_samples=8, judge_on=judge_on, progress=False)
# END SOLUTION

# %%
found

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 2
"""  # END TEST CONFIG


def test_rows(found):
    assert found is not None and found is not ..., "found is not set: call compare"
    rows = sorted((row.method, row.seed) for row in found.rows)
    expected = [(method, seed) for method in ("mine", "slimllm") for seed in range(3)]
    assert rows == expected, f"rows: expected {expected}, found {rows}"


# %%
""" # BEGIN TEST CONFIG
points: 2
hidden: true
"""  # END TEST CONFIG


def test_fair(found):
    samples = found.protocol.num_samples
    assert samples == 8, f"calibration samples: expected 8, found {samples}"
    share = {(row.method, row.seed): row.decoder_share for row in found.rows}
    off = max(abs(share["mine", seed] - share["slimllm", seed]) for seed in range(3))
    assert off <= 0.003, f"decoder left: expected the same within 0.003, found a difference of {off:.4f}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 4: the interval (5 points, 20 minutes)
#
# With every seed both methods see the same samples, so the ratio of their perplexities is one observation. Take logarithms of the ratios, their mean and the deviation of a *sample* of $n$, and Student's $t$ with $n - 1$ degrees of freedom (4.303 for three seeds at 95 %); then go back to a change in percent.

# %% [raw]
# # BEGIN QUESTION
# name: q4
# points: 5

# %% [raw]
# # BEGIN SOLUTION


# %%
def interval(ours, theirs, student):
    """Two lists of perplexities, seed by seed -> (change, low, high) in percent."""
    # BEGIN SOLUTION
    logs = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    mean = sum(logs) / len(logs)
    variance = sum((one - mean) ** 2 for one in logs) / (len(logs) - 1)
    half = student * math.sqrt(variance / len(logs))
    return tuple(100 * (math.exp(one) - 1) for one in (mean, mean - half, mean + half))
    # END SOLUTION


# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_the_same_ratio(interval):
    found = interval([12.0, 24.0, 48.0], [10.0, 20.0, 40.0], 4.303)
    assert found is not None, "interval returned None: write its body"
    found = [round(one, 6) for one in found]
    assert found == [20.0, 20.0, 20.0], f"always a fifth above: expected (20, 20, 20), found {found}"


# %%
""" # BEGIN TEST CONFIG
points: 4
hidden: true
"""  # END TEST CONFIG


def test_as_the_library(interval):
    from slimllm_nb.reproduce.differences import difference

    ours, theirs = [11.0, 24.0, 52.0, 9.0, 14.0], [10.0, 20.0, 40.0, 10.0, 13.0]
    expected = difference([a / b for a, b in zip(ours, theirs, strict=True)])
    found = interval(ours, theirs, 2.7764451)
    for name, one, other in zip(
        ("change", "low", "high"), found, (expected.change, expected.low, expected.high), strict=True
    ):
        assert abs(one - other) < 1e-3, f"five seeds, {name}: expected {other:.3f}, found {one:.3f}"


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 5: the verdict (2 points, 5 minutes)
#
# `"lower"` or `"higher"` where the whole interval lies on that side of no change, else `"inconclusive"`.

# %% [raw]
# # BEGIN QUESTION
# name: q5
# points: 2

# %% [raw]
# # BEGIN SOLUTION


# %%
def verdict(low, high):
    """The ends of an interval, in percent -> "lower", "higher" or "inconclusive"."""
    # BEGIN SOLUTION
    return "higher" if low > 0 else "lower" if high < 0 else "inconclusive"
    # END SOLUTION


# %%
# What this says of your comparison, corpus by corpus:
# BEGIN SOLUTION
for corpus in found.protocol.judge_on:
    by_method = {
        method: [r.perplexity[corpus] for r in found.rows if r.method == method] for method in ("mine", "slimllm")
    }
    change, low, high = interval(by_method["mine"], by_method["slimllm"], 4.303)
    print(f"{corpus}: {change:+.1f} % [{low:+.1f}, {high:+.1f}], {verdict(low, high)}")
# END SOLUTION

# %% [raw]
# # END SOLUTION

# %% [raw]
# # BEGIN TESTS

# %%
""" # BEGIN TEST CONFIG
points: 1
"""  # END TEST CONFIG


def test_lower(verdict):
    found = verdict(-5.0, -1.0)
    assert found == "lower", f"-5 to -1 %: expected 'lower', found {found!r}"


# %%
""" # BEGIN TEST CONFIG
points: 1
hidden: true
"""  # END TEST CONFIG


def test_others(verdict):
    found = [verdict(0.5, 3.0), verdict(-1.0, 2.0)]
    assert found == ["higher", "inconclusive"], (
        f"0.5 to 3 % and -1 to 2 %: expected 'higher' and 'inconclusive', found {found}"
    )


# %% [raw]
# # END TESTS

# %% [raw]
# # END QUESTION

# %% [markdown]
# ## Question 6: the report (8 points, written, 30 minutes)
#
# Half a page: what your score looks at and why you thought it would help; what came out, corpus by corpus, with intervals; what the numbers cannot tell; and what you would do next. Two points for each:
#
# | | 2 points | 1 point | 0 points |
# |---|---|---|---|
# | idea | says what the score measures and why that should matter for the output | says what it computes | neither |
# | result | every corpus with its interval and a verdict in words, the one that was not calibrated on set apart | numbers without intervals or without that corpus | none |
# | limits | names at least two: seeds, one small model, one setting, samples, equal size but not equal speed | one | none, or claims more than was measured |
# | next | an experiment that could show the idea to be wrong | more of the same | none |

# %% [raw]
# # BEGIN QUESTION
# name: q6
# manual: true
# points: 8

# %% [raw]
# # BEGIN SOLUTION

# %% [markdown]
# *By the table above.* A report of a score that loses, with honest intervals and a next experiment that could refute the idea, gets all points; one that calls a difference of 3 % on three seeds an improvement although its interval contains 0 loses both points for limits.

# %% [raw]
# # END SOLUTION

# %% [raw]
# # END QUESTION
