"""Prose from a Wikipedia dump: whole paragraphs of real articles, without a trace of wiki markup.

mwparserfromhell parses the markup; this file decides what of it reads as prose. Templates cannot be expanded without
Wikipedia's own template pages, so a paragraph with a template or formula that would leave a hole in a sentence is left
out as a whole. Raise VERSION whenever the resulting text changes: it names the cached file.
"""

import bz2
import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell
from mwparserfromhell import nodes

VERSION = 1
MIN_PARAGRAPH = 100  # characters; shorter lines are captions, stray list items and the like
MIN_ARTICLE = 1000  # characters of prose; below it an article is a stub or a list

HOLE = "\0"  # stands for something that cannot be written as text
LEFTOVER = re.compile(r"\0|</?[a-z]|[{}|]|\[\[|\]\]")  # a hole, or markup that its author got wrong
LAST_SECTIONS = {"see also", "references", "notes", "footnotes", "external links", "further reading", "bibliography"}
SILENT_TAGS = {"ref", "references", "gallery", "table", "timeline", "div", "imagemap", "hr"}
# Notes and pronunciations: the sentence reads on without them.
SILENT_TEMPLATES = re.compile(
    r"citation needed|rp|sfnp?|refn|efn|respell|clarify|page needed|when|who|which|by whom|vague|main|clear"
    r"|failed verification|better source|unreliable source\?|weasel-inline|qualify evidence|inflation-fn|coord"
    r"|lang-.+|ipa.*|linktext|rtl-lang|#tag:ref"
)
SHOWN_PARAMETER = {"lang": 1, "nowrap": 0, "sc": 0}  # which of its parameters the template shows, unchanged
SPACES = {"nbsp": " ", "snd": " – ", "spaced ndash": " – ", "mdashb": "—", "'s": "'s", "'": "'"}


def read_articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and prose of every article in a bz2-compressed MediaWiki XML dump, in the order of the dump.

    Only namespace 0 counts; redirects, disambiguation pages and articles with little prose are left out. The XML is
    read as a stream, so the size of the dump does not matter. Raises OSError or ElementTree.ParseError on a damaged
    file.
    """
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag.rpartition("}")[2] != "page":
                continue
            title = element.findtext("{*}title")
            is_article = element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
            if is_article and not title.endswith("(disambiguation)"):
                prose = clean(element.findtext("{*}revision/{*}text"))
                if len(prose) >= MIN_ARTICLE:
                    yield title, prose
            element.clear()


def clean(wikitext: str) -> str:
    """The prose paragraphs of one article, separated by blank lines."""
    paragraphs = []
    for line in _render(mwparserfromhell.parse(wikitext)).split("\n"):
        if line.startswith("=") and line.strip("= ").lower() in LAST_SECTIONS:
            break
        paragraph = _tidy(line)
        if _is_prose(paragraph):
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _is_prose(line: str) -> bool:
    """Long enough, whole sentences from the first to the last, no list item or heading, no hole, no markup."""
    if len(line) < MIN_PARAGRAPH or line[0] in "=*:;#!" or line[0].islower():
        return False
    return line.rstrip("\"')”’").endswith((".", "!", "?")) and not LEFTOVER.search(line)


def _tidy(line: str) -> str:
    """Repair what dropped notes and pronunciations leave behind: empty brackets, doubled spaces, stray quotes."""
    line = html.unescape(line).replace("'''", "").replace("''", "")
    line = re.sub(r"\(\s*(?:[;,:/]\s*)+|\(\s+(?:or\s+)?", "(", line)
    line = re.sub(r"[\s;,:]+\)", ")", line)
    line = re.sub(r"\s*\(\s*\)", "", line)
    line = re.sub(r"\s+([,;.:])(?=\s|$)", r"\1", line)
    line = re.sub(r"([,;])(?:\s*[,;])+", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()


def _render(wikicode) -> str:
    return "".join(map(_render_node, wikicode.nodes))


def _render_node(node) -> str:
    match node:
        case nodes.Text():
            return node.value
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Template():
            return _render_template(node)
        case nodes.Wikilink():
            # "File:x", "Category:x", "fr:x" show no text; "Alien: Resurrection" has a space and is an article.
            if re.match(r"\s*:?[\w -]+:(?! )", str(node.title)):
                return ""
            return _render(node.text) if node.text is not None else str(node.title)
        case nodes.ExternalLink():
            return _render(node.title) if node.title is not None else ""
        case nodes.Heading():
            return f"\n={node.title.strip()}=\n"
        case nodes.Tag():
            return _render_tag(node)
    return ""  # comments and template arguments


def _render_tag(tag) -> str:
    name = str(tag.tag).lower()
    if name in ("li", "dd", "dt"):
        return "*"
    if name == "br":
        return " "
    if name in SILENT_TAGS:
        return ""
    if name in ("math", "code", "source", "pre", "syntaxhighlight", "tt", "poem"):
        return HOLE
    return _render(tag.contents) if tag.contents is not None else ""


def _render_template(template) -> str:
    name = str(template.name).strip().lower()
    values = [_render(parameter.value).strip() for parameter in template.params if not parameter.showkey]
    if name in SPACES:
        return SPACES[name]
    if name in ("convert", "cvt") and len(values) > 1:
        return f"{values[0]} {values[1]}"
    if len(values) > SHOWN_PARAMETER.get(name, len(values)):
        return values[SHOWN_PARAMETER[name]]
    return "" if SILENT_TEMPLATES.fullmatch(name) else HOLE
