"""The experiment: does masked autoencoding help CLIP, and at what amount of data?

    python eval.py experiment                                the README's figure: 120 runs
    python eval.py experiment --quick                        18 of them
    python eval.py experiment --csv docs/experiment.csv      uses the runs that this table holds
    python eval.py experiment --scale base --data SHARDS --samples 1000000,10000000 --steps 20000

Runs mae_clip.py once for each arm, number of unique pairs, pooling and seed, at equal pairs seen;
flags that are not listed below are its own and go to every run. An arm is a method, or a method
with flags of its own: clip@steps=900@lr=0.01. The gain is that of the second arm over each other
one, paired by seed. OUT holds experiment.csv (a row a run), experiment.md (the table),
experiment.svg and .png (the figure), and each run's folder and log. What is there is not run again;
what was interrupted goes on.
"""

import argparse
import csv
import fcntl
import json
import math
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

import mae_clip
from data import DataError
from eval import format_table, say

AXES = ("arm", "samples", "pool", "seed")  # what tells the runs of a table apart
# Settings in which runs of one table may differ, beside the axes; all others must be the same.
FREE = mae_clip.MAY_CHANGE - {"data", "eval_data", "tokenizer", "vocab_size"}
MEASURES = {  # of the table; the figure draws the first that all arms have
    "zero_shot acc1": "zero-shot accuracy",
    "retrieval image_retrieval_recall@10": "text to image recall@10",
    "retrieval text_retrieval_recall@10": "image to text recall@10",
    "linear_probe acc1": "linear probe accuracy",
}


# --- Runs -----------------------------------------------------------------------------------------
def run_flags(key, flags):
    """The flags of mae_clip.py for a run; key: its (arm, samples, pool, seed), as text."""
    arm, samples, pool, seed = key
    method, *own = arm.split("@")
    line = [*flags, "--method", method, "--samples", samples, "--pool", pool, "--seed", seed]
    for setting in own:
        name, _, value = setting.partition("=")
        line += [mae_clip.flag(name), value]
    return line


def settings(key, flags):
    """{setting: value, as text} of a run: all that its results depend on, but the axes."""
    config = asdict(mae_clip.parse(run_flags(key, flags)))
    return {name: str(config[name]) for name in config if name not in FREE.union(AXES)}


def read_rows(path, flags):
    """The runs of a table -> {key: row of text}; DataError where one was run with other
    settings."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        key = tuple(row.get(axis) for axis in AXES)
        if None in key:
            raise DataError(f"{path}: is no table of runs, which has the columns {AXES}")
        wanted = settings(key, flags)
        other = [name for name in wanted if row.get(name) != wanted[name]]
        if other:
            then = " ".join(f"{mae_clip.flag(name)} {row.get(name)}" for name in other)
            raise DataError(
                f"{path}: {' '.join(key)} was run with {then}; give that, or another table"
            )
        found[key] = row
    return found


def write_rows(path, rows):
    """Writes {key: row} as a table, whole or not at all."""
    columns = {}
    for row in rows.values():
        columns |= row
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    part.replace(path)


def commit():
    """The commit of the code that runs, where it lies in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def make_row(key, flags, results):
    """What results.json of a run says, as a row of the table, all as text."""
    row = dict(zip(AXES, key, strict=True)) | settings(key, flags)
    for task, entry in results.items():
        if isinstance(entry, dict) and "chance" in entry:
            for name in entry["chance"]:
                row[f"{task} {name}"] = repr(entry[name])
    return row | {"seconds": str(round(results["seconds"])), "commit": commit()}


def launch(slot, jobs):
    """The beginning of a run's command and its environment, for the slot-th of `jobs` runs at a
    time: cores and GPUs are shared out."""
    devices = list(range(torch.cuda.device_count()))[slot::jobs]
    command = [sys.executable]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(device) for device in devices)
    if len(devices) > 1:
        processes = str(len(devices))
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [*command, mae_clip.__file__], environment


