"""Writes shards, and looks into shards: the commands of data.py.

    python data.py pack captions.csv FOLDER    makes shards of photographs (pack.py)
    python data.py inspect FOLDER              says what is in shards, and what is wrong with them
    python data.py tokenizer FOLDER FILE       learns a tokenizer that runs can share
    python data.py draw FOLDER                 draws the built-in scenes (scenes.py)

data.py's docstring says what a shard and a source of shards are.
"""

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from contextlib import contextmanager, suppress
from inspect import cleandoc, signature
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data import (
    DataError,
    Loader,
    Tokenizer,
    as_bytes,
    captions,
    in_parallel,
    one_line,
    printable,
    read_samples,
)
from machine import lock_file, write_whole


# --- Making shards --------------------------------------------------------------------------------
def as_jpeg(image):
    """PIL image -> JPEG bytes, of colours at full size."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


def write_shard(job):
    """Writes a tar; job: path, a function that yields samples (key, {field: str or bytes}), its
    arguments."""
    path, function, *arguments = job
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in function(*arguments):
            for field, content in fields.items():
                content = as_bytes(content)
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


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
    write_shard's jobs; it takes its name when it is whole. Another program that makes the same
    folder is waited for."""
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
            in_part = [(part / path, *job) for path, *job in jobs]
            for _ in in_parallel(write_shard, in_part, f"making {folder.name}"):
                pass
            part.rename(folder)
        except OSError as error:
            raise OSError(f"{folder}: could not be made: {one_line(error)}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def described(classes, templates, shards, where=""):
    """The texts of a folder in CLIP_benchmark's layout; shards: {split: how many}."""
    texts = {f"{where}{split}/nshards.txt": [str(count)] for split, count in shards.items()}
    if classes:
        texts[f"{where}classnames.txt"] = classes
        texts[f"{where}zeroshot_classification_templates.txt"] = templates
    return texts


# --- Looking into shards --------------------------------------------------------------------------
def inspect(source):
    """Says what is in local shards and what is wrong with them, as training would find it.

    source       shards: paths, globs, {000..123}, folders, joined by ::

    Exit code 1: something is wrong with some samples; 2: with most of them.
    """
    first = list(islice(read_samples(source), 5))
    try:
        loader = Loader(source, 1, 1, None, 3)
    except DataError as error:
        try:  # maybe for want of captions, which labelled sets and mae do without
            loader = Loader(source, 1, 1, None, 3, captions=False)
        except DataError:
            raise error from None
        print(
            "most samples have no caption: they train --method mae alone, or are a labelled set, "
            "or KEY.jpg and KEY.txt do not stand next to each other"
        )
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
    file         new file to write, for mae_clip.py --tokenizer
    --vocab-size ids at most
    """
    if Path(file).exists():
        raise DataError(
            f"{file}: exists already; give a new file (and quote braces and stars of shards: a "
            "shell puts their names in place of them)"
        )
    texts = tqdm(Loader(source, 1, 1, None, 3).texts(), disable=None)
    tokenizer = Tokenizer.train(texts, vocab_size)
    write_whole(file, json.dumps(tokenizer.merges))
    print(f"{file}: {tokenizer.vocab_size} ids")


def main(argv=None):
    """Runs a command, whose flags are its function's parameters; bad input: one line and exit code
    2."""
    from pack import pack  # here, as these build on this file
    from scenes import draw

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
