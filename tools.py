"""What else a model is for: features as a file, search, weights for timm, curves of training; and
how fast it trains.

    python eval.py embed CHECKPOINT --data SET --out features.npz
    python eval.py search CHECKPOINT "a dog on a beach" --data SET --out page.png
    python eval.py export CHECKPOINT tower.pt
    python eval.py curves RUN... --out curves
    python eval.py benchmark --scale base --batch-size 256 --out benchmark.json

For embed and search a SET may also be a plain folder of photos. benchmark takes mae_clip.py's
flags, too. Letters as in eval.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mae_clip  # before torch, as it tells torch's threads how to wait

# isort: split
import numpy as np
import torch

import data
import pictures
from data import DataError
from eval import (
    ELSEWHERE,
    EvalSet,
    encode_split,
    encode_texts,
    format_table,
    new_parser,
    open_sets,
    run_folder,
    say,
    say_once,
    scoring_device,
)
from eval import benchmark as time_steps
from machine import whole_file, write_whole
from pack import paths_below
from weights import export_tower


# --- Sets -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Photos(EvalSet):
    """A plain folder of image files, and of folders of them: a set without texts."""

    def samples(self, split):
        """-> iterator of (path, image bytes, no caption)."""
        for path in paths_below(Path(self.source)):  # as pack sees it
            path = Path(self.source, path)
            if path.suffix[1:].lower() in data.IMAGE_FIELDS and path.is_file():
                content = path.read_bytes()
                try:
                    data.decode(content)
                    yield str(path), content, []
                except DataError as error:
                    say_once(f"left out: {path}: {error}")


def open_images(sources):
    """The same as open_sets, but a folder may be one of photos alone."""
    sets = []
    for source in filter(None, data.parts_of(sources)):
        folder = Path(source)
        known = (folder / "test").is_dir() or (folder / "objects").is_dir()
        photos = Photos(source)
        if folder.is_dir() and not known and next(photos.samples("test"), None):
            sets.append(photos)
        else:
            sets += open_sets(source)
    if not sets:
        raise DataError(f"--data {sources!r}: names no set")
    return sets


# --- Commands: flags in, what is printed out ------------------------------------------------------
POSITIONAL = {
    "CHECKPOINT": "a file or a run's folder, whose newest one counts",
    "SENTENCE": "what is looked for",
    "FILE": "new file to write",
    "RUN": "a run's folder",
}


def parse(command, flags, positional, out, sets=True):
    """The values of a command's flags; positional: its names; out: what --out is when not given;
    sets: does it read --data."""
    parser = new_parser(f"eval.py {command}", ELSEWHERE[command][2])
    for name in positional:
        parser.add_argument(
            name.lower(), metavar=name, nargs="+" if name == "RUN" else None, help=POSITIONAL[name]
        )
    if sets:
        parser.add_argument("--data", required=True, help="SETs joined by ::, see eval.py --help")
        parser.add_argument(
            "--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps"
        )
    if out:
        parser.add_argument("--out", help=f"file to write (default: {out} in the run's folder)")
    args = parser.parse_args(flags)
    if out and not args.out:
        args.out = str(run_folder(vars(args).get("checkpoint") or args.run[0]) / out)
    if out:
        pictures.check_folder(args.out)
    return args


def load(args):
    """The checkpoint that was named -> model on the device that was named, its tokenizer."""
    model, tokenizer, _ = mae_clip.load(args.checkpoint, scoring_device(args.device))
    return model, tokenizer


def embed(flags):
    """Writes an .npz file: keys, labels (-1: none) and image_features (n,E) of all images; texts
    (m,), their text_features (m,E) and image_of_text (m,), where there are captions and a text
    tower."""
    args = parse("embed", flags, ["CHECKPOINT"], "features.npz")
    model, tokenizer = load(args)
    features = []
    keys = []
    labels = []
    texts = []
    image_of_text = []
    for dataset in open_images(args.data):
        test = encode_split(model, dataset, "test")
        features.append(test.embedded)
        for (key, _, _), target in zip(dataset.samples("test"), test.targets, strict=True):
            if dataset.classes:
                labels.append(target)
            else:
                labels.append(-1)
                texts += target
                image_of_text += [len(keys)] * len(target)
            keys.append(key)
    found = {"keys": keys, "labels": labels, "image_features": torch.cat(features)}
    if texts and "contrastive" in model.terms:
        found["texts"] = texts
        found["text_features"] = encode_texts(model, tokenizer, texts)
        found["image_of_text"] = image_of_text
    with whole_file(args.out, "features.part") as file:
        np.savez(file, **found)
    say(f"written to {args.out}")
    shapes = [[name, str(tuple(np.shape(values)))] for name, values in found.items()]
    return format_table([["array", "shape"], *shapes])


def search(flags, count=12):
    """Shows the images of largest cosine with a sentence, as a table and a picture."""
    args = parse("search", flags, ["CHECKPOINT", "SENTENCE"], "search.png")
    pictures.check_name(args.out)
    model, tokenizer = load(args)
    text = encode_texts(model, tokenizer, [args.sentence])[0]
    found = []  # (cosine, key, image bytes) of the best so far
    for dataset in open_images(args.data):
        scores = (encode_split(model, dataset, "test").embedded @ text).tolist()
        for score, (key, content, _) in zip(scores, dataset.samples("test"), strict=True):
            found.append((score, key, content))
            if len(found) > 1000:  # lest all images' bytes are held
                found = sorted(found, reverse=True)[:count]
    best = sorted(found, reverse=True)[:count]
    images = [(f"{score:.3f}  {Path(key).name}", data.decode(each)) for score, key, each in best]
    pictures.draw_page(f'"{args.sentence}"', images, args.out)
    say(f"the picture is {args.out}")
    rows = [[f"{score:.3f}", data.printable(key)] for score, key, _ in best]
    return format_table([["cosine", "image"], *rows])


def export(flags):
    """Writes the image tower for timm -> the lines that load it."""
    args = parse("export", flags, ["CHECKPOINT", "FILE"], None, sets=False)
    return export_tower(args.checkpoint, args.file)


def curves(flags):
    """Draws the logs of runs, one chart, as SVG and PNG."""
    args = parse("curves", flags, ["RUN"], "curves", sets=False)
    drawing = pictures.draw_curves({run: pictures.read_log(run) for run in args.run})
    out = args.out.removesuffix(".png").removesuffix(".svg")
    drawing.save_svg(f"{out}.svg")
    drawing.save_png(f"{out}.png")
    return f"the chart is {out}.svg and .png"


def benchmark(flags):
    """Times training steps -> a table of figures, which are written to --out, too."""
    parser = new_parser("eval.py benchmark", ELSEWHERE["benchmark"][2])
    parser.add_argument("--out", default="benchmark.json", help="figures (default: %(default)s)")
    args, flags = parser.parse_known_args(flags)
    pictures.check_folder(args.out)
    found = time_steps(mae_clip.parse(flags))
    write_whole(args.out, json.dumps(found, indent=1))
    say(f"the figures are in {args.out}, too")
    table = [["figure", "value"]]
    for name, value in found.items():
        table.append([name, f"{value:,.4g}" if isinstance(value, float) else str(value)])
    return format_table(table)
