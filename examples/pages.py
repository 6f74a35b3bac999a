"""Bring the tables and pictures of finished runs into docs: `python -m examples.pages`.

A page's table is what `--compare` left in out/<name>; a picture is made smaller by a palette.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import typer
from PIL import Image

from visattn_kernels.errors import expected
from visattn_kernels.viz.output import Target

ROOT = Path(__file__).parent.parent
PICTURES = {
    "sagan_digits": "sagan_digits/sagan.png",
    "sagan_digits_dcgan": "sagan_digits_dcgan/dcgan.png",
    "attention_masks": "one_mask/masks.png",
    "axial_resnet": "axial/axial.png",
}
"""Pictures of docs, and the files of runs in out/ that they are made of."""


def include(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of that name in a page.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- run:{name} -->\n", f"<!-- /run:{name} -->"
    found = page.read_text()
    if begin not in found or end not in found:
        raise expected(f"a page with the marks {begin.strip()} and {end}", "page", page, ValueError)
    Target(page).write(re.sub(f"{begin}.*{end}", lambda _: begin + text + end, found, flags=re.S).encode())


def main() -> None:
    """Tables into docs/examples, pictures into docs/pictures; what has no run is left as it is."""
    for page in sorted((ROOT / "docs" / "examples").glob("*.md")):
        for name in re.findall("<!-- run:(\\w+) -->", page.read_text()):
            table = ROOT / "out" / name / "compare.md"
            if table.exists():
                include(page, name, table.read_text())
                typer.echo(f"{name} in {page.relative_to(ROOT)}")
    for name, run in PICTURES.items():
        if (ROOT / "out" / run).exists():
            content = io.BytesIO()
            Image.open(ROOT / "out" / run).convert("RGB").quantize(256).save(content, format="png", optimize=True)
            Target(ROOT / "docs" / "pictures" / f"{name}.png").write(content.getvalue())
            typer.echo(f"docs/pictures/{name}.png")


if __name__ == "__main__":
    main()
