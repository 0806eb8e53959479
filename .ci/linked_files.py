"""A hook of mkdocs: what a page of docs/ links elsewhere in the repository is put into the site, as plain text.

On GitHub such a link (`../examples/train_ddp.py`) leads to the file, in the site to `files/examples/train_ddp.py.txt`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    linked = {target for page in files.documentation_pages() for target in LINK.findall(page.content_string)}
    for target in sorted(linked):
        if (ROOT / target).is_file():  # else the link stays as it is, and the strict build fails
            content = (ROOT / target).read_text(encoding="utf-8")
            files.append(File.generated(config, f"files/{target}.txt", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(lambda link: f"](files/{link[1]}.txt)" if (ROOT / link[1]).is_file() else link[0], markdown)
