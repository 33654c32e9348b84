"""Makes shards of photographs, and looks into shards: the commands of data.py.

    python data.py pack captions.csv FOLDER    makes shards of photographs
    python data.py inspect FOLDER              says what is in shards, and what is wrong with them
    python data.py tokenizer FOLDER FILE       learns a tokenizer that runs can share
    python data.py draw FOLDER                 draws the built-in scenes

data.py's docstring says what a shard and a source of shards are.
"""

import argparse
import csv
import glob
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections import Counter
from contextlib import contextmanager, suppress
from inspect import cleandoc, signature
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ImageOps
from tqdm import tqdm

from data import (
    IMAGE_FIELDS,
    DataError,
    Loader,
    Tokenizer,
    as_bytes,
    captions,
    decode,
    in_parallel,
    one_line,
    printable,
    read_samples,
)
from machine import lock_file

# --- Making shards --------------------------------------------------------------------------------
# Names of a column of paths; where a table has several, the one that stands first here counts.
PATH_NAMES = "path filepath image_path image file_name filename image_name".split()
# Names of columns of captions: caption_1, caption_en, but not caption_id.
TEXT_NAME = re.compile(r"(caption|text|title|comment)s?([_ ]?(\d+|(?!id|no)[a-z]{2}))?")
DELIMITERS = ",;\t|"  # semicolons are written in many countries
PACK_TEMPLATE = "a photo of a {c}"  # the caption of a class


def as_jpeg(image):
    """PIL image -> JPEG bytes, of colours at full size."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


def write_shard(job):
    """Writes a tar; job: path, a function that yields samples (key, {field: str or bytes}), its
    arguments -> how many it yielded."""
    path, function, *arguments = job
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in function(*arguments):
            count += 1
            for field, content in fields.items():
                content = as_bytes(content)
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return count


@contextmanager
def only_one(path):
    """Inside `with`, no other program is inside with the same path, where a file is made for it."""
    while True:
        file = lock_file(path, wait=True)
        with suppress(OSError):  # gone, where the one before has removed it while this one waited
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # on Windows, where it is open
                path.unlink()


def build(folder, texts, jobs):
    """Makes a new folder of texts {path: lines} and, in their folders, of the shards of
    write_shard's jobs; it takes its name when it is whole -> number of samples. Another program
    that makes the same folder is waited for."""
    folder = Path(folder)
    part = Path(f"{folder}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(Path(f"{folder}.lock")):
        try:
            if folder.exists():
                raise DataError(f"{folder}: exists already; give a new folder")
            shutil.rmtree(part, ignore_errors=True)  # of a program that was killed
            for path, lines in texts.items():
                file = part / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("\n".join(lines), encoding="utf-8")
            count = sum(in_parallel(write_shard, [(part / path, *job) for path, *job in jobs]))
            if not count:
                raise DataError(f"{folder}: not made, since not one image could be read")
            part.rename(folder)
            return count
        except OSError as error:
            raise OSError(f"{folder}: could not be made: {error}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def described(classes, templates, shards, where=""):
    """The texts of a folder in CLIP_benchmark's layout; shards: {split: how many}."""
    texts = {f"{where}{split}/nshards.txt": [str(count)] for split, count in shards.items()}
    if classes:
        texts[f"{where}classnames.txt"] = classes
        texts[f"{where}zeroshot_classification_templates.txt"] = templates
    return texts


def columns_of(row):
    """The cells of a first row as names of columns."""
    return [cell.strip(' "\n').lower().replace(" ", "_") for cell in row]


def has_header(source, row):
    """Is a table's first row a header: a column of paths has a name, and the first cell is no
    photo."""
    named = set(columns_of(row)).intersection(PATH_NAMES)
    return bool(named) and not (source.parent / row[0].strip('"')).is_file()


def delimiter_of(source, start):
    """What parts the cells of a csv, judged by its first line: a header, or first a photo."""
    for delimiter in DELIMITERS:
        cells = start.split(delimiter)
        path = source.parent / cells[0].strip('"').replace("\0", "")
        if has_header(source, cells) or path.is_file():
            return delimiter
    return next((delimiter for delimiter in DELIMITERS if delimiter in start), ",")


def rows_of(source):
    """A csv or tsv in UTF-8 -> its rows, (number of the line where it begins, cells) each."""
    content = source.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{source} line {line}: is not in UTF-8") from None
    if source.suffix == ".tsv":  # there quotes are part of the text
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        style = {"delimiter": delimiter_of(source, text.split("\n")[0]), "strict": True}
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    rows = []
    line = 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}: no csv, in the row that begins in line {line}: {error}"
        ) from None
    return rows


