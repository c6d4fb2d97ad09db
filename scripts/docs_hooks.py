"""What the pages of docs/ need to become a site, where links to files beside docs/ lead nowhere."""

from __future__ import annotations

import re
from typing import Any

# [text](../path): a file of the repository, which the site does not have. An image or a page of docs/ stays.
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name the files beside docs/ instead of linking to them."""

    def name(match: re.Match[str]) -> str:
        text, path = match.groups()
        return text if path in text else f"{text} (`{path}` in the repository)"

    return OUTSIDE.sub(name, markdown)
