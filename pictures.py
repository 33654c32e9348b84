"""Pictures: what is predicted for removed patches and words, loss curves, search results; and lines
and words as SVG and PNG. eval.py and experiment.py draw with it. Letters as in mae_clip.py."""

import json
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

import mae_clip  # before torch, as it tells torch's threads how to wait

# isort: split
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from data import DataError, one_line, printable
from machine import whole_file

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")


# --- Lines and words ------------------------------------------------------------------------------
class Drawing:
    """Lines, areas and words that come out alike as SVG and as PNG. Units: points; y downwards."""

    def __init__(self, width, height):
        self.width = width
        self.height = height
        self.shapes = []

    def line(self, points, colour="black", width=1.0):
        """Through points (x,y)."""
        self.shapes.append(("line", points, colour, width))

    def area(self, points, colour, opacity=1.0):
        """A filled polygon."""
        self.shapes.append(("area", points, colour, opacity))

    def words(self, x, y, text, anchor="start"):
        """Text on the base line y; anchor: what of it is at x, its start, middle or end."""
        self.shapes.append(("words", [(x, y)], text, anchor))

    def save_svg(self, path):
        """Writes the drawing as SVG."""
        size = f"0 0 {self.width} {self.height}"
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif"',
            'font-size="9" fill="none"><rect width="100%" height="100%" fill="white"/>',
        ]
        for kind, points, value, more in self.shapes:
            places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            if kind == "line":
                style = f'stroke="{value}" stroke-width="{more}"'
                lines.append(f'<polyline points="{places}" {style}/>')
            elif kind == "area":
                lines.append(f'<polygon points="{places}" fill="{value}" fill-opacity="{more}"/>')
            else:
                x, y = points[0]
                style = f'text-anchor="{more}" fill="black"'
                lines.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(value)}</text>')
        Path(path).write_text("\n".join([*lines, "</svg>\n"]), encoding="utf-8")

    def save_png(self, path, zoom=8):
        """Writes the drawing as PNG, zoom / 2 pixels a point: drawn twice as large, for smooth
        edges."""
        sheet = Image.new("RGB", (self.width * zoom, self.height * zoom), "white")
        draw = ImageDraw.Draw(sheet, "RGBA")
        font = ImageFont.load_default(9 * zoom)
        anchors = {"start": "ls", "middle": "ms", "end": "rs"}
        for kind, points, value, more in self.shapes:
            places = [(x * zoom, y * zoom) for x, y in points]
            if kind == "line":
                draw.line(places, value, round(more * zoom), joint="curve")
            elif kind == "area":
                red, green, blue = ImageColor.getrgb(value)
                draw.polygon(places, (red, green, blue, round(255 * more)))
            else:
                draw.text(places[0], value, "black", font, anchors[more])
        save_picture(sheet.reduce(2), path)


def check_folder(out):
    """DataError, before anything is computed, where the folder of --out is missing."""
    if not Path(out).parent.is_dir():
        raise DataError(f"--out {out}: there is no such folder")


def check_name(path):
    """DataError, before anything is computed, where a picture cannot have that name."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise DataError(
            f"--out {path}: is no name of a picture, which ends in {', '.join(ENDINGS)}"
        )


def save_picture(picture, path):
    """Writes a Pillow image, whole or not at all."""
    path = Path(path)
    with whole_file(path, f"{path.stem}.part{path.suffix}") as file:
        picture.save(file)


def ticks(low, high):
    """Round numbers from low to high, at most seven."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (0.2, 0.5, 1, 2) if high - low <= 6 * step * power) * power
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


# --- Reconstructions ------------------------------------------------------------------------------
def panels(config, found):
    """What reconstructions gives -> {title: patches (B,N,P*P*3) to be drawn}."""
    patches = found["patches"]
    removed = found["image_mask"][..., None]
    columns = {"original": patches}
    if removed.any():
        columns["masked"] = patches.masked_fill(removed, 2.0)  # cream
        predicted = found["image"]
        if config.norm_pix:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            contrast = (variance + 1e-6).sqrt()
            share = ~removed / (~removed).sum(dim=1, keepdim=True)  # 1 / visible ones, or 0
            # The visible patches' mean contrast, and below their mean value.
            usual = (share * contrast).sum(dim=1, keepdim=True)
            alone = predicted * usual + (share * mean).sum(dim=1, keepdim=True)
            columns["prediction alone"] = alone.where(removed, patches)
            predicted = predicted * contrast + mean
        columns["reconstruction"] = predicted.where(removed, patches)
    return columns