def read_table(source):
    """A csv or tsv of paths and captions -> (path, fields, name for messages) of photos, each once
    however its path is written. A first row with the name of a path's column is a header; without
    one the first two columns count."""
    rows = rows_of(source)
    header = ["path", "caption"]
    if rows and has_header(source, rows[0][1]):
        header = columns_of(rows.pop(0)[1])
    elif rows:
        header += ["a column without name"] * (len(rows[0][1]) - 2)
    if not rows:
        raise DataError(f"{source}: holds no row with the path of a photo")
    place = next(header.index(name) for name in PATH_NAMES if name in header)
    texts = [n for n, name in enumerate(header) if TEXT_NAME.fullmatch(name)]
    ignored = [name for n, name in enumerate(header) if n not in (place, *texts)]
    print(
        f"columns: paths {header[place]!r}, captions {[header[n] for n in texts]}, ignored "
        f"{ignored}. A header names the paths {', '.join(PATH_NAMES)}, the captions caption, text, "
        "title or comment, with a number, a language's two letters or neither"
    )
    long = [line for line, row in rows if any(row[len(header) :])]
    if long:
        raise DataError(
            f"{source} line {long[0]}, and {len(long) - 1} others: has more cells than there are "
            f"columns, {len(header)}; a caption with a comma must stand in quotes"
        )
    photos = {}
    for line, row in rows:
        cells = dict(enumerate(row))  # a row may be short
        path = source.parent / cells.get(place, "").strip().replace("\0", "")
        photo = (path, {"txt": ""}, f"{source} line {line}: {path}")
        _, fields, _ = photos.setdefault(os.path.realpath(path), photo)
        for n in texts:
            fields["txt"] += " ".join(cells.get(n, "").split()) + "\n"
    photos = list(photos.values())
    if not any(path.is_file() for path, _, _ in photos[:1000]):
        raise DataError(
            f"{source}: none of its first paths is a file, such as {photos[0][0]}; a path counts "
            "from the folder of the table, which is a csv or tsv"
        )
    return photos


def read_folder(folder):
    """A folder of class folders, or else of photos -> (path, fields, name for messages) of photos,
    names of the classes. What lies in folders whose names begin with a dot is not seen."""
    found = [Path(name) for name in glob.glob("**", root_dir=folder, recursive=True)]
    found = sorted(path for path in found if "__MACOSX" not in path.parts)
    files = [path for path in found if not (folder / path).is_dir()]
    images = [file for file in files if file.suffix[1:].lower() in IMAGE_FIELDS]
    # One photo by several names (links) counts by its first name.
    once = {os.path.realpath(folder / file): file for file in reversed(images)}
    images = sorted(once.values())
    if not images:
        raise DataError(f"{folder}: no file in it, nor in its folders, ends in {IMAGE_FIELDS}")
    inside = [file for file in images if len(file.parts) > 1]
    classes = sorted({file.parts[0] for file in inside})
    for name in classes:
        if "\n" in name:
            raise DataError(f"{folder}: a class folder's name has a line break: {name!r}")
    used = inside or images
    photos = []
    for file in used:
        fields = {"txt": ""}
        if inside:
            name = file.parts[0]
            fields = {"cls": str(classes.index(name)), "txt": PACK_TEMPLATE.replace("{c}", name)}
        photos.append((folder / file, fields, folder / file))
    folders = {path.parts[0] for path in found if (folder / path.parts[0]).is_dir()}
    print(
        f"passed over: folders without photos {sorted(folders.difference(classes))}; files whose "
        f"names do not end in {IMAGE_FIELDS}, that lie beside the class folders or link to another "
        f"{dict(Counter(file.suffix for file in sorted(set(files).difference(used))))}"
    )
    return photos, classes


def packed(first, photos, size):
    """Yields the samples of photos, (path, fields, name) each, of which `first` is the first's
    number; says which it leaves out."""
    for number, (path, fields, name) in enumerate(photos, first):
        try:
            content = path.read_bytes()
            kind = path.suffix[1:].lower()
            image = decode(content)
        except (DataError, OSError) as error:
            tqdm.write(f"left out: {printable(str(name))}: {error}", file=sys.stderr)
            continue
        if 0 < size < min(image.size):
            image = ImageOps.cover(image, (size, size))
            kind = ""  # to be encoded anew
        if kind not in IMAGE_FIELDS:
            content = as_jpeg(image)
            kind = "jpeg"
        origin = json.dumps({"path": str(path)})
        yield f"{number:08d}", {kind: content, "json": origin} | fields


