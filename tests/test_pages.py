"""The report's pages, made of the committed notebooks: what is on them leads somewhere and is drawn."""

import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from slimllm_nb.reproduce.pages import to_mathml, write_page
from test_ground import NOTEBOOKS, ROOT


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_to_files_and_nothing_is_left_as_source(name, tmp_path):
    for one in ("index", *NOTEBOOKS):
        (tmp_path / f"{one}.html").touch()
    write_page(ROOT / "notebooks" / f"{name}.ipynb", page := tmp_path / f"{name}.html")
    text = page.read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#]+)', text)
    for link in links:
        where = urlparse(link)
        if where.scheme not in ("http", "https"):
            found = Path(unquote(where.path)) if where.scheme == "file" else tmp_path / unquote(link)
            assert found.is_file(), link
    assert len(links) >= len(NOTEBOOKS) - 1
    prose = re.sub(r"<(pre|code|annotation)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert "```" not in prose
    assert not re.findall(r"\$[^$\s]", prose)
    assert text.count("<details>") == text.count("</details>")


def test_a_formula_is_drawn():
    assert "<msqrt>" in to_mathml(r"\sqrt{x}", "inline")
    assert to_mathml(r"\begin{aligned} a &= b \end{aligned}", "block").startswith("<math")
