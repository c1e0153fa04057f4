"""Pictures side by side in one PNG: rows are prompts, columns are what was done to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from conceptx.edit import Edit
from conceptx.store import write_atomically

if TYPE_CHECKING:
    from conceptx.models import ImageModel

GAP = 2  # pixels between pictures
LETTERS = 12  # height of the labels in pixels
SMALLEST = 64  # smaller pictures are enlarged to at least this


def contact_sheet(
    path: str | Path,
    model: ImageModel,
    edits: Mapping[str, Edit],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    before: str = "un-edited",
    **options: Any,
) -> Path:
    """Draw each prompt without an edit and with each of them, from the same seed in a row; returns the PNG's path.

    edits: what to write above a column -> the edit.  options: as the model's `generate` has them.
    Raises ValueError when an edit is in force on the model or a column would be called `before`.
    """
    model.require_unedited()
    if before in edits:
        raise ValueError(f"{before!r} is the column without an edit; call the edit something else.")
    seeds = range(seed, seed + len(prompts))
    columns = {before: model.generate(prompts, seeds=seeds, **options)}
    for name, edit in edits.items():
        with edit.applied(model):
            columns[name] = model.generate(prompts, seeds=seeds, **options)
    return columns_sheet(path, columns, prompts)


def columns_sheet(path: str | Path, columns: Mapping[str, Float[Tensor, "n 3 h w"]], rows: Sequence[str]) -> Path:
    """Pictures that were drawn before: a column under each name, a row for each label."""
    return grid(path, [list(pictures) for pictures in zip(*columns.values(), strict=True)], rows, list(columns))


def grid(
    path: str | Path,
    pictures: Sequence[Sequence[Float[Tensor, "3 h w"]]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Path:
    """Any table of pictures in [0, 1] of one size (objects x styles, say) as a PNG; returns its path.

    Small pictures are enlarged by a whole factor, each pixel to a square. Labels are left out where there are none.
    Raises ValueError when rows differ in length, pictures in size, or labels do not fit their number.
    """
    _check(pictures, rows, columns)
    tiles = [[_tile(picture) for picture in row] for row in pictures]
    width, height = tiles[0][0].size
    sheet = _Sheet(width, height, rows, columns, (len(tiles), len(tiles[0])))
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            sheet.image.paste(tile, sheet.corner(i, j))
    path = Path(path)
    write_atomically(path, lambda temporary: sheet.image.save(temporary, format="PNG"))
    return path


def _check(pictures: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str]) -> None:
    counts = {len(row) for row in pictures}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"A grid needs rows of the same length of at least one picture, got {sorted(counts)}.")
    if len(shapes := {tuple(picture.shape) for row in pictures for picture in row}) > 1:
        raise ValueError(f"The pictures of a grid have one size, got {sorted(shapes)}.")
    for labels, count, what in ((rows, len(pictures), "rows"), (columns, counts.pop(), "columns")):
        if labels and len(labels) != count:
            raise ValueError(f"The grid has {count} {what} and {len(labels)} labels for them.")


def _tile(picture: Float[Tensor, "3 h w"]) -> Any:
    from PIL import Image

    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    factor = -(-SMALLEST // min(image.size)) if min(image.size) < SMALLEST else 1
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


class _Sheet:
    """White paper with labels on it, and where each picture goes."""

    def __init__(
        self, width: int, height: int, rows: Sequence[str], columns: Sequence[str], shape: tuple[int, int]
    ) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.width, self.height = width, height
        font = ImageFont.load_default(LETTERS)
        self.left = max((int(font.getlength(row)) + 2 * GAP for row in rows), default=0)
        self.top = LETTERS + 3 * GAP if columns else 0
        size = (self.left + shape[1] * (width + GAP), self.top + shape[0] * (height + GAP))
        self.image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(self.image)
        for i, label in enumerate(rows):
            pen.text((GAP, self.corner(i, 0)[1] + height // 2), label, "black", font, anchor="lm")
        for j, label in enumerate(columns):
            while font.getlength(label) > width and len(label) > 1:  # cut, so that labels do not run into each other
                label = label[:-1]
            pen.text((self.corner(0, j)[0], GAP), label, "black", font)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(left, top) of a picture."""
        return self.left + column * (self.width + GAP), self.top + row * (self.height + GAP)