class Runner:
    """Runs what is missing, `jobs` at a time."""

    def __init__(self, out, flags, jobs):
        self.out = out
        self.flags = flags
        self.jobs = jobs
        self.running = set()
        self.slots = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)

    def run(self, key):
        """One run from its start or its newest checkpoint to its results -> its row; DataError
        where it failed."""
        folder = self.out / "-".join(key)
        slot = self.slots.get()
        command, environment = launch(slot, self.jobs)
        command = [*command, *run_flags(key, self.flags), "--out", str(folder), "--resume"]
        try:
            with open(f"{folder}.log", "a") as log:
                # The run inherits the lock. Should it outlive this program, a later one waits.
                fcntl.flock(log, fcntl.LOCK_EX)
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
                )
                self.running.add(process)
                code = process.wait()
                self.running.remove(process)
        finally:
            self.slots.put(slot)
        if code:
            last = Path(f"{folder}.log").read_text().strip().splitlines()[-1:]
            raise DataError(f"{folder}: exit code {code}: {' '.join(last)}")
        return make_row(key, self.flags, json.loads((folder / "results.json").read_text()))

    def run_all(self, keys, rows):
        """Adds the rows of all keys to rows {key: row} and to the table -> how many failed."""
        failed = 0
        with ThreadPoolExecutor(self.jobs) as pool:
            runs = {pool.submit(self.run, key): key for key in keys}
            try:
                for run in tqdm(as_completed(runs), "runs", total=len(runs), disable=None):
                    try:
                        rows[runs[run]] = run.result()
                    except (ValueError, OSError) as error:
                        failed += 1
                        say(error)
                        continue
                    write_rows(self.out / "experiment.csv", rows)
                    say(f"done: {' '.join(runs[run])}, {rows[runs[run]]['seconds']} s of training")
            except KeyboardInterrupt:
                say("interrupted; runs are being saved, and the same command goes on")
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.running.copy():
                    process.terminate()
                raise
        return failed


