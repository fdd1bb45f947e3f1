"""Draws small pictures with captions in a grid on one image. Needs Pillow and numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLUMNS = 8  # an even number, so that the two images of a mixed pair stand side by side
# Smaller pictures are enlarged to at least this many pixels, by a whole factor, so that their pixels stay square.
SIDE = 128
MARGIN, GAP, LINE = 24, 12, 17
PAPER, INK, FAINT = (255, 255, 255), (28, 32, 38), (120, 128, 138)


@dataclass(frozen=True)
class Tile:
    """One picture, uint8 [H, W, C] with 1 or 3 channels, and its caption: some lines, then a note in gray."""

    picture: npt.NDArray[np.uint8]
    lines: Sequence[str]
    note: str


def contact_sheet(title: str, subtitle: str, tiles: Sequence[Tile]) -> Image.Image:
    """Draw tiles in rows of COLUMNS below a title. tiles: at least one, with pictures of equal sizes."""
    title_font, font = _font(20), _font(13)
    pictures = [_enlarged(tile.picture) for tile in tiles]
    width, height = pictures[0].size
    lines = max(len(tile.lines) for tile in tiles) + 1
    cell = (width + GAP, height + 6 + LINE * lines + GAP)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    head = MARGIN + 64
    titles = max(title_font.getlength(title), font.getlength(subtitle))
    paper_width = int(max(2 * MARGIN + columns * cell[0] - GAP, 2 * MARGIN + titles))
    sheet = Image.new("RGB", (paper_width, head + rows * cell[1] - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font)
    draw.text((MARGIN, MARGIN + 30), subtitle, FAINT, font)
    for number, (tile, picture) in enumerate(zip(tiles, pictures, strict=True)):
        left, top = MARGIN + number % columns * cell[0], head + number // columns * cell[1]
        sheet.paste(picture, (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=(226, 229, 233))
        at = top + height + 6
        for text, colour in (*((line, INK) for line in tile.lines), (tile.note, FAINT)):
            draw.text((left, at), _fitted(text, font, width), colour, font)
            at += LINE
    return sheet


def _enlarged(picture: npt.NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).convert("RGB")
    times = max(1, -(-SIDE // max(image.size)))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _fitted(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Font:
    """DejaVu Sans if it is installed, because it covers many scripts that class names may use; else Pillow's font."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