def pack(source, folder, size=0, test=0.0, shard=1000):
    """Makes shards FOLDER/train/*.tar of photographs, and FOLDER/test/*.tar.

    source       csv or tsv of paths and captions, with columns path and caption or without header;
                 or a folder of class folders, which become labels, in CLIP_benchmark's layout, and
                 captions; or a folder of photos, without captions
    folder       new folder for the shards
    --size       short side in pixels to which larger photos shrink; 0: they stay as they are
    --test       share of the photos, from 0 to below 1, for the test split: drawn by chance, of
                 every class with two photos or more at least one
    --shard      samples a shard
    """
    source = Path(source)
    folder = str(Path(folder))
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if not 0 <= test < 1:
        raise DataError(f"--test {test:g}: must be a share from 0 to below 1, such as 0.1")
    if shard < 1 or size < 0:
        raise DataError(f"--shard {shard}: must be 1 or more; --size {size}: must be 0 or more")
    classes = []
    if source.is_dir():
        photos, classes = read_folder(source)
    else:
        photos = read_table(source)
    if len(classes) == 1 and test:
        raise DataError(f"{source}: --test needs two class folders or more, {classes} is one")
    found = len(photos)
    captioned = [photo for photo in photos if photo[1]["txt"].strip()]
    if captioned:  # else all are for mae
        photos = captioned
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    by_class = {}
    for n in order:
        by_class.setdefault(photos[n][1].get("cls"), []).append(n)
    tested = set()
    for own in by_class.values():  # some of each class, and some are left for training
        count = round(test * len(own))
        if classes and test:
            count = min(max(1, count), len(own) - 1)
        tested.update(own[:count])
    if test and not tested:
        raise DataError(f"--test {test}: of {len(photos)} photos that is none")
    jobs = []
    shards = {}  # of each split
    for split in ("test", "train"):
        part = [photos[n] for n in order if (n in tested) == (split == "test")]
        for first in range(0, len(part), shard):
            path = f"{split}/{first // shard}.tar"
            jobs.append((path, packed, first, part[first : first + shard], size))
            shards[split] = first // shard + 1
    written = build(folder, described(classes, [PACK_TEMPLATE], shards), jobs)
    print(
        f"{folder}: {written} samples in {len(jobs)} shards; {found - written} left out, of these "
        f"{found - len(photos)} without caption"
    )
    flags = f"--data {folder!r} --out {folder + '-run'!r}"
    if test:
        flags += f" --eval-data {folder!r}"
    if not captioned:
        print(f"{found} photos have no caption: they are for --method mae alone")
        flags += " --method mae"
    left = written - len(tested)  # for training
    if left < 256:
        flags += f" --batch-size {max(2, left)}"
    print(f"next:\npython mae_clip.py {flags}")


def inspect(source):
    """Says what is in local shards and what is wrong with them, as training would find it.

    source       shards: paths, globs, {000..123}, folders, joined by ::

    Exit code 1: something is wrong with some samples; 2: with most of them.
    """
    first = list(islice(read_samples(source), 5))
    labelled = any("cls" in sample for sample in first)
    captioned = any(map(captions, first)) and not labelled
    if not captioned:
        what = "labels" if labelled else "no captions"
        print(f"the first samples have {what}, so none needs a caption here; for training that is")
        print("so with --method mae alone: `data.py pack` makes captions of class folders")
    loader = Loader(source, 1, 1, None, 3, captions=captioned)
    print(loader.about())
    print(loader.report())
    for sample in first:
        label = sample.get("cls", b"").decode(errors="replace").strip()
        with suppress(LookupError, ValueError, OSError):  # no class, or no name of it
            names = Path(loader.reader.shards[0]).parents[1] / "classnames.txt"
            label += " " + names.read_text("utf-8-sig").split("\n")[int(label)]
        what = f"fields {list(sample)[1:]}, class {label!r}, captions {captions(sample)}"
        print(f"{printable(sample['__key__'])}: {what}")
    return 1 if loader.bad else 0


# --- Command line ---------------------------------------------------------------------------------
def learn_tokenizer(source, file, vocab_size=32_768):
    """Learns a tokenizer from the captions of shards.

    source       shards: paths, globs, {000..123}, folders, pipe:COMMAND, joined by ::
    file         file to write, for mae_clip.py --tokenizer
    --vocab-size ids at most
    """
    texts = tqdm(Loader(source, 1, 1, None, 3).texts(), disable=None)
    tokenizer = Tokenizer.train(texts, vocab_size)
    Path(file).write_text(json.dumps(tokenizer.merges))
    print(f"{file}: {tokenizer.vocab_size} ids")


def main(argv=None):
    """Runs a command, whose flags are its function's parameters; bad input: one line and exit code
    2."""
    from scenes import draw  # here, as scenes.py builds on this file

    functions = {"pack": pack, "inspect": inspect, "tokenizer": learn_tokenizer, "draw": draw}
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("data.py", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in functions.items():
        text = cleandoc(function.__doc__)
        first = text.split("\n")[0]
        command = commands.add_parser(name, help=first, description=text, formatter_class=layout)
        for argument, parameter in signature(function).parameters.items():
            value = parameter.default
            if value is parameter.empty:
                command.add_argument(argument)
            else:
                flag = f"--{argument.replace('_', '-')}"
                command.add_argument(
                    flag, default=value, type=type(value), help=f"default: {value}"
                )
    given = vars(parser.parse_args(argv))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is unfinished is removed
    function = functions[given.pop("command")]
    try:
        sys.exit(function(**given))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"data.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