# --- Numbers --------------------------------------------------------------------------------------
def student_t(freedom):
    """The 97.5th percentile of Student's t with so many degrees of freedom. With
    t = sqrt(freedom) tan(u) the density of u is proportional to cos(u)^(freedom - 1)."""
    u = np.linspace(0, math.pi / 2, 1_000_000)
    below = np.cumsum(np.cos(u) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(u[np.searchsorted(below, 0.95 * below[-1])])


def interval(values):
    """Numbers, one a seed -> their mean and half of its 95 % interval; NaN for a single one."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def by_seed(rows, measure, arm, samples, pool):
    """{seed: per cent} of the runs that have the measure."""
    found = {}
    for key, row in rows.items():
        if key[:3] == (arm, samples, pool) and row.get(measure):
            found[key[3]] = 100 * float(row[measure])
    return found


def gain(rows, measure, arm, other, samples, pool):
    """The leads of an arm over another, in points, of each seed that both have."""
    first = by_seed(rows, measure, arm, samples, pool)
    second = by_seed(rows, measure, other, samples, pool)
    return [first[seed] - second[seed] for seed in first if seed in second]


def values_of(rows, axis):
    """The different values of an axis in {key: row}, as text, numbers in their order."""
    values = {key[AXES.index(axis)] for key in rows}
    return sorted(values, key=lambda value: (value.isdigit() and int(value), value))


def make_table(rows, arms, style):
    """Scores (mean, standard deviation over seeds) and paired gains [95 % interval] -> text."""
    others = [arm for arm in arms if arm != arms[1]]
    table = [["measure, %", "unique pairs", "pool", *arms]]
    table[0] += [f"{arms[1]} less {other}, points" for other in others] + ["seeds"]
    for measure, title in MEASURES.items():
        for samples in values_of(rows, "samples"):
            for pool in values_of(rows, "pool"):
                cells = [title, f"{int(samples):,}", pool]
                for arm in arms:
                    scores = list(by_seed(rows, measure, arm, samples, pool).values())
                    spread = f" ({stdev(scores):.1f})" if len(scores) > 1 else ""
                    cells.append(f"{mean(scores):.1f}{spread}" if scores else "-")
                for other in others:
                    leads = gain(rows, measure, arms[1], other, samples, pool)
                    middle, half = interval(leads) if leads else (math.nan, math.nan)
                    cells.append(f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]")
                    count = len(leads)
                if count:
                    table.append([*cells, str(count)])
    return format_table(table, style)


# --- Figure ---------------------------------------------------------------------------------------
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
        sheet.reduce(2).save(path)


COLOURS = ("#0072b2", "#d55e00", "#444444")  # of the poolings; told apart by the colour-blind too
CORNERS = (24, 4, 3)  # of their markers: round, square, triangle
FILLS = ("white", None, "#bbbbbb")  # of the arms' markers; None: the pooling's colour


def marker(drawing, x, y, pool, arm):
    """The sign of a pooling (its number) and an arm (its number)."""
    angles = np.linspace(0, 2 * math.pi, CORNERS[pool], endpoint=False) + math.pi / CORNERS[pool]
    points = [(x + 3 * math.sin(angle), y + 3 * math.cos(angle)) for angle in angles]
    drawing.area(points, FILLS[arm % 3] or COLOURS[pool])
    drawing.line([*points, *points[:2]], COLOURS[pool])


def ticks(low, high):
    """Round numbers from low to high, at most six."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (0.2, 0.5, 1, 2) if high - low <= 5 * step * power) * power
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def draw_panel(drawing, left, title, amounts, lines):
    """One panel, 150 points wide: a line for each of `lines`, (name, number of its pooling, number
    of its arm, [(unique pairs, value, half of the interval or NaN)])."""
    top, bottom, right = 24, 130, left + 150
    ends = [0.0]
    for *_, points in lines:
        for _, value, half in points:
            reach = 0 if math.isnan(half) else half
            ends += [value - reach, value + reach]
    low, high = min(ends), max(ends) + 1e-9

    def place(pairs, value):
        far = math.log(pairs / amounts[0]) / max(1e-9, math.log(amounts[-1] / amounts[0]))
        return left + 8 + 134 * far, bottom - (bottom - top) * (value - low) / (high - low)

    drawing.words(left - 20, 14, title)
    for value in ticks(low, high):
        _, y = place(amounts[0], value)
        drawing.line([(left, y), (right, y)], "#dddddd", 0.5)
        drawing.words(left - 3, y + 3, f"{value:g}", "end")
    for pairs in amounts:
        x, _ = place(pairs, low)
        drawing.line([(x, bottom), (x, bottom + 3)], width=0.7)
        drawing.words(x, bottom + 12, f"{pairs / 1000:g}k", "middle")
    _, zero = place(amounts[0], 0)
    drawing.line([(left, zero), (right, zero)], width=0.7)
    drawing.words((left + right) / 2, bottom + 23, "unique pairs (log scale)", "middle")
    for row, (name, pool, arm, points) in enumerate(lines):
        band = [place(pairs, value + half) for pairs, value, half in points]
        band += [place(pairs, value - half) for pairs, value, half in reversed(points)]
        if not np.isnan(band).any():
            drawing.area(band, COLOURS[pool], 0.15)
        middle = [place(pairs, value) for pairs, value, _ in points]
        drawing.line(middle, COLOURS[pool], 1.2)
        for x, y in middle:
            marker(drawing, x, y, pool, arm)
        y = bottom + 38 + 11 * row
        marker(drawing, left, y - 3, pool, arm)
        drawing.words(left + 8, y, name)


def draw_figure(rows, arms):
    """The gain of the second arm over each other one, and all scores, against unique pairs ->
    Drawing; None where no measure has both."""
    amounts = [int(samples) for samples in values_of(rows, "samples")]
    for measure, title in MEASURES.items():
        gains = []
        scores = []
        for number, pool in enumerate(values_of(rows, "pool")):
            for place, arm in enumerate(arms):
                leads = []
                means = []
                for samples in amounts:
                    score = list(by_seed(rows, measure, arm, str(samples), pool).values())
                    lead = gain(rows, measure, arms[1], arm, str(samples), pool)
                    if score:
                        means.append((samples, mean(score), math.nan))
                    if lead:
                        leads.append((samples, *interval(lead)))
                scores.append((f"{arm}, {pool}", number, place, means))
                if arm != arms[1]:
                    gains.append((f"over {arm}, {pool}", number, place, leads))
        if any(points for *_, points in gains):
            drawing = Drawing(400, 170 + 11 * len(scores))
            draw_panel(drawing, 34, f"gain of {arms[1]}, points", amounts, gains)
            draw_panel(drawing, 236, f"{title}, %", amounts, scores)
            return drawing
    return None


# --- Command line ---------------------------------------------------------------------------------
def parse(argv):
    """The command line -> its values, and the flags that are mae_clip.py's."""
    parser = argparse.ArgumentParser(
        "eval.py experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    values = {
        "method": ("clip,mae_clip", "arms"),
        "samples": ("1000,2500,6000,16000,40000", "numbers of unique pairs"),
        "pool": ("gap,max", "poolings"),
        "seed": ("3,4,5,6,7,8", "seeds"),
        "csv": ("", "tables of runs to use as well"),
        "out": ("runs/experiment", "folder"),
        "jobs": (max(1, os.cpu_count() // 2), "runs at a time, which share cores and GPUs"),
    }
    if "--quick" in argv:
        values |= {name: (value, values[name][1]) for name, value in QUICK.items()}
    parser.add_argument(
        "--quick", action="store_true", help="fewer: three amounts, gap, three seeds"
    )
    for name, (value, text) in values.items():
        text += ", with commas between" if isinstance(value, str) and name != "out" else ""
        parser.add_argument(
            f"--{name}", default=value, type=type(value), help=f"{text} (default: {value})"
        )
    return parser.parse_known_args(argv)


QUICK = {"samples": "1000,6000,40000", "pool": "gap", "seed": "3,4,5"}


def run(argv):
    """Runs the command line -> the table; ValueError or OSError for bad input; exit code 1 where a
    run failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    args, flags = parse(argv)
    arms = args.method.split(",")
    if len(set(arms)) < 2:
        raise DataError(f"--method {args.method}: takes two arms or more, such as clip,mae_clip")
    wanted = []
    for seed in args.seed.split(","):  # outermost: an early figure has all amounts
        for samples in args.samples.split(","):
            for pool in args.pool.split(","):
                wanted += [(arm, samples, pool, seed) for arm in arms]
    for key in wanted:
        settings(key, flags)  # what does not fit is said now
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    own = out / "experiment.csv"
    tables = [path for path in args.csv.split(",") if path]
    if own.exists():
        tables.append(own)
    rows = {}
    for path in tables:
        rows |= read_rows(path, flags)
    missing = [key for key in wanted if key not in rows]
    say(f"{len(wanted)} runs, {len(missing)} of them still to be made, {args.jobs} at a time")
    failed = Runner(out, flags, args.jobs).run_all(missing, rows)
    write_rows(own, rows)
    (out / "experiment.md").write_text(make_table(rows, arms, "markdown") + "\n")
    drawing = draw_figure(rows, arms)
    if drawing:
        drawing.save_svg(out / "experiment.svg")
        drawing.save_png(out / "experiment.png")
        say(f"figure: {out}/experiment.svg and .png; table: experiment.md; runs: experiment.csv")
    table = make_table(rows, arms, "text")
    if failed:
        print(table)
        sys.exit(1)
    return table
