"""The experiment: does masked autoencoding help CLIP, and at what amount of data?

    python eval.py experiment                            clip and mae_clip on the built-in scenes
    python eval.py experiment --quick                    18 of its runs
    python eval.py experiment --csv docs/experiment.csv --precision fp32     uses a table's runs
    python eval.py experiment --scale base --accumulate 16 --data SHARDS --eval-data SETS \\
        --samples 100000,1000000

Runs mae_clip.py once for each arm, number of unique pairs, pooling and seed. An arm is a method, or
a method with flags of its own: clip@steps=900@lr=0.01. All flags that are not listed below are
mae_clip.py's and go to every run: so arms without steps of their own see equally many pairs. Where
no --scale is given, --steps, --muon-momentum and --muon-rms are by default the README's figure's:
500, 0.95 and 0.2. The gain is that of the second arm over each other one, paired by seed. OUT holds
experiment.csv (a row a run), experiment.md (the table), experiment.svg and .png (the figure, from
two seeds on, which tells three arms and three poolings apart), and each run's folder and log. Runs
that have a row are not made again; what was interrupted goes on.
"""

import csv
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from tqdm import tqdm

import data
import mae_clip
from data import DataError
from eval import format_table, new_parser, open_sets, say
from machine import lock_file
from pictures import Drawing, ticks
from scenes import builtin

