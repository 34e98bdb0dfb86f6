"""Pages: one file of HTML each, into which the server puts the styles, scripts and dialogs that pages share."""

from pathlib import Path

COMMON = tuple(Path(__file__).with_name(f"common.{kind}") for kind in ("css", "html", "js"))


def read_page(path: Path, link: str = "") -> str:
    """Return a page with the shared parts in the places that name them, as {{common.css}}. link: HTML of its header."""
    text = path.read_text(encoding="utf-8").replace("{{link}}", link)
    for part in COMMON:
        text = text.replace(f"{{{{{part.name}}}}}", part.read_text(encoding="utf-8").rstrip())
    return text
