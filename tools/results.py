"""Write the tables of docs/results.md from what data/ablations, data/bench.json and data/gpu keep: make results

They stand between two comments; what is written by hand around them stays. tests/test_tools.py tells stale ones.
"""

import json
import sys

from slimllm_nb.comparison import Comparison
from slimllm_nb.comparison.kept import Kept, kept_ablations
from slimllm_nb.comparison.table import mean_and_change
from slimllm_nb.export.checkpoint import markdown_table
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.reproduce.differences import percent

CURVE = ROOT / "docs" / "_static" / "curve.png"
QUANTIZED = ROOT / "data" / "quantized.json"
PAGE, BENCH, GPU = ROOT / "docs" / "results.md", ROOT / "data" / "bench.json", ROOT / "data" / "gpu"
START, END = "<!-- `make results` writes {} from here -->", "<!-- {}: to here -->"
MANY = 900  # percent; what is more is shown as a factor
GROUPS = ("methods", "goal")  # those that are shown
SLIM, BEST = "SlimLLM", "OBS heads and ridge"
# See Kept.beside.
EVEN = {
    SLIM: ("even groups", "slimllm", None),
    f"{SLIM}, even groups": ("even groups", "even groups", SLIM),
    BEST: ("even groups", BEST, None),
    f"{BEST}, even groups": ("even groups", f"{BEST} in even groups", BEST),
}


def own(kept: Kept) -> dict[str, tuple[str, str, str]]:
    """Every draw of samples that the debates judge, for SlimLLM and the best, beside SlimLLM with the first draw."""
    draws = [name for name, group in kept.groups.items() if "debates" in group.protocol.judge_on]
    methods = {SLIM: "slimllm", BEST: BEST}
    return {f"{name}, {draw}": (draw, methods[name], f"{SLIM}, {draws[0]}") for name in methods for draw in draws}


def sections() -> dict[str, str]:
    """What is written, by the name in the comments around it."""
    kept, sizes = kept_ablations(), kept_ablations("embedded-curve")
    return {
        "methods": tables(kept),
        "accuracies": accuracies(sizes.groups["accuracy"]),
        "even groups": beside(kept, EVEN),
        "generated samples": beside(kept, own(kept)),
        "the bench": bench_table(json.loads(BENCH.read_text(encoding="utf-8"))),
        "multiples and quantized weights": quantized_table(json.loads(QUANTIZED.read_text(encoding="utf-8"))),
        "the GPU": gpu_table(),
    }


def replaced(text: str, contents: dict[str, str]) -> str:
    """The page with other contents between two comments each. Raises: ValueError where these are not there, once each,
    in this order."""
    for name, content in contents.items():
        start, end = START.format(name), END.format(name)
        before, found, rest = text.partition(start)
        _, ended, after = rest.partition(end)
        if not found or not ended or start in after or end in after:
            raise ValueError(f"docs/results.md must hold {start} and {end} once each")
        text = f"{before}{start}\n{content}\n{end}{after}"
    return text


def accuracies(found: Comparison) -> str:
    """Zero-shot accuracy in percent, mean over tasks and seeds; its change against SlimLLM, seed by seed."""
    values, rows = {}, [{"decoder left": "100 %", SLIM: f"{100 * found.dense.average:.1f}"}]
    for row in found.rows:
        values.setdefault(row.setting, {}).setdefault(row.method, []).append(100 * row.average)
    for setting, methods in values.items():
        line = {"decoder left": f"{100 - float(setting):g} %"}
        for method, of_seeds in methods.items():
            slim = methods[found.reference]
            pairs = [] if method == found.reference else zip(of_seeds, slim, strict=True)
            line[SLIM if method == found.reference else _named(method)] = mean_and_change(
                of_seeds, [one / other for one, other in pairs]
            )
        rows.append(line)
    return markdown_table([dict.fromkeys(rows[-1], "") | row for row in rows])


def _named(method: str) -> str:
    """As code where it is a name that as_method knows."""
    return method if " " in method else f"`{method}`"


def tables(kept: Kept) -> str:
    """All groups that are shown."""
    return "\n\n".join(section(kept.groups[name]) for name in GROUPS if name in kept.groups)


def bench_table(bench: dict) -> str:
    """What `tools/bench.py` measured, a line for each number, beside what was to be reached."""

    def times(found: dict) -> str:
        return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"

    rows, machine = [], bench["machine"]
    if prune := bench.get("prune"):
        rows += [
            ("`prune()`, 32 x 128 tokens, over one forward pass", times(prune["prune_over_forward"]), "3.0"),
            ("... activations of the MLPs never kept", times(prune["streamed_over_forward"]), "3.6"),
        ]
    if layer := bench.get("layer"):
        what = "a layer of LLaMA-7B's shape, 4,096 tokens: all beyond its forward pass, over that"
        rows.append((what, times(layer["layer7b_over_forward"]), "2.5"))
    if literal := bench.get("literal"):
        spent = sum(literal["literal_seconds"].values())
        same = "same heads and channels" if literal["same_heads"] and literal["same_channels"] else "another choice"
        rows.append(
            (
                f"... and a literal implementation ({spent:,.0f} s), over the same; {same}",
                f"{literal['layer7b_speedup_over_literal']:.0f}",
                "at least 20",
            )
        )
    if growth := bench.get("growth"):
        seconds = growth["seconds_per_sample"]
        shown = ", ".join(f"{number}: {value:.2f}" for number, value in seconds.items())
        peak = growth["peak_beyond_hidden_states"]["512"] / 2**20
        rows += [
            ("seconds per sample in some layers, by the number of samples", shown, "the same"),
            (
                f"peak memory beside model and hidden states, kept twice ({peak:.0f} MiB), 512 samples against 32",
                f"{100 * growth['peak_growth_32_to_512']:+.0f} %",
                "10 % at most",
            ),
        ]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    head = f"{machine['processor']}, {machine['memory']}, {versions}; median and range of repeated runs."
    keys = ("", "measured", "wanted")
    return f"{head}\n\n" + markdown_table([dict(zip(keys, row, strict=True)) for row in rows])


