"""The paper's tables with what was measured beside each number: one page of the report for each, whatever was run.

A number belongs to a profile (Tables 1, 2, 3, 8, 9: claims.py), to a row of a profile's sweep (Tables 4 to 7, `make
ablations`; data/paper/sweeps.yaml says which), or to a layer of a pruned model (Figure 2). Numbers of other methods are
shown and not judged: methods are compared on the models that a run has (notebook 07).
"""

import html
import json
import re
from functools import cache
from pathlib import Path

from pydantic import RootModel

from slimllm_nb.files import write_text
from slimllm_nb.reproduce.claim import Claim, PaperError
from slimllm_nb.reproduce.claims import NAMES, PAPER, make_claim, published_claims, published_rows
from slimllm_nb.reproduce.pages import document, style_of
from slimllm_nb.reproduce.profiles import PROFILES, Profile, load_profile, run_folder
from slimllm_nb.reproduce.verdicts import Verdict, judge_claims
from slimllm_nb.settings import read_validated

FIGURE, FIGURE_PROFILE = "figure2_mean_scale", "llama-7b-50"
SCALES = {"attention_mean_scale": "attention", "ffn_mean_scale": "mlp"}
# A column of Tables 4 to 7 -> what the other tables call it.
SWEPT = {"WikiText2": "wikitext2_ppl", "PTB": "ptb_ppl", "Avg": "average"}
SWEEP = "make ablations"  # in the place of a notebook: where a claim's numbers come from


class _Sweeps(RootModel):
    root: dict[str, dict[str, tuple[str, str, str]]]  # table -> row -> profile, group, method


@cache
def _sweeps() -> dict[str, dict[str, tuple[str, str, str]]]:
    return read_validated(PAPER / "sweeps.yaml", _Sweeps, PaperError).root


def sweep_claims(profile: Profile) -> list[Claim]:
    """The numbers of Tables 4 to 7 that a sweep of this profile answers. Raises: PaperError for a row of a table that
    sweeps.yaml does not name."""
    found = []
    for table, answers in _sweeps().items():
        for number, row in enumerate(published_rows(table)):
            label = ", ".join(value for column, value in row.items() if column not in SWEPT)
            if label not in answers:
                raise PaperError(f"sweeps.yaml: {table} has no answer for the row {label!r}")
            owner, group, method = answers[label]
            for column, other in SWEPT.items() if owner == profile.name else ():
                told = f"{NAMES.get(other.removesuffix('_ppl'), other)}: {label}"
                kind, scale = ("average", 100) if other == "average" else ("perplexity", 1)
                where = {"notebook": SWEEP, "source": table.partition("_")[0].replace("table", "Table ")}
                numbers = f"{group}/{method}/{other}", float(row[column]) / scale, kind
                place = (table, number, column)
                name = f"{table.partition('_')[0]}-{number}-{other}"
                found.append(make_claim(profile, name, told, row[column], *numbers, cell=place, **where))
    return found


def sweep_metrics(folder: Path) -> dict[str, float]:
    """What a sweep left in a run folder, first seed alone: "group/method/column of a table" -> value."""
    found, path = {}, folder / "ablations.json"
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"] if path.is_file() else {}
    for name, group in groups.items():
        for row in group["rows"]:
            values = {f"{corpus}_ppl": value for corpus, value in row["perplexity"].items()}
            if accuracies := list(row.get("accuracy", {}).values()):
                values["average"] = sum(accuracies) / len(accuracies)
            if row["seed"] == 0:
                found |= {f"{name}/{row['method']}/{column}": value for column, value in values.items()}
    return found


def sweep_verdicts(profile: Profile) -> list[Verdict]:
    """On each number that a sweep of this profile answers."""
    return judge_claims(sweep_claims(profile), sweep_metrics(run_folder(profile.name)), profile)


def table_verdicts(profile: Profile) -> list[Verdict]:
    """On each number of the paper's tables that belongs to this profile, from what its runs left."""
    folder, metrics = run_folder(profile.name), {}
    for name in ("by_layer.json", "results.json"):
        if (folder / name).is_file():
            for part in json.loads((folder / name).read_text(encoding="utf-8"))["metrics"].values():
                metrics |= part
    claims = [one for one in published_claims(profile) if one.cell]
    if profile.name == FIGURE_PROFILE:
        claims += _figure_claims(profile)
        metrics |= _scales(folder / profile.settings[profile.strongest].checkpoint / "pruning_report.json")
    return judge_claims(claims, metrics, profile) + sweep_verdicts(profile)


