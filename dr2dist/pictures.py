"""Pictures for people: written aside and renamed, in fonts that have their letters."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dr2dist.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

ENDINGS = (".png", ".svg", ".pdf")
WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "IPAexGothic",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
)
"""Families with Chinese, Japanese and Korean letters, which matplotlib's own has not."""


def save_picture(figure: Figure, path: str | Path) -> None:
    """Writes a figure, of the type that the path ends with, one of ENDINGS. Letters that no font of
    this machine has are boxes, and a line in the log says how many."""
    _spell(figure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with atomic_write(Path(path)) as aside:
            figure.savefig(aside, format=Path(path).suffix.removeprefix(".").lower(), dpi=120)
    missing = [str(found.message) for found in caught if "missing from" in str(found.message)]
    if missing:
        log.warning(
            "%s: %d letter(s) are drawn as boxes, for no font here has them: install one, such as "
            "fonts-noto-cjk",
            path,
            len(set(missing)),
        )


def plain(text: str) -> str:
    """A name as it is: between two dollars matplotlib would read a formula."""
    return text.replace("$", r"\$")


def _spell(figure: Figure) -> None:
    """Lets all text fall back to those fonts that are there."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    there = {font.name for font in font_manager.fontManager.ttflist}
    families = ["sans-serif", *(name for name in WIDE_FONTS if name in there)]
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontfamily(families)
