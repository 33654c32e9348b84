"""Makes shards of photographs: of a table of paths and captions, of class folders, of photos.

    python data.py pack captions.csv FOLDER

docs/data.md says what becomes of what.
"""

import csv
import io
import json
import os
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from shlex import quote

import numpy as np
from PIL import ImageOps

from data import IMAGE_FIELDS, DataError, captions, decode, in_parallel, printable
from shards import as_jpeg, build, described

# Names of a column of paths; where a table has several, the one that stands first here counts.
PATH_NAMES = "path filepath image_path image file_name filename image_name".split()
# Names of columns of captions: caption, texts, title_2, caption_en, comment_pt-br. Of languages'
# two letters these alone: caption_id holds no captions in Indonesian, caption_by no name of one.
LANGUAGES = "ar bg cs da de el en es fa fi fr he hi hu it ja ko nb nl pl pt ro ru sv th tr uk vi zh"
TEXT_NAME = re.compile(
    r"(caption|text|title|comment)s?"
    rf"([_-]?\d+|[_-]({LANGUAGES.replace(' ', '|')})([_-][a-z]{{2}})?)?"
)
DELIMITERS = ",;\t|"  # semicolons are written in many countries
PACK_TEMPLATE = "a photo of a {c}"  # the caption of a class
SPLITS = set("train test val valid validation".split())  # folders of these names are no classes


def columns_of(row):
    """The cells of a first row as names of columns."""
    return [cell.strip(' "\n').lower().replace(" ", "_") for cell in row]


def is_photo(source, cell):
    """Is a cell of a table the path of a file."""
    return os.path.isfile(source.parent / cell.strip(' "'))  # False, too, of what can be no name


def has_header(source, row):
    """Is a table's first row a header: a column of paths has a name, and the first cell is no
    photo."""
    named = set(columns_of(row)).intersection(PATH_NAMES)
    return bool(named) and not is_photo(source, row[0])


def delimiter_of(source, start):
    """What parts the cells of a csv, judged by its first line: first comes a photo, or a header."""
    rows = {delimiter: start.split(delimiter) for delimiter in DELIMITERS}
    likely = [each for each, row in rows.items() if is_photo(source, row[0])]
    likely += [each for each, row in rows.items() if has_header(source, row)]
    likely += [each for each in DELIMITERS if each in start]
    return (likely or ",")[0]


