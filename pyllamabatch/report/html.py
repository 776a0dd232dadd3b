"""HTML documents that need no other file."""

import html
from collections.abc import Mapping

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: right }
.text { text-align: left }
svg { max-width: 100%; height: auto }
"""


def document(title: str, *parts: str) -> str:
    """`title` as text, `parts` as HTML."""
    title = html.escape(title)
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def paragraphs(text: str) -> str:
    """A paragraph for each line."""
    return "\n".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines())


def drawings(plots: Mapping[str, str]) -> str:
    """SVG texts below their titles."""
    return "\n".join(f"<h2>{html.escape(name)}</h2>\n{inline(svg)}" for name, svg in plots.items())


def inline(svg: str) -> str:
    """The drawing without what a file of its own begins with."""
    return svg[svg.index("<svg") :]
