"""The frame of a page: its head with the policy, title, key figures, sections and the one script."""

from collections.abc import Mapping
from html import escape

from data_gen.page.blocks import hash_inline_block
from data_gen.page.style import SCRIPT, STYLE


def render_document(title: str, lead: str, figures: str, sections: Mapping[str, tuple[str, str]]) -> str:
    """Return a whole page that loads nothing else. title is text; lead, figures and the sections' bodies are HTML.

    sections are {anchor: (heading, HTML)}; one without HTML is left out.
    """
    sections = {key: section for key, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    body = "\n".join(
        f'<section><h2 id="{key}">{title}</h2>\n{html}</section>' for key, (title, html) in sections.items()
    )
    hashes = f"style-src '{hash_inline_block(STYLE)}'; script-src '{hash_inline_block(SCRIPT)}'"
    policy = f"default-src 'none'; {hashes}; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{lead}</p>
<nav aria-label="Parts of the page">{links}</nav>
</header>
{figures}
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def render_figure(label: str, value: str, note: str = "") -> str:
    """Return one key figure with its label and note."""
    note = f"<small>{escape(note)}</small>" if note else ""
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{note}</dd></div>"