def parsed(source, text, **style):
    """The text of a csv -> its rows, (number of the line where it begins, cells) each."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, **style)
    rows = []
    line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}: no csv, in the row that begins in line {line}: {error}; is a quote left "
            "open?"
        ) from None
    return rows


def rows_of(source):
    """A csv or tsv in UTF-8 -> its rows, as `parsed` gives them."""
    content = source.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source} line {line}: is not in UTF-8: save it so (in Excel as CSV UTF-8). What is "
            "packed is a csv or tsv, or a folder of photos (shards are packed already)"
        ) from None
    tsv = source.suffix.lower() == ".tsv"
    delimiter = "\t" if tsv else delimiter_of(source, text.lstrip().split("\n")[0])
    if delimiter in ",;":
        return parsed(source, text, delimiter=delimiter, strict=True)
    # With tabs or bars quotes mostly are a part of the text; but some programs quote cells there,
    # too. Then all quotes close.
    with suppress(DataError):
        rows = parsed(source, text, delimiter=delimiter, strict=True)
        # A cell of several lines and their delimiters would be lines that two quotes have joined.
        if not any("\n" in cell and delimiter in cell for _, row in rows for cell in row):
            return rows
    return parsed(source, text, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def read_table(source):
    """A csv or tsv of paths and captions -> (path, fields, name for messages) of photos, each once
    however its path is written. A first row with the name of a path's column is a header; without
    one the first two columns count."""
    rows = rows_of(source)
    if not rows:
        raise DataError(f"{source}: is empty")
    if has_header(source, rows[0][1]):
        header = columns_of(rows.pop(0)[1])
    else:
        cells = len(rows[0][1])
        header = (["path", "caption"] + ["unnamed"] * cells)[:cells]
        print("no header, which would name a column", " or ".join(PATH_NAMES))
    if not rows:
        raise DataError(f"{source}: holds no row with the path of a photo")
    place = next(header.index(name) for name in PATH_NAMES if name in header)
    texts = [n for n, name in enumerate(header) if TEXT_NAME.fullmatch(name)]
    ignored = [name for n, name in enumerate(header) if n not in (place, *texts)]
    print(
        f"paths: column {place + 1}; captions: columns {[n + 1 for n in texts]}; ignored: {ignored}"
    )
    long = [line for line, row in rows if any(row[len(header) :])]
    if long:
        raise DataError(
            f"{source}: {len(long)} rows have more cells than the first, {len(header)}, such as "
            f"line {long[0]}; a path or caption with the delimiter in it must stand in quotes"
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
    if not any(os.path.isfile(path) for path, _, _ in photos[:1000]):
        raise DataError(
            f"{source}: none of its first paths is a file, such as {photos[0][0]}; a path counts "
            "from the folder of the table, which is a csv or tsv"
        )
    return photos


def paths_below(folder):
    """What lies in a folder and in those inside it, relative to it and sorted; not what is hidden.
    A folder that several names lead to (links) is seen once, by its shortest path."""
    found = []
    seen = set()
    places = [Path()]
    for place in places:  # which grow
        real = os.path.realpath(folder / place)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder / place))
        except PermissionError:  # such as a disk's lost+found
            print(f"passed over: {folder / place}: may not be read", file=sys.stderr)
            continue
        for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            found.append(place / entry.name)
            if entry.is_dir():
                places.append(place / entry.name)
    return sorted(found)


def endings(files):
    """How many files there are of each ending, in words."""
    counts = Counter(file.suffix.lower() or "without ending" for file in files)
    return printable(", ".join(f"{counts[each]} x {each}" for each in sorted(counts))) or "nothing"


def say_others(files):
    """Says what lies in a folder and is not packed."""
    if files:
        print(
            f"passed over (beside the class folders, or a link to another, or none of "
            f"{', '.join(IMAGE_FIELDS)}; convert other images to JPEG): {endings(files)}"
        )


def read_folder(folder):
    """A folder of class folders, or else of photos -> (path, fields, name for messages) of photos,
    names of the classes. What lies in folders whose names begin with a dot is not seen."""
    found = paths_below(folder)
    files = [path for path in found if not (folder / path).is_dir()]
    images = [file for file in files if file.suffix[1:].lower() in IMAGE_FIELDS]
    # Of a photo's several names (links) its own counts, if it lies in the folder.
    real = {file: os.path.realpath(folder / file) for file in images}
    own = [file for file in images if real[file] == os.path.join(os.path.realpath(folder), file)]
    once = {real[file]: file for file in [*reversed(images), *own]}
    images = sorted(once.values())
    if not images:
        raise DataError(
            f"{folder}: no file in it, nor in its folders, ends in {IMAGE_FIELDS}; found "
            f"{endings(files)}. Convert other images to JPEG; shards (.tar) are packed already"
        )
    beside = set(files)
    told = [file for file in images if file.with_suffix(".txt") in beside]
    if 2 * len(told) > len(images):  # as img2dataset writes files
        print(f"captions: {len(told)} photos have NAME.txt beside them, a caption a line")
        photos = []
        for file in images:
            sample = {}
            for field in ("txt", "json"):
                path = (folder / file).with_suffix(f".{field}")
                sample[field] = path.read_bytes() if path.is_file() else b""
            # By the rule of shards, which img2dataset writes of the same files.
            fields = {"txt": "\n".join(captions(sample, "strict"))}
            photos.append((folder / file, fields, folder / file))
        beside = {file.with_suffix(ending) for file in images for ending in (".txt", ".json")}
        say_others(set(files).difference(images, beside))
        return photos, []
    inside = [file for file in images if len(file.parts) > 1]
    classes = sorted({file.parts[0] for file in inside})
    if classes and {name.lower() for name in classes} <= SPLITS:
        raise DataError(f"{folder}: {classes} are no classes; pack {folder / classes[0]} by itself")
    for name in classes:
        if "\n" in name:
            raise DataError(f"{folder}: a class folder's name has a line break: {name!r}")
    if len(images) > 2 * len(inside) > 0:
        raise DataError(
            f"{folder}: {len(images) - len(inside)} photos lie beside the class folders {classes}, "
            f"and {len(inside)} in them; move them into class folders, or these elsewhere"
        )
    used = inside or images
    photos = []
    for file in used:
        fields = {"txt": ""}
        if inside:
            name = file.parts[0]
            fields = {"cls": str(classes.index(name)), "txt": PACK_TEMPLATE.replace("{c}", name)}
        photos.append((folder / file, fields, folder / file))
    if classes:
        names = printable(", ".join(classes[:5])) + ", ..." * (len(classes) > 5)
        print(f"classes: {len(classes)} ({names}), captioned {PACK_TEMPLATE!r}, with c its name")
    folders = {path.parts[0] for path in found if (folder / path.parts[0]).is_dir()}
    empty = sorted(folders.difference(classes))
    if empty:
        print(f"passed over: folders without photos {empty}")
    say_others(set(files).difference(used))
    return photos, classes


def fault(photo):
    """What is wrong with a photo (path, fields, name); empty where nothing is."""
    path, _, name = photo
    try:
        decode(path.read_bytes())
    except (DataError, OSError) as error:
        return f"left out: {printable(str(name))}: {getattr(error, 'strerror', error)}"
    return ""


def packed(first, photos, size):
    """Yields the samples of photos that decode, of which `first` is the first's number."""
    for number, (path, fields, _) in enumerate(photos, first):
        content = path.read_bytes()
        kind = path.suffix[1:].lower()
        if size or kind not in IMAGE_FIELDS:
            image = decode(content)
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
                 captions; or a folder of photos, with captions if most have NAME.txt beside them
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
    if folder.startswith("pipe:"):
        raise DataError(f"{folder}: pipe: begins a command; name the folder otherwise")
    if not 0 <= test < 1:
        raise DataError(f"--test {test:g}: must be a share from 0 to below 1, such as 0.1")
    if shard < 1:
        raise DataError(f"--shard {shard}: must be 1 or more")
    if size < 0:
        raise DataError(f"--size {size}: must be 0 or more")
    classes = []
    if source.is_dir():
        photos, classes = read_folder(source)
    else:
        photos = read_table(source)
    if len(classes) == 1 and test:
        raise DataError(f"{source}: --test needs two class folders or more, {classes} is one")
    found = len(photos)
    faults = list(in_parallel(fault, photos, "decoding"))
    for reason in filter(None, faults):
        print(reason, file=sys.stderr)
    photos = [photo for photo, reason in zip(photos, faults, strict=True) if not reason]
    if not photos:
        raise DataError(f"{folder}: not made, since not one image could be read")
    captioned = [photo for photo in photos if photo[1]["txt"].strip()]
    bare = 0
    if captioned:  # else all are for mae
        bare = len(photos) - len(captioned)
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
    left = len(photos) - len(tested)  # for training
    if test and not (tested and left > 1):
        raise DataError(
            f"--test {test}: leaves {left} of {len(photos)} photos for training, {len(tested)} for "
            "the test; that needs one, and training two"
        )
    jobs = []
    shards = {}  # of each split
    for split in ("test", "train"):
        part = [photos[n] for n in order if (n in tested) == (split == "test")]
        for first in range(0, len(part), shard):
            path = f"{split}/{first // shard}.tar"
            jobs.append((path, packed, first, part[first : first + shard], size))
            shards[split] = first // shard + 1
    build(folder, described(classes, [PACK_TEMPLATE], shards), jobs)
    print(
        f"{folder}: {left} samples for training and {len(tested)} for test; "
        f"{found - len(photos)} left out, of these {bare} without caption"
    )
    if left < 2:
        print("training needs two photos or more")
        return
    if 0 < len(tested) < 10 and captioned and not classes:
        print("retrieval needs ten test photos: give a larger --test")
    if folder.startswith("-"):  # which a flag's value may not
        folder = f"./{folder}"
    flags = f"--data {quote(folder)} --out {quote(folder + '-run')}"
    if test:
        flags += f" --eval-data {quote(folder)}"
    if not captioned:
        print(f"{len(photos)} photos have no caption: they are for --method mae alone")
        flags += " --method mae"
    if left < 256:
        flags += f" --batch-size {left}"
    print(f"next:\npython mae_clip.py {flags}")