def _figure_claims(profile: Profile) -> list[Claim]:
    found = []
    for number, row in enumerate(published_rows(FIGURE)):
        for column, part in SCALES.items():
            layer, where = int(row["layer_1based"]) - 1, {"source": "Figure 2"}
            told, numbers = f"Mean scale of {part}, layer {layer}", (f"{part}/{layer}", float(row[column]), "scale")
            place = (FIGURE, number, column)
            found.append(make_claim(profile, f"scale-{part}-{layer}", told, row[column], *numbers, cell=place, **where))
    return found


def _scales(report: Path) -> dict[str, float]:
    """Mean scale of every pruned layer's regression, from the report beside a pruned model."""
    layers = json.loads(report.read_text(encoding="utf-8"))["layers"] if report.is_file() else []
    scales = {f"{part}/{one['index']}": one[f"{part}_mean_scale"] for one in layers for part in SCALES.values()}
    return {name: scale for name, scale in scales.items() if scale is not None}


def write_tables(folder: Path) -> dict[str, str]:
    """A page for each table of the paper, from what all profiles' runs left; title -> file name."""
    found: dict[tuple, tuple[Verdict, Profile]] = {}
    for path in sorted(PROFILES.glob("*.yaml")):
        profile = load_profile(path.stem)
        for one in table_verdicts(profile):  # two profiles may have the dense model: the one that was measured
            if one.cell not in found or found[one.cell][0].left is None:
                found[one.cell] = one, profile
    listed = re.findall(r"^\| `(\w+)\.csv` \| ([^|]+) \| (.+) \|$", (PAPER / "README.md").read_text(), re.MULTILINE)
    pages = {}
    for table, title, holds in sorted(listed):
        pages[title] = f"{table.partition('_')[0]}.html"
        write_text(folder / pages[title], document(f"{title} of the paper", _page(table, title, holds, found)))
    return pages


def _page(table: str, title: str, holds: str, found: dict[tuple, tuple[Verdict, Profile]]) -> str:
    rows, missing = published_rows(table), {}
    header = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, text in row.items():
            verdict, profile = found.get((table, number, column), (None, None))
            cells.append(f"<td>{html.escape(text)}{_beside(verdict)}</td>")
            if verdict and verdict.left is None:
                command = SWEEP if verdict.notebook == SWEEP else "make reproduce"
                missing[f"{command} PROFILE={profile.name}"] = profile.model
        lines.append(f"<tr>{''.join(cells)}</tr>")
    needs = "".join(f"<li>{html.escape(f'{model}: {command}')}</li>" for command, model in missing.items())
    return f"""<nav><a href="index.html">The report</a></nav>
<h1>{html.escape(title)} of the paper</h1>
<p>{_code(holds)}.</p>
<p>First the paper's number, below it ours and its verdict. Nothing below: a row of another method (methods are compared
on the models that a run has: notebook 07), or no number of a model.</p>
<div class="wide"><table><tr>{header}</tr>
{"".join(lines)}</table></div>
{f"<p>Not run; needs:</p><ul>{needs}</ul>" if needs else ""}"""


def _beside(verdict: Verdict | None) -> str:
    """Ours and the verdict, in the cell of the paper's number."""
    if verdict is None:
        return ""
    value, column, shown = verdict.left, verdict.cell[2], ""
    if value is not None:
        as_it_is = f"{value:.2f} times as fast" if column.endswith("_s") else f"{value:.4g}"
        real = column.endswith(("_s", "_ppl", "_scale")) or SWEPT.get(column, "").endswith("_ppl")
        shown = as_it_is if real else f"{100 * value:.2f} %"
    lines = filter(None, (shown, verdict.verdict))
    return "".join(f'<br><span class="{style_of(verdict)}">{html.escape(line)}</span>' for line in lines)


def _code(markdown: str) -> str:
    """Bold type alone."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(markdown))
