"""The site: what `make site` makes of the committed notebooks, pages and docstrings. Nothing is executed or fetched."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = SETTINGS["tool"]["slimllm-nb"]["repository"]  # empty until the project has an address

project, release = SETTINGS["project"]["name"], SETTINGS["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "notebooks/*.ipynb", "docs/*.md"]
include_patterns += ["assignments/README.md", "data/paper/README.md"]
CONTENTS = {
    "Notebooks": sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")),
    "Guides": ["docs/paper", "docs/results", "docs/your-model", "docs/api"],
    "Course and data": ["assignments/README", "data/paper/README"],
    "The project": ["CONTRIBUTING", "CHANGELOG"],
}

default_role = "literal"  # `name` in a docstring
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # sliders, which have nothing to show without a kernel
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "use_download_button": False}
html_theme_options |= {"navbar_start": [], "navbar_center": [], "navbar_end": [], "navbar_persistent": []}
if REPOSITORY:
    html_theme_options |= {"repository_url": REPOSITORY, "use_repository_button": True}
    html_theme_options |= {"launch_buttons": {"colab_url": "https://colab.research.google.com"}}


def read(app, name: str, source: list[str]) -> None:
    """The table of contents goes behind the README, and links to folders, which the site does not have, become text."""
    text = re.sub(r"\[([^\]]+)\]\((?!http)[^)#]*/\)", r"\1", source[0])
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            lines = "\n".join(pages)
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"
    source[0] = text


def finished(app, error: Exception | None) -> None:
    """The README is the first page."""
    page = Path(app.outdir, "index.html")
    if error is None and not page.exists():
        page.write_text('<meta http-equiv="refresh" content="0; url=README.html">\n', encoding="utf-8")


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("build-finished", finished)
