"""Files that a package keeps in its folder `templates`: pages, styles, scripts."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def read_template(package: str, name: str) -> str:
    """Return a file of `templates/` in a package such as "src.evaluation"."""
    return resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")