AXES = ("arm", "samples", "pool", "seed")  # what tells the runs of a table apart
# Settings in which the runs of a table may differ beside the axes: at most rounding hangs on them.
FREE = set("out resume device compile log_every save_every eval_every workers accumulate".split())
MEASURES = {  # of the table; the figure draws the first in which two arms can be compared
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
    line = [*flags, "--method", method]
    for setting in own:
        name, _, value = setting.partition("=")
        if name in AXES or name in FREE:
            raise DataError(f"arm {arm}: {name} is not an arm's own to set")
        line.append(mae_clip.flag(name))
        if value:
            line.append(value)
    return [*line, "--samples", samples, "--pool", pool, "--seed", seed]


def settings(key, flags):
    """{setting: value, as text} of a run: what its results depend on, but the axes."""
    config = asdict(mae_clip.parse(run_flags(key, flags)))
    return {name: str(config[name]) for name in config if name not in FREE.union(AXES)}


def read_rows(path, arms, flags):
    """The runs in a table -> {key: row of text}; DataError where one of these arms was run with
    other settings."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        key = tuple(row.get(axis) for axis in AXES)
        if None in key or not key[1].isdecimal():
            raise DataError(f"{path}: {key}: is no run, which has {AXES} in columns")
        wanted = settings(key, flags) if key[0] in arms else {}
        # What runs of earlier versions had, which did not know the setting.
        row.setdefault("init", "")
        row.setdefault("muon_momentum", "0.95")
        row.setdefault("muon_rms", "0.2")
        other = [name for name in wanted if row.get(name) != wanted[name]]
        if other:
            then = " ".join(f"{mae_clip.flag(name)} {row.get(name)}" for name in other)
            raise DataError(f"{path}: {' '.join(key)} was run with {then}; or use another table")
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
    """The commit of the code that finished a run, where it lies in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def make_row(key, flags, results):
    """What results.json of a run says, as a row of the table, all as text; DataError where nothing
    was scored."""
    scores = {}
    for task, entry in results.items():
        if isinstance(entry, dict) and "chance" in entry:
            for name in entry["chance"]:
                scores[f"{task} {name}"] = repr(entry[name])
    if not scores:
        raise DataError("nothing was scored")
    row = dict(zip(AXES, key, strict=True)) | settings(key, flags) | scores
    return row | {"seconds": str(round(results["seconds"])), "commit": commit()}


def launch(slot, jobs):
    """The beginning of a run's command and its environment, for the slot-th of `jobs` runs at a
    time: cores are shared out, and GPUs, of which a run has several where there are enough."""
    count = torch.cuda.device_count()
    cards = [str(card) for card in range(count)]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        cards = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    command = [sys.executable]
    flags = ["--workers", "0"]  # cores have runs enough, unless --workers is given
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    if count:
        flags = []
        cards = cards[slot % count :: jobs][: max(1, count // jobs)]  # for all runs as many
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        if len(cards) > 1:
            launcher = "-m torch.distributed.run --standalone --nproc-per-node"
            command += [*launcher.split(), str(len(cards))]
    return [*command, mae_clip.__file__, *flags], environment


class Runner:
    """Makes the runs that are missing, `jobs` at a time."""

    def __init__(self, out, flags, jobs):
        """Waits where another sitting, or a run that it left behind, is at work in the folder."""
        self.lock = lock_file(out / "lock")
        if self.lock is None:
            say(f"waits until another sitting in {out}, or runs that it left, are done")
            self.lock = lock_file(out / "lock", wait=True)
        self.out = out
        self.flags = flags
        self.jobs = jobs
        self.stopped = False
        self.running = set()
        self.slots = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)

    def run(self, key):
        """One run from its start or its newest checkpoint to its results -> its row; DataError
        where it failed."""
        # Named by the steps too: mae_clip.py --resume gives a finished run more, if it is told to.
        name = "-".join([*key, settings(key, self.flags)["steps"]])
        folder = self.out / re.sub(r"[^\w.@=-]", "_", name)
        slot = self.slots.get()
        command, environment = launch(slot, self.jobs)
        command = [*command, *run_flags(key, self.flags), "--out", str(folder), "--resume"]
        try:
            with open(f"{folder}.log", "a", encoding="utf-8") as log:
                if self.stopped:
                    raise DataError(f"{folder}: not begun")
                before = log.tell()
                # The lock, an empty file, is its stdin: a run that outlives this program holds it.
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=self.lock, env=environment
                )
                self.running.add(process)
                code = process.wait()
                self.running.remove(process)
        finally:
            self.slots.put(slot)
        if code:
            said = Path(log.name).read_bytes()[before:].decode(errors="replace")
            errors = re.findall(".*[Ee]rror:.*", said) or [""]
            raise DataError(f"exit code {code}: {errors[0]}; see {log.name}")
        return make_row(key, self.flags, json.loads((folder / "results.json").read_text()))

    def stop(self):
        """Ends the runs that are under way, which save what they have trained, and begins none."""
        self.stopped = True
        for process in self.running.copy():
            process.terminate()

    def run_all(self, keys, rows):
        """Adds the rows of all keys to rows {key: row} and to the table -> how many failed."""
        failed = 0
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                runs = {pool.submit(self.run, key): key for key in keys}
                bar = tqdm(as_completed(runs), total=len(runs), disable=None)
                for count, done in enumerate(bar, 1):
                    key = runs[done]
                    try:
                        rows[key] = done.result()
                        write_rows(self.out / "experiment.csv", rows)
                        say(f"{count} of {len(runs)} done: {' '.join(key)}")
                    except Exception as error:  # one run's trouble; the others go on
                        failed += 1
                        say(f"failed: {' '.join(key)}: {error}")
            except KeyboardInterrupt:
                say("interrupted; the same command goes on from what its runs have saved")
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failed


# --- Numbers --------------------------------------------------------------------------------------
@cache  # a table asks for the same few again and again
def student_t(freedom):
    """The 97.5th percentile of Student's t with so many degrees of freedom. With
    t = sqrt(freedom) tan(u) the density of u is proportional to cos(u)^(freedom - 1)."""
    u = np.linspace(0, math.pi / 2, 1_000_000)  # the upper half of the distribution
    below = np.cumsum(np.cos(u) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(u[np.searchsorted(below, 0.95 * below[-1])])


def interval(values):
    """Numbers, one for each of two seeds or more -> their mean and half of its 95 % interval."""
    return mean(values), student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def by_seed(rows, measure, arm, samples, pool):
    """{seed: per cent} of the runs that have the measure."""
    found = {}
    for key, row in rows.items():
        if key[:3] == (arm, samples, pool) and row.get(measure) not in (None, "", "nan"):
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
    return sorted(values, key=lambda value: (len(value), value))


def make_table(rows, arms, style):
    """Scores (standard deviation over seeds) and paired gains [95 % interval] (number of pairs) ->
    text."""
    others = [arm for arm in arms if arm != arms[1]]
    table = [["measure, %", "unique pairs", "pool", *arms]]
    table[0] += [f"{arms[1]} less {other}, points" for other in others]
    for measure, title in MEASURES.items():
        for samples in values_of(rows, "samples"):
            for pool in values_of(rows, "pool"):
                cells = []
                for arm in arms:
                    scores = list(by_seed(rows, measure, arm, samples, pool).values())
                    spread = f" ({stdev(scores):.1f})" if len(scores) > 1 else ""
                    cells.append(f"{mean(scores):.1f}{spread}" if scores else "-")
                for other in others:
                    leads = gain(rows, measure, arms[1], other, samples, pool)
                    cells.append("-")
                    if leads:
                        ends = ""
                        if len(leads) > 1:
                            middle, half = interval(leads)
                            ends = f" [{middle - half:+.1f}, {middle + half:+.1f}]"
                        # Plus 0.0: a lead that rounds to 0 has no minus.
                        cells[-1] = f"{round(mean(leads), 1) + 0.0:+.1f}{ends} ({len(leads)})"
                if set(cells) != {"-"}:
                    table.append([title, f"{int(samples):,}", pool, *cells])
    return format_table(table, style)


# --- Figure ---------------------------------------------------------------------------------------
COLOURS = ("#0072b2", "#d55e00", "#444444")  # of the poolings; told apart by the colour-blind too
CORNERS = (24, 4, 3)  # of their markers: round, square, triangle
FILLS = ("white", None, "#bbbbbb")  # of the arms' markers; None: the pooling's colour


def marker(drawing, x, y, kind, arm):
    """The sign of a line: form and colour say its kind, the filling its arm; both are numbers."""
    corners = CORNERS[kind % 3]
    colour = COLOURS[kind % 3]
    angles = (np.arange(corners) + 0.5) * 2 * math.pi / corners
    points = [(x + 3 * math.sin(angle), y + 3 * math.cos(angle)) for angle in angles]
    drawing.area(points, FILLS[arm % 3] or colour)
    drawing.line([*points, *points[:2]], colour)  # closed, with a joint at the first corner too


def draw_panel(drawing, left, title, unit, amounts, lines, always):
    """One panel, 108 points wide; its vertical axis holds the numbers `always`. lines: (name,
    number of its kind, number of its arm, [(unique pairs, value, half of its interval)])."""
    top, bottom, right = 34, 140, left + 108
    ends = [*always]
    for *_, points in lines:
        for _, value, half in points:
            ends += [value - half, value + half]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) + 1e-6
    low, high = low - margin, high + margin
    decades = math.log(amounts[-1] / amounts[0]) or 1.0  # 1: a single amount

    def place(pairs, value, shift=0.0):
        x = left + 8 + shift + 92 * math.log(pairs / amounts[0]) / decades
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    drawing.words(left - 24, 10, title)
    drawing.words(left - 24, 21, unit)
    for value in ticks(low, high):
        _, y = place(amounts[0], value)
        zero = abs(value) < 1e-9
        drawing.line([(left, y), (right, y)], "black" if zero else "#dddddd", 0.6)
        drawing.words(left - 3, y + 3, f"{value:g}", "end")
    for pairs in amounts:
        x, _ = place(pairs, low)
        drawing.line([(x, bottom), (x, bottom + 3)], width=0.6)
        short = f"{pairs / 1e6:g}M" if pairs >= 1e6 else f"{pairs / 1e3:g}k"
        drawing.words(x, bottom + 12, short, "middle")
    drawing.words((left + right) / 2, bottom + 23, "unique pairs (log scale)", "middle")
    apart = min(2.5, 12 / len(lines))  # lines stand a little beside each other, to hide nothing
    shifts = [apart * (row - (len(lines) - 1) / 2) for row in range(len(lines))]
    for shift, (_, kind, _, points) in zip(shifts, lines, strict=True):  # bands lie below the rest
        band = [place(pairs, value + half, shift) for pairs, value, half in points]
        band += [place(pairs, value - half, shift) for pairs, value, half in reversed(points)]
        drawing.area(band, COLOURS[kind % 3], 0.1)
    for row, (name, kind, arm, points) in enumerate(lines):
        y = bottom + 38 + 11 * row
        marker(drawing, left, y - 3, kind, arm)
        drawing.words(left + 8, y, name)
        colour = COLOURS[kind % 3]
        places = [place(pairs, value, shifts[row]) for pairs, value, _ in points]
        drawing.line(places, colour, 1.2)
        for (x, y), (pairs, value, half) in zip(places, points, strict=True):
            for end in (value - half, value + half) if half else ():  # whose band ends where
                _, height = place(pairs, end)
                drawing.line([(x, y), (x, height)], colour, 0.6)
                drawing.line([(x - 2, height), (x + 2, height)], colour, 0.8)
            marker(drawing, x, y, kind, arm)


def draw_figure(rows, arms):
    """The gain of the second arm over each other one, with its 95 % band, and the scores, against
    unique pairs -> Drawing; None where no two arms share two seeds."""
    amounts = [int(samples) for samples in values_of(rows, "samples")]
    pools = values_of(rows, "pool")
    for measure, title in MEASURES.items():
        gains = []
        scores = []
        counts = set()  # of seeds behind an interval
        for pool_number, pool in enumerate(pools):
            for arm_number, arm in enumerate(arms):
                leads = []
                means = []
                for samples in amounts:
                    score = list(by_seed(rows, measure, arm, str(samples), pool).values())
                    lead = gain(rows, measure, arms[1], arm, str(samples), pool)
                    if score:
                        means.append((samples, mean(score), 0.0))
                    if len(lead) > 1 and arm != arms[1]:
                        leads.append((samples, *interval(lead)))
                        counts.add(len(lead))
                # What there is more than one of, poolings or arms, is told by colour and form.
                kind = pool_number if len(pools) > 1 else arm_number
                name = f"{arm}, {pool}"
                if means:
                    scores.append((name, kind, arm_number, means))
                if leads:
                    gains.append((f"over {name}", kind, arm_number, leads))
        if gains:
            drawing = Drawing(300, 182 + 11 * len(scores))
            unit = f"{arms[1]}, points"
            draw_panel(drawing, 30, f"{title}: gain of", unit, amounts, gains, [0.0])
            draw_panel(drawing, 184, f"{title},", "per cent", amounts, scores, [])
            seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
            # There is room: a line of gains has two of scores at least.
            drawing.words(38, 178 + 11 * len(gains), f"bars: 95 % intervals, {seeds} seeds")
            return drawing
    return None


# --- Command line ---------------------------------------------------------------------------------
def words(text):
    """Words with commas between them -> list, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text):
    """The same for whole numbers, as text."""
    return words(",".join(str(int(word)) for word in words(text)))


DEFAULTS = {
    "method": (words, "clip,mae_clip", "arms"),
    "samples": (numbers, "1000,2500,6000,16000,40000", "numbers of unique pairs"),
    "pool": (words, "gap,max", "poolings"),
    "seed": (numbers, "3,4,5,6,7,8", "seeds"),
    "csv": (words, "", "tables of runs to use as well"),
}
QUICK = {"samples": "1000,6000,40000", "pool": "gap", "seed": "3,4,5"}


def parse(argv):
    """The command line -> its values, and the flags that are mae_clip.py's."""
    parser = new_parser("eval.py experiment", __doc__)
    parser.add_argument("--quick", action="store_true", help="three amounts, gap, three seeds")
    for name, (kind, value, text) in DEFAULTS.items():
        text += ", with commas between (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=value, help=text)
    jobs = torch.cuda.device_count() or os.cpu_count()
    parser.add_argument(
        "--jobs",
        type=int,
        default=jobs,
        help="runs at a time, which share cores and GPUs (default: %(default)s)",
    )
    parser.add_argument("--out", default="runs/experiment", help="folder (default: %(default)s)")
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args, flags = parser.parse_known_args(argv)
    if not any(flag.split("=")[0] == "--scale" for flag in flags):
        # Those of the README's figure, where mae_clip.py's defaults are others. What was given
        # comes later, and so counts.
        flags = [*"--steps 500 --muon-momentum 0.95 --muon-rms 0.2".split(), *flags]
    if len(args.method) < 2:
        raise DataError(f"--method {args.method}: takes two arms or more, such as clip,mae_clip")
    if args.jobs < 1 or "0" in args.samples:
        raise DataError("--jobs and --samples: must be 1 or more")
    return args, flags


def check(key, flags):
    """ValueError where a run could not be made or scored."""
    config = mae_clip.parse(run_flags(key, flags))
    open_sets(config.eval_data)
    if config.resample or config.stop_after or "pipe:" in config.data:
        raise DataError("runs of a part of the data take no stream, and no --stop-after")
    if config.data:
        data.expand(config.data)
        if not config.eval_data:
            raise DataError("--data needs --eval-data, the sets that all runs are scored on")


def run(argv):
    """Runs the command line -> the table; ValueError or OSError for bad input; exit code 1 where a
    run failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    args, flags = parse(argv)
    wanted = []
    for seed in args.seed:  # outermost: so an early figure has all amounts
        for samples in args.samples:
            for pool in args.pool:
                wanted += [(arm, samples, pool, seed) for arm in args.method]
    for key in wanted:
        check(key, flags)
    config = mae_clip.parse(flags)
    # What `auto` means on this machine is written down: rows of another precision are refused.
    _, autocast = mae_clip.pick_device(config)
    flags += ["--precision", "bf16" if autocast._enabled else "fp32"]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, flags, args.jobs)
    rows = {}
    for path in (*args.csv, *out.glob("experiment.csv")):
        rows |= read_rows(path, args.method, flags)
    missing = [key for key in wanted if key not in rows]
    say(f"{len(wanted)} runs, {len(missing)} of them still to be made, {args.jobs} at a time")
    if missing and not config.data:
        builtin(config.scenes, config.data_seed)  # lest each run draws them
    failed = runner.run_all(missing, rows)
    write_rows(out / "experiment.csv", rows)
    table = make_table(rows, args.method, "markdown")
    (out / "experiment.md").write_text(table + "\n", encoding="utf-8")
    drawing = draw_figure(rows, args.method)
    if drawing:
        drawing.save_svg(out / "experiment.svg")
        drawing.save_png(out / "experiment.png")
        say(f"figure: {out}/experiment.svg and .png; table: experiment.md; runs: experiment.csv")
    table = make_table(rows, args.method, "text")
    if failed:
        print(table)
        sys.exit(1)
    return table
