"""Write the tables of README.md that come from what data/ablations keeps: make results

They stand between two comments; what is written by hand around them stays. tests/test_tools.py tells stale ones.
"""

import sys

from slimllm_nb.comparison import Comparison
from slimllm_nb.comparison.kept import Kept, kept_ablations
from slimllm_nb.export.checkpoint import markdown_table
from slimllm_nb.files import ROOT, write_text
from slimllm_nb.reproduce.differences import percent

README = ROOT / "README.md"
START, END = "<!-- `make results` writes from here -->", "<!-- to here -->"
MANY = 900  # percent; what is more is shown as a factor
GROUPS = ("methods", "goal")  # those that README shows


def replaced(text: str, kept: Kept) -> str:
    """README with today's tables. Errors: ValueError where the two comments are not there, once each, in this order."""
    before, found, rest = text.partition(START)
    _, ended, after = rest.partition(END)
    if not found or not ended or START in after or END in after:
        raise ValueError(f"README.md must hold {START} and {END} once each")
    tables = "\n\n".join(section(kept.groups[name]) for name in GROUPS if name in kept.groups)
    return f"{before}{START}\n{tables}\n{END}{after}"


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
        row = {f"{setting} % setting": f"`{method}`" if " " not in method else method}
        for corpus, shown in zip(found.protocol.judge_on, line, strict=False):
            row[corpus] = shown
            if method != found.reference:
                change = changes.loc[(setting, method, corpus)]
                size = f"{percent(change.change)} %"
                if change.change > MANY:
                    size = f"{1 + change.change / 100:,.0f} times"
                row[corpus] += f", {size}" if change.verdict == "cannot be told" else f", **{size}**"
        rows.append(row | {"decoder left": line["decoder left"], "seconds": line["seconds"]})
    return markdown_table(rows)


def main() -> int:
    kept = kept_ablations()
    if kept is None:
        print("Nothing is kept: make ablations, then make reference", file=sys.stderr)
        return 1
    write_text(README, replaced(README.read_text(encoding="utf-8"), kept))
    print(f"{README.name}: tables of {', '.join(name for name in GROUPS if name in kept.groups)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
