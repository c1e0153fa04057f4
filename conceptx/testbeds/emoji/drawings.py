"""The drawings: rendered from the vendors' SVG files, and turned into training pictures by small random changes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from conceptx.progress import track
from conceptx.testbeds.emoji.vocabulary import OBJECTS, STYLES

SIDE = 96  # pixels of a rendered drawing
PIXELS = 32  # pixels of a training picture


def fetch_icons(folder: Path) -> None:
    """Fetch the four icon packages with npm into `folder`, unless they are there.

    Raises FileNotFoundError when npm is missing, ValueError when it cannot fetch a package.
    """
    for style in STYLES:
        target = folder / style.package / "icons.json"
        if target.is_file():
            continue
        name = f"@iconify-json/{style.package}@{style.version}"
        if shutil.which("npm") is None:
            raise FileNotFoundError(f"npm is needed to fetch {name}; or give a folder that holds it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        call = ["npm", "pack", "--silent", name]
        done = subprocess.run(call, cwd=target.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"npm could not fetch {name}: {done.stderr.strip()[-200:]}")
        with tarfile.open(target.parent / done.stdout.split()[-1]) as archive:
            member = archive.extractfile("package/icons.json")
            assert member is not None
            target.write_bytes(member.read())


def rendered(work: Path, icons: Path | None) -> Tensor:
    """All drawings, of icon packages in a folder, or fetched with npm into `work`."""
    work.mkdir(parents=True, exist_ok=True)
    if icons is None:
        fetch_icons(work / "icons")
    return render(icons or work / "icons")


def render(folder: Path) -> Tensor:
    """All drawings as premultiplied RGBA in [0, 1]: (objects, styles, 4, 96, 96), trimmed and centred."""
    sets = [json.loads((folder / style.package / "icons.json").read_text(encoding="utf-8")) for style in STYLES]
    rows = [[_drawing(icons, thing.icon) for icons in sets] for thing in track(OBJECTS, "drawings")]
    return torch.stack([torch.stack(row) for row in rows])


def _drawing(icons: dict, name: str) -> Tensor:
    import resvg_py
    from PIL import Image

    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg.replace("currentColor", "#000"), width=160, height=160))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getbbox())
    scale = (SIDE - 4) / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 4).permute(2, 0, 1) / 255
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]])


@dataclass(frozen=True)
class Variation:
    """How far a training picture may be from its drawing.

    shift, scale: of the drawing, in shares of the picture.  tint: of the background.  colour: mix of the channels.
    turn:         degrees of rotation.  watermark: share of the pictures that get the corner mark.
    """

    shift: float = 0.06
    scale: tuple[float, float] = (0.85, 1.08)
    tint: float = 0.06
    colour: float = 0.06
    turn: float = 0.0
    watermark: float = 0.2


def pictures(drawings: Tensor, variation: Variation, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(pictures (n, 3, 32, 32) in [0, 1], which of them carry the watermark) from drawings (n, 4, 96, 96)."""
    n = len(drawings)
    moved = _moved(drawings, variation, draw)
    colour, alpha = moved[:, :3], moved[:, 3:]
    mix = torch.eye(3) + variation.colour * (2 * torch.rand(n, 3, 3, generator=draw) - 1)
    colour = torch.einsum("nij,njhw->nihw", mix, colour)
    background = 1 - variation.tint * torch.rand(n, 3, 1, 1, generator=draw)
    whole = (colour + (1 - alpha) * background).clamp(0, 1)
    marked = torch.rand(n, generator=draw) < variation.watermark
    return torch.where(marked[:, None, None, None], stamped(whole), whole), marked


def _moved(drawings: Tensor, variation: Variation, draw: torch.Generator) -> Tensor:
    """Shifted, scaled and turned, sampled at twice the size and averaged down."""
    n = len(drawings)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=draw)

    scale, angle = 1 / between(*variation.scale), torch.deg2rad(between(-variation.turn, variation.turn))
    across, down = (2 * between(-variation.shift, variation.shift) for _ in range(2))
    rows = [[scale * angle.cos(), -scale * angle.sin(), across], [scale * angle.sin(), scale * angle.cos(), down]]
    where = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(where, [n, 4, 2 * PIXELS, 2 * PIXELS], align_corners=False)
    return F.avg_pool2d(F.grid_sample(drawings, grid, align_corners=False), 2)


def stamped(images: Tensor) -> Tensor:
    """The pictures with the watermark: a magenta square with a white bar in the lower right corner."""
    out = images.clone()
    out[:, :, -6:-1, -6:-1] = images.new_tensor([0.85, 0.0, 0.55])[:, None, None]
    out[:, :, -4:-3, -5:-2] = 1.0
    return out


def contact_sheet(images: Tensor, columns: int, *, scale: int = 2) -> Tensor:
    """Pictures (n, 3, h, w) side by side in rows of `columns`: (3, H, W)."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = images.new_ones(rows * columns, 3, h + 2, w + 2)
    sheet[:n, :, 1:-1, 1:-1] = images
    grid = (
        sheet.view(rows, columns, 3, h + 2, w + 2).permute(2, 0, 3, 1, 4).reshape(3, rows * (h + 2), columns * (w + 2))
    )
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def save_png(image: Tensor, path: Path) -> None:
    """A picture (3, h, w) in [0, 1] as a PNG file."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def grouped(drawings: Tensor, objects: Tensor, styles: Tensor) -> Tensor:
    """The drawings of pairs (object, style): (n, 4, 96, 96)."""
    return drawings[objects, styles]