def as_pictures(config, patches, side):
    """Patches (B,N,P*P*3) -> list of B Pillow images with `side` pixels a side."""
    size = config.image_size
    pixels = mae_clip.unpatchify(patches, config.patch_size, size, size)
    pixels = pixels * mae_clip.IMAGE_STD + mae_clip.IMAGE_MEAN
    pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each).resize((side, side), Image.Resampling.NEAREST) for each in pixels]


def caption_text(tokenizer, tokens, predicted, removed):
    """Token ids (T,) -> the caption, each removed token as [token:prediction]. Pillow's font has
    little but ASCII: other letters, and bytes that are no whole letter, are escapes."""

    def text(token):
        letters = tokenizer.decode([token]).decode("utf-8", "backslashreplace")
        return letters.encode("ascii", "backslashreplace").decode()

    words = ""
    for token, guess, gone in zip(tokens, predicted, removed, strict=True):
        word = text(token)
        if gone:
            space = " " if word.startswith(" ") else ""
            word = f"{space}[{word.strip()}:{text(guess).strip()}]"
        words += word
    return words


def draw_reconstructions(config, tokenizer, found, path):
    """Writes a picture of what eval.reconstructions found, a row for each pair: what panels gives
    and, where tokens were removed, the caption, of which nine lines fit."""
    columns = panels(config, found)
    font = ImageFont.load_default(14)
    side = config.image_size * max(1, round(160 / config.image_size))
    step = max(side, 160) + 8
    rows = len(found["tokens"])
    sheet = Image.new("RGB", (step * len(columns) + 380, step * rows + 80), "white")
    draw = ImageDraw.Draw(sheet)
    for place, title in enumerate(columns):
        draw.text((8 + place * step, 8), title, "black", font)
        for row, picture in enumerate(as_pictures(config, columns[title], side)):
            sheet.paste(picture, (8 + place * step, 32 + row * step))
    if found["text_mask"].any():
        x = 8 + len(columns) * step
        title = "caption, [removed:predicted]"
        for row in range(rows):
            ids = [found[name][row].tolist() for name in ("tokens", "text", "text_mask")]
            text = caption_text(tokenizer, *ids).replace("][", "] [")  # lines break between them
            if "\\" in text:
                title = "caption, [removed:predicted]; escapes: not ASCII"
            lines = textwrap.fill(text, 44, max_lines=9)
            draw.text((x, 32 + row * step), lines, "black", font)
        draw.text((x, 8), title, "black", font)
    if "prediction alone" in columns:
        note = "prediction alone: at the mean and contrast of the visible patches\n"
        note += "reconstruction: at each removed patch's true ones, which are not predicted"
        draw.text((8, 36 + rows * step), note, "dimgrey", font)
    save_picture(sheet, path)


# --- Search ---------------------------------------------------------------------------------------
def draw_page(title, images, path, side=200):
    """Writes a picture of images, four a row, each [(what stands below it, Pillow image)]."""
    font = ImageFont.load_default(13)
    step = side + 12
    rows = math.ceil(len(images) / 4)
    sheet = Image.new("RGB", (4 * step + 12, rows * (step + 18) + 36), "white")
    draw = ImageDraw.Draw(sheet)
    title = textwrap.shorten(title.encode("ascii", "backslashreplace").decode(), 110)
    draw.text((12, 8), title, "black", font)
    for number, (text, image) in enumerate(images):
        row, column = divmod(number, 4)
        x, y = 12 + column * step, 36 + row * (step + 18)
        sheet.paste(ImageOps.contain(image.convert("RGB"), (side, side)), (x, y))
        text = printable(text).encode("ascii", "backslashreplace").decode()
        draw.text((x, y + side + 2), text[:30], "black", font)
    save_picture(sheet, path)