def quantized_table(found: dict) -> str:
    """What tools/quantized.py measured: each row beside the one that it differs from in one thing, seed by seed."""
    rows, lines = {}, []
    for weights, measured in found["dense"].items():
        line = {"setting": "dense", "channels in multiples of": "", "weights": weights}
        for corpus, value in measured.items():
            line[corpus] = f"{value:.1f}"
            if weights != "float32":
                line[corpus] += f", {percent(100 * (value / found['dense']['float32'][corpus] - 1))} %"
        lines.append(line)
    for row in found["rows"]:
        rows.setdefault((row["setting"], row["channel_multiple"], row["weights"]), []).append(row)
    for (setting, multiple, weights), group in rows.items():
        reference = rows[setting, 1 if weights == "float32" else multiple, "float32"]
        line = {"setting": f"{setting} %", "channels in multiples of": str(multiple), "weights": weights}
        for corpus in found["corpora"]:
            pairs = [] if group is reference else zip(group, reference, strict=True)
            line[corpus] = mean_and_change([one[corpus] for one in group], [a[corpus] / b[corpus] for a, b in pairs])
        lines.append(line)
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    return f"Three draws of samples, measured at commit {found['commit']}, {versions}.\n\n{markdown_table(lines)}"


def gpu_table() -> str:
    """The newest file of data/gpu; see slimllm_nb/gpu."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in GPU.glob("*.json")]
    if not files:
        return "*Not yet run on a GPU.*"
    newest = max(files, key=lambda one: one["date"])
    versions = ", ".join(f"{package} {number}" for package, number in newest["versions"].items())
    rows, faster = [], {}
    for part, found in newest["parts"].items():
        if part == "speed" and "failed" not in found:
            for name, (_, ratio) in ((name, one) for name, one in found.items() if isinstance(one, list)):
                model, case = name.split(", batch ")
                faster.setdefault(model, {"": model})[f"batch {case}"] = f"{ratio:.2f}"
            continue
        for name, value in found.items():
            if value is not True or part != "equal":
                rows.append({"part": part, "": name, "measured": _shown(value)})
    head = f"{newest['card']} ({newest['GB']} GB, driver {newest['driver']}), {versions}, {newest['date']}."
    speed = "Speed in float16, how often that of the dense model (above 1: faster; medians, paper Table 3):"
    return "\n\n".join([head, markdown_table(rows), *([speed, markdown_table([*faster.values()])] if faster else [])])


def _shown(value: object) -> str:
    """A figure to four digits."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def section(found: Comparison) -> str:
    """A group as Markdown: what it was measured under, and a table for every setting."""
    protocol = found.protocol
    head = (
        f"{protocol.num_samples} calibration samples of {protocol.length} tokens from other documents of "
        f"{' and '.join(protocol.calibrate_on)}, {found.summary().seeds.max()} seeds. {found.dense_line}"
    )
    return "\n\n".join([head, *(table(found, setting) for setting in dict.fromkeys(row.setting for row in found.rows))])


def table(found: Comparison, setting: str) -> str:
    """A line for every method: perplexity on every corpus with its change against SlimLLM, what is left, seconds."""
    changes, rows = found.differences(), []
    for method, line in found.table().loc[setting].iterrows():
        row = {f"{setting} % setting": _named(method)}
        for corpus, shown in zip(found.protocol.judge_on, line, strict=False):
            row[corpus] = shown
            if method != found.reference:
                change = changes.loc[(setting, method, corpus)]
                size = f"{percent(change.change)} %"
                if change.change > MANY:
                    size = f"{1 + change.change / 100:,.0f} times"
                row[corpus] += f", {size}" if change.verdict == "inconclusive" else f", **{size}**"
        rows.append(row | {"decoder left": line["decoder left"], "seconds": line["seconds"]})
    return markdown_table(rows)


def beside(kept: Kept, lines: dict[str, tuple[str, str, str | None]]) -> str:
    """Kept.beside as Markdown, a table for every setting."""
    found = kept.beside(lines)
    return "\n\n".join(
        markdown_table(found.loc[setting].rename_axis(f"{setting} % setting").reset_index().to_dict("records"))
        for setting in found.index.levels[0]
    )


def main() -> int:
    write_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), sections()))
    CURVE.write_bytes(kept_ablations("embedded-curve").groups["curve"].curve().png())
    return 0


if __name__ == "__main__":
    sys.exit(main())
