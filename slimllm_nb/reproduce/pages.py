"""The report: an index with the verdicts, and one page per executed notebook; nothing is fetched to read it.

Formulas are turned into MathML, which browsers draw by themselves, and pictures are inside the page: there is no
script, no style sheet and no font from anywhere else.
"""

import html
import json
import platform
import re
from importlib import metadata
from pathlib import Path

from slimllm_nb.files import ROOT, write_text
from slimllm_nb.reproduce.profiles import Profile
from slimllm_nb.reproduce.verdicts import AGREES, DIFFERS, FAILS, HOLDS, KINDS, WIDTHS, Verdict, by_kind, row

PACKAGES = ["slimllm-nb", "torch", "transformers", "safetensors", "numpy"]
WIDGET = "application/vnd.jupyter.widget-view+json"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
nav { font-size: .9rem; border-bottom: 1px solid #ccc; padding-bottom: .4rem; }
a { color: #0b5cad; } h1 { line-height: 1.2; } img { max-width: 100%; }
pre { font: 13px/1.4 ui-monospace, monospace; white-space: pre; overflow-x: auto; margin: 0; }
.input_area pre { background: #f6f6f6; border-left: 3px solid #8ab; padding: .5rem .7rem; }
.output { padding: .3rem .8rem .6rem; } .output_stderr { background: #fdf1f0; }
.cell { margin: .6rem 0; } .prompt, .anchor-link { display: none; }
blockquote { border-left: 4px solid #d9b44a; background: #fdf9ec; margin: .6rem 0; padding: .1rem 1rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
math[display=block] { margin: .6rem 0; padding: .2rem 0; overflow: auto hidden; }
.holds { color: #00634a; } .fails { color: #a83200; font-weight: bold; } .open { color: #666; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; }
"""


def seconds(executed: Path) -> float:
    """What a notebook took, as papermill wrote it down."""
    return json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]["duration"]


def write_page(executed: Path, page: Path) -> None:
    """An executed notebook as one HTML file."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from pygments.formatters import HtmlFormatter

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return to_mathml(body, "inline")

        def block_math(self, body: str) -> str:
            return to_mathml(body, "block")

        def block_html(self, html: str) -> str:
            # What is folded is HTML, in which the parser looks for no formulas.
            return super().block_html(re.sub(r"\$([^$\n]+)\$", lambda found: to_mathml(found[1], "inline"), html))

        def latex_environment(self, name: str, body: str) -> str:
            return to_mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def markdown(source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        # A progress bar is a widget, which needs a script and has nothing to show once it is done.
        cell.outputs = [one for one in cell.get("outputs", []) if WIDGET not in one.get("data", {})]
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": markdown})
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r'href="([\w-]+)\.ipynb', r'href="\1.html', body)  # the notebooks' links to each other
    body = body.replace('href="../', f'href="{ROOT.as_uri()}/')  # and to other files of the repository
    colours = HtmlFormatter().get_style_defs(".highlight")
    write_text(page, document(executed.stem, f'<nav><a href="index.html">All notebooks</a></nav>\n{body}', colours))


def to_mathml(latex: str, display: str) -> str:
    """A formula as MathML, or as its LaTeX source where that cannot be converted."""
    from latex2mathml.converter import convert

    # The converter knows align, but not aligned and gathered.
    known = re.sub(r"\{(aligned|gathered)\}", "{align}", latex.strip())
    try:
        converted = convert(known, display=display)
    except Exception:  # its errors share no base class
        return f"<code>{html.escape(latex)}</code>"
    return re.sub(r"&(?![#\w]+;)", "&amp;", converted)


def write_index(
    page: Path, profile: Profile, seconds: dict[str, float], verdicts: list[Verdict], tables: dict[str, str]
) -> None:
    """The report's first page: verdicts, the pages of the paper's tables, notebooks with their wall times, settings and
    versions."""
    header = "".join(f"<th>{name}</th>" for name in WIDTHS)
    scoreboard = "\n".join(
        f"<h2>{title}</h2>\n<table><tr>{header}</tr>\n{''.join(map(_verdict_row, some))}</table>"
        for title, some in by_kind(verdicts).items()
    )
    notebooks = "\n".join(
        f'<tr><td><a href="{name}.html">{name}</a></td><td>{took:.0f} s</td></tr>' for name, took in seconds.items()
    )
    tables = " · ".join(f'<a href="{file}">{html.escape(title)}</a>' for title, file in tables.items())
    versions = {"Python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    dense = page.parent.parent / "dense.json"
    device = json.loads(dense.read_text(encoding="utf-8"))["device"] if dense.is_file() else profile.device
    body = f"""<h1>SlimLLM: what was reproduced</h1>
<p>Profile <b>{html.escape(profile.name)}</b>: {html.escape(profile.description)}.
{html.escape(summary(verdicts))}</p>
<p>The paper's numbers are its own, on its models; the measured ones are this run's, on the profile's model.
An asterisk marks a claim whose failure makes the run fail.</p>
{scoreboard}
<h2>The paper's tables, number by number</h2>
<p>{tables}</p>
<h2>Notebooks</h2>
<table><tr><th>notebook</th><th>wall time</th></tr>
{notebooks}</table>
<h2>Settings</h2>
<pre>{html.escape(profile.model_dump_json(indent=1))}</pre>
<h2>Versions</h2>
<p>{", ".join(f"{name} {version}" for name, version in versions.items())}</p>
<p>Computed on: {html.escape(device)}. The same seed gives the same heads and channels on the same processor or card and
with the same versions; others add numbers in another order, and where two are nearly tied another one may go.</p>"""
    write_text(page, document("SlimLLM: what was reproduced", body))


def summary(verdicts: list[Verdict]) -> str:
    """How many claims came out how, in one line."""
    counts = {kind: sum(one.verdict == kind for one in verdicts) for kind in KINDS}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    off = " The dense model is not the published one, so none of this is a reproduction."
    marked = off if any(one.dense_off for one in verdicts) else ""
    return f"{len(verdicts)} claims: {listed}.{marked}" if verdicts else "No claim was judged."


def _verdict_row(one: Verdict) -> str:
    claim = one.claim + (" *" if one.expected else "")
    cells = [claim, f"{one.source}: {one.paper}", one.measured, one.tolerance]
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<tr>{cells}<td class="{style_of(one)}">{html.escape(row(one)["verdict"])}</td></tr>'


def style_of(one: Verdict) -> str:
    """The style sheet's class of a verdict."""
    return {HOLDS: "holds", AGREES: "holds", FAILS: "fails", DIFFERS: "fails"}.get(one.verdict, "open")


def document(title: str, body: str, style: str = "") -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style></head>
<body>
{body}
</body></html>
"""