# --- Curves ---------------------------------------------------------------------------------------
RUN_COLOURS = (
    "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #444444 #8c510a #6a3d9a #b8b800".split()
)
TERMS = ("contrastive", "image", "text", "simclr")


def read_log(folder):
    """A run's folder -> its curves {name: [(step, value)]}: the terms of the loss, what
    --eval-every found as `validation NAME`, and the contrastive loss of guessing as `chance`."""
    curves = defaultdict(list)
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        records = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
        chance = math.log(config["batch_size"])
        for record in records:
            step = record["step"]
            for name in TERMS:
                if name in record:
                    curves[name].append((step, record[name]))
            for name, value in record.get("validation", {}).items():
                curves[f"validation {name}"].append((step, value))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(error)
        raise DataError(f"{folder}: is no run's folder, or its log is damaged ({reason})") from None
    if not curves:
        raise DataError(f"{folder}: its log.jsonl holds no step yet")
    curves["chance"] = [(step, chance) for step, _ in curves.get("contrastive", ())]
    return curves


def draw_curves(logs):
    """{run: what read_log gives} -> a Drawing with a panel for each term of the loss, where
    validation is a thin line with dots, and for each other score of validation."""
    found = [name for curves in logs.values() for name in curves]
    scores = [name.removeprefix("validation ") for name in found if "validation " in name]
    panels = [name for name in TERMS if name in (*found, *scores)]
    panels += [name for name in dict.fromkeys(scores) if name not in (*TERMS, "loss")]
    last = max(step for curves in logs.values() for points in curves.values() for step, _ in points)
    rows = math.ceil(len(panels) / 2)
    drawing = Drawing(420, 150 * rows + 12 * len(logs) + 14)
    for number, name in enumerate(panels):
        row, column = divmod(number, 2)
        lines = []  # (points, colour, width, with dots?)
        for place, curves in enumerate(logs.values()):
            colour = RUN_COLOURS[place % len(RUN_COLOURS)]
            lines.append((curves.get(name), colour, 1.2, False))
            lines.append((curves.get(f"validation {name}"), colour, 0.6, True))
            if name == "contrastive":
                lines.append((curves["chance"], "#888888", 0.6, False))
        lines = [line for line in lines if line[0]]
        draw_chart(drawing, 34 + 206 * column, 150 * row + 18, name, last, lines)
    y = 150 * rows + 12
    for place, run in enumerate(logs):
        colour = RUN_COLOURS[place % len(RUN_COLOURS)]
        drawing.line([(34, y - 3), (50, y - 3)], colour, 1.2)
        drawing.words(55, y, str(run)[-70:])
        y += 12
    drawing.words(34, y, "dots: validation; grey: chance")
    return drawing


def draw_chart(drawing, left, top, title, last, lines):
    """Lines (points (step, value), colour, width, with dots?) over the steps from 0 to `last`, in a
    frame of 165 x 92 points."""
    right, bottom = left + 165, top + 92
    values = [value for points, *_ in lines for _, value in points]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) + 1e-3
    low, high = low - margin, high + margin

    def place(step, value):
        return left + 165 * step / last, bottom - 92 * (value - low) / (high - low)

    drawing.words(left, top - 6, title[:40])
    for value in ticks(low, high):
        _, y = place(0, value)
        drawing.line([(left, y), (right, y)], "#dddddd", 0.6)
        drawing.words(left - 3, y + 3, f"{value:g}", "end")
    for step in ticks(0, last):
        x, _ = place(step, low)
        drawing.line([(x, bottom), (x, bottom + 3)], width=0.6)
        drawing.words(x, bottom + 12, f"{step:g}", "middle")
    drawing.words((left + right) / 2, bottom + 23, "steps", "middle")
    for points, colour, width, dots in lines:
        places = [place(step, value) for step, value in points]
        drawing.line(places, colour, width)
        for x, y in places if dots or len(places) == 1 else ():
            drawing.area([(x - 1.5, y), (x, y - 1.5), (x + 1.5, y), (x, y + 1.5)], colour)
