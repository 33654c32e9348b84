"""Image-caption shards in, exact batches out: reading, tokenizer, loader, augmentation and built-in scenes.

Shards are webdataset tars as img2dataset writes them: KEY.jpg, jpeg, png or webp with KEY.txt (one caption a
line) or KEY.json (field `caption`). A source names shards by paths, globs and {000..123}, joined by `::`;
`pipe:COMMAND` is what a command sends. The file runs when copied out alone.

    python data.py pack captions.csv shards               makes shards of what you have
    python data.py inspect 'shards/*.tar'                 says what is in them, and what is wrong
    python data.py tokenizer 'shards/*.tar' vocab.json    trains a tokenizer to share between runs
    python data.py draw scenes                            draws the built-in scenes
"""

import argparse
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from heapq import heapify, heappop, heappush
from inspect import signature
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # of Pillow's decoders no other is run
WANTED = (*IMAGE_FIELDS, "txt", "json", "__key__", "__bad__")
MAX_PIXELS = 89_478_485  # an image of more is refused by its header, as a decompression bomb (Pillow's limit)
PIPE_SECONDS = 60  # a command that sends nothing for so long has failed
WINDOW = 1000  # samples of a stream among which a worker shuffles
PAD, SOT, EOT = 0, 1, 2

class DataError(ValueError):
    """What the user gave does not work; the message is one line that says what, and what to do."""

class Damaged(DataError):
    """A sample, or the rest of a tar, is of no use: it is skipped, and counted by this message, the cause."""

def cache_folder():
    """$XDG_CACHE_HOME/mae_clip, else ~/.cache/mae_clip."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_clip"

def in_parallel(function, jobs, label, workers=0):
    """Yields function(job) of each job, in order, from worker processes, with a progress bar."""
    with ProcessPoolExecutor(min(len(jobs), workers or os.cpu_count()), initializer=be_quiet) as pool:
        try:
            yield from tqdm(pool.map(function, jobs), label, len(jobs), leave=False, disable=None)
        finally:
            pool.shutdown(cancel_futures=True)

def be_quiet(worker=0):
    """In a worker process: Ctrl-C is the parent's, SIGTERM ends it in order, it computes on one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    torch.set_num_threads(1)

# --- Reading shards --------------------------------------------------------------------------------------
def expand(source):
    """A source as a list of shards: paths, globs and {000..123}, joined by `::`; a list is taken as it is."""
    if not isinstance(source, str):
        return [str(shard) for shard in source]
    shards, texts = [], source.split("::")
    while texts:
        text = texts.pop(0)
        match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
        if match and int(match[1]) <= int(match[2]):
            numbers = [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2]) + 1)]
            texts[:0] = [text.replace(match[0], n, 1) for n in numbers]
        elif text.startswith("pipe:") or os.path.isfile(text):
            shards.append(text)
        elif found := sorted(filter(os.path.isfile, glob.glob(text))):
            shards += found
        else:
            raise DataError(f"{text}: no such shard; check the path, and quote braces and stars")
    return shards

def shown(shard):
    """A shard's name without its folder; of a command program and tar alone, as the rest may be secret."""
    if not shard.startswith("pipe:"):
        return os.path.basename(shard)
    tars = re.findall(r"[\w.-]+\.tar\b", re.sub(r"[?#]\S*", "", shard))
    return " ".join(re.findall(r"^pipe:\s*[\w-]*(?=\s|$)", shard) + tars[-1:]) or "pipe:"

@contextmanager
def opened(shard):
    """A shard as a file that is read forwards; DataError where a command hangs or, at its end, has failed."""
    if not shard.startswith("pipe:"):
        with open(shard, "rb") as file:
            yield file
        return
    process = subprocess.Popen(shard[len("pipe:") :], shell=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    def read(size):
        if not select.select([process.stdout], [], [], PIPE_SECONDS)[0]:
            raise DataError(f"{shown(shard)}: the command sent nothing for {PIPE_SECONDS} s")
        return os.read(process.stdout.fileno(), size)
    try:
        yield SimpleNamespace(read=read)
        while read(1 << 20):  # what follows the tar, so that the command can end
            pass
        if code := process.wait(PIPE_SECONDS):
            raise DataError(f"{shown(shard)}: the command ended with exit code {code}; try it by itself")
    except subprocess.TimeoutExpired:
        raise DataError(f"{shown(shard)}: the command did not end in {PIPE_SECONDS} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

class Member(tarfile.TarInfo):
    """A file in a tar. A damaged header is an error, where tarfile takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError:
            other = "not an uncompressed tar (of a compressed one give pipe:gzip -dc FILE)"
            raise Damaged("tar breaks off" if tar.offset else other) from None

def grouped(file, load=True):
    """Yields a tar's samples {field: bytes, or without load (offset, size)} with `__key__`, by webdataset's
    rule: key is the path up to the first dot of the base name, fields are in lower case; of one that comes
    twice the first counts. Where a tar breaks off or has no sample, a last one has the cause in `__bad__`."""
    sample, fields, bad = {}, None, "tar without samples"
    try:
        with tarfile.open(fileobj=file, mode="r|" if load else "r:", tarinfo=Member, bufsize=1 << 16) as tar:
            for info in tar:
                tar.members = []  # where tarfile would keep them all
                match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
                if not info.isreg() or not match or re.match(r"__[^/]*__($|/)", info.name):
                    continue
                if sample and sample["__key__"] != match[1]:
                    yield sample
                    sample, fields = {}, sample.keys()
                value, bad = tar.extractfile(info).read() if load else (info.offset_data, info.size), None
                sample = {"__key__": match[1], match[2].lower(): value} | sample
    except Damaged as error:  # between files: the last sample is whole if it has the fields of the one before
        sample, bad = sample if fields in (None, sample.keys()) else {}, str(error)
    except (tarfile.TarError, OverflowError):  # within a file
        sample, bad = {}, "tar breaks off"
    if sample:
        yield sample
    if bad:
        yield {"__key__": "", "__bad__": bad}

def read_samples(source):
    """Yields the shards' samples, in order, as raw bytes by lower-cased field name, with `__key__`; says on
    stderr where a tar breaks off, and goes on with the next."""
    for shard in expand(source):
        with opened(shard) as file:
            for sample in grouped(file):
                if "__bad__" in sample:
                    print(f"{shown(shard)}: {sample['__bad__']}", file=sys.stderr)
                else:
                    yield sample

def image_of(sample):
    """A sample's image, or None."""
    return next((sample[field] for field in IMAGE_FIELDS if field in sample), None)

def captions(sample):
    """A sample's captions: the lines of its txt that are not empty, else the field `caption` of its json."""
    text = sample.get("txt", sample.get("json", b"")).decode("utf-8-sig", "replace")
    if "txt" not in sample:
        try:
            text = json.loads(text)["caption"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
    lines = text if isinstance(text, list) else str(text or "").splitlines()
    return [str(line).strip() for line in lines if str(line).strip()]

def usable(sample, captioned=True):
    """A sample's image as raw bytes and, if it must have some, its captions; Damaged where one is missing."""
    image, texts = image_of(sample), captions(sample) if captioned else [""]
    if "__bad__" in sample or not image or not texts:
        raise Damaged(sample.get("__bad__") or ("no caption" if image else "no image"))
    return image, texts

def captioned(source):
    """Yields (key, image bytes, captions) of the samples that have both."""
    for sample in read_samples(source):
        with suppress(Damaged):
            yield sample["__key__"], *usable(sample)

def labelled(folder, split):
    """Yields (key, image bytes, label) of a split of a folder in CLIP_benchmark's layout."""
    count = Path(folder, split, "nshards.txt")
    try:
        shards = [str(count.with_name(f"{n}.tar")) for n in range(int(count.read_text()))]
    except (OSError, ValueError):
        raise DataError(f"{count}: must hold the number of shards") from None
    for sample in read_samples("::".join(shards)):
        try:
            yield sample["__key__"], image_of(sample), int(sample["cls"])
        except (KeyError, ValueError):
            raise DataError(f"{folder}/{split}: {sample['__key__']}.cls holds no class index") from None

# --- Images ----------------------------------------------------------------------------------------------
def open_image(data):
    """Image bytes -> PIL image of which the header is read; Damaged where that is no use."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        bomb = isinstance(error, Image.DecompressionBombError)
        raise Damaged("image too large" if bomb else "image header unreadable") from None
    if image.width * image.height > MAX_PIXELS:
        raise Damaged("image too large")
    return image

def decode(data, finer=1):
    """Image bytes, or what open_image made of them -> upright PIL image in RGB, the first frame; DataError
    where it fails. finer: how far its sides exceed what is needed: a JPEG is then decoded at 1/2, 1/4 or
    1/8."""
    image = data if isinstance(data, Image.Image) else open_image(data)
    try:
        image.draft("RGB", (math.ceil(image.width / finer), math.ceil(image.height / finer)))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip
            image = Image.fromarray((np.asarray(image, np.int32).clip(0, 65535) >> 8).astype(np.uint8))
        if image.has_transparency_data:  # what is transparent shows white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception:
        raise Damaged("image does not decode") from None

def cut(image, size, box):
    """A box (left, top, right, bottom) of a PIL image, resized (bicubic, antialiased) -> uint8 (3,S,S)."""
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

def preprocess(image, size):
    """The test transform: PIL image -> uint8 (3,S,S), short side resized (bicubic, antialiased), its
    centre."""
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    x, y = image.width / width, image.height / height  # what is not seen is not resized, so strips stay cheap
    return cut(image, size, (left * x, top * y, (left + size) * x, (top + size) * y))

def random_crop(data, size, least, rng):
    """Image bytes -> uint8 (3,S,S): a random box, of `least` to 1 of the area, sides from 3:4 to 4:3,
    resized. A JPEG is decoded no finer than the box needs."""
    image = open_image(data)
    width, height = image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size  # as it is upright
    for area, ratio in zip(rng.uniform(least, 1, 10), (4 / 3) ** rng.uniform(-1, 1, 10), strict=True):
        w, h = math.sqrt(area * ratio * width * height), math.sqrt(area / ratio * width * height)
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    image = decode(image, max(1, min(w, h) / size))
    across, down = image.width / width, image.height / height  # below 1 where it was decoded smaller
    return cut(image, size, (x * across, y * down, (x + w) * across, (y + h) * down))

@lru_cache(1 << 16)
def small_whole(data, size):
    """The test transform of small images, which then stay decoded."""
    return preprocess(decode(data), size)

# --- Tokenizer -------------------------------------------------------------------------------------------
class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016), lossless on any bytes. `vocab_size` ids: PAD,
    SOT, EOT, 256 bytes, then merges as they were learned; inside, they are characters of a str: a merge is a
    replace."""

    pieces = re.compile(rb" ?(?:[A-Z]{1,63}|\d{1,63}|[\x80-\xff]{1,63}|[!-/:-@[-`{-~]{1,9})|\s{1,64}|.", re.I)

    def __init__(self, merges):
        """merges: pairs of ids, the n-th of which becomes id 259 + n."""
        self.merges, self.cache = [tuple(pair) for pair in merges], {}
        self.new = {chr(a) + chr(b): 259 + n for n, (a, b) in enumerate(self.merges)}
        self.bytes = [b"", b"", b""] + [bytes([n]) for n in range(256)]
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.vocab_size = len(self.bytes)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns merges from texts (str or bytes) until there are vocab_size ids, or no pair occurs twice."""
        if vocab_size < 259:
            raise DataError(f"a vocabulary of {vocab_size}: must be at least 259, 256 bytes and 3 specials")
        counts = Counter(piece for text in texts for piece in cls.pieces.findall(as_bytes(text)))
        words, counts = [as_ids(piece) for piece in counts], list(counts.values())
        pairs, where, merges, changed = Counter(), defaultdict(set), [], set()
        def count(n, times):
            for pair in adjacent(words[n]):
                pairs[pair] += times
                where[pair].add(n)
                changed.add(pair)
        for n in range(len(words)):
            count(n, counts[n])
        # The most frequent pair, the smallest ids first among equals; counts in the heap may be out of date.
        heap = [(-number, pair) for pair, number in pairs.items()]
        heapify(heap)
        while heap and len(merges) < vocab_size - 259:
            number, pair = heappop(heap)
            if -number != pairs[pair]:
                continue
            if -number < 2:
                break
            changed.clear()
            for n in where.pop(pair):
                count(n, -counts[n])
                words[n] = words[n].replace(pair, chr(259 + len(merges)))
                count(n, counts[n])
            for each in changed:
                heappush(heap, (-pairs[each], each))
            merges.append(tuple(map(ord, pair)))
        return cls(merges)

    def encode(self, text):
        """str or bytes -> ids, without specials."""
        ids = []
        for piece in self.pieces.findall(as_bytes(text)):
            if piece not in self.cache:
                word = as_ids(piece)
                while found := self.new.keys() & adjacent(word):
                    pair = min(found, key=self.new.get)
                    word = word.replace(pair, chr(self.new[pair]))
                if len(self.cache) > 200_000:
                    self.cache.clear()
                self.cache[piece] = list(map(ord, word))
            ids += self.cache[piece]
        return ids

    def decode(self, ids):
        """ids -> bytes; specials vanish."""
        return b"".join(self.bytes[int(n)] for n in ids)

    def batch(self, texts, context):
        """texts -> (B, context) int64: SOT, ids, EOT, cut so that EOT stays, padded."""
        rows = np.full((len(texts), context), PAD, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text[: 64 * context])[: context - 2]  # a piece, so an id, has at most 64 bytes
            row[: len(ids) + 2] = [SOT, *ids, EOT]
        return torch.from_numpy(rows)

    def state(self):
        """Plain values for a checkpoint or a json file."""
        return {"merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        """The tokenizer whose state() this is."""
        return cls(state["merges"])

    @classmethod
    def load(cls, path):
        """Reads what `data.py tokenizer` wrote."""
        try:
            return cls.from_state(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise DataError(f"{path}: not a tokenizer's file; make one with data.py tokenizer") from None

def as_bytes(text):
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)

def as_ids(piece):
    return "".join(chr(byte + 3) for byte in piece)

def adjacent(word):
    return [a + b for a, b in zip(word, word[1:], strict=False)]

# --- Index and loader ------------------------------------------------------------------------------------
def fault(file, at, size, least=2048):
    """What is wrong with the image that lies there in a shard, by its header and its end alone, or None."""
    head, end = os.pread(file, min(size, least), at), at + size
    try:
        open_image(head)
    except DataError as error:  # perhaps its header is longer
        return fault(file, at, size, 1 << 24) if least < min(size, 1 << 24) else str(error)
    marker = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2], b"")  # of a JPEG's or PNG's end
    return None if marker in os.pread(file, min(size, 1024), end - min(size, 1024)) else "image incomplete"

def index_shard(job):
    """job: a shard, whether captions are needed -> keys and rows of what is readable, [key, cause] of the
    rest. A row: offset and size of the image, offset and size of the caption, 1 where that is json. It is all
    kept in the cache folder, under the shard's path, size and time of change."""
    path, need = job
    about, keys, rows, bad = os.stat(path), [], [], []
    name = os.fsencode(f"2 {os.path.abspath(path)} {about.st_size} {about.st_mtime_ns} {need}")
    cache = cache_folder() / "index" / f"{hashlib.sha256(name).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(cache.read_text())
    with open(path, "rb") as tar, open(path, "rb") as file:
        for sample in grouped(tar, load=False):
            image, field = image_of(sample) or (0, 0), "txt" if "txt" in sample else "json"
            text = sample.get(field, (0, 0)) if need else (0, 0)
            cause = sample.get("__bad__") or (fault(file.fileno(), *image) if image[1] else "no image")
            if need and not cause and not captions({field: os.pread(file.fileno(), text[1], text[0])}):
                cause = "no caption"
            if cause:
                bad.append([sample["__key__"], cause])
            else:
                keys.append(sample["__key__"])
                rows.append([*image, *text, int(field == "json")])
    with suppress(OSError):  # a cache that cannot be written costs time only
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps([keys, rows, bad]))
        part.replace(cache)
    return keys, rows, bad

# One step's samples of one rank: images uint8 (B,3,S,S), tokens int64 (B,T), keys.
Batch = namedtuple("Batch", "images tokens keys")

class Loader:
    """Batches of a source. Of local shards every readable sample comes once an epoch over all ranks and
    workers, but for the last `count mod global batch` of its order; order, crops and captions are a pure
    function of (seed, epoch). Streams (`pipe:`, or resample) are read shard after shard, each by one worker,
    shuffled in a window.

    `stream`; `samples` (None for a stream); `identity`: plain values that tell the same data again; `bad`:
    skipped samples by cause; `position`: the number in a stream's sequence of shards at which batches() goes
    on."""

    def __init__(self, source, batch_size, image_size, tokenizer, context, seed=0, rank=0, world=1, workers=0,
                 crop=1.0, captions=True, resample=False):
        """batch_size: of one rank; crop: least area of a random crop, 1 for the test transform; captions:
        whether samples need one (tokens are else SOT, EOT); resample: draw shards with replacement. DataError
        where usable samples are fewer than a batch, or than the others."""
        self.batch_size, self.image_size, self.crop = batch_size, image_size, crop
        self.tokenizer, self.context, self.captions = tokenizer, context, captions
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.resample, self.shards = resample, expand(source)
        self.stream = resample or any(shard.startswith("pipe:") for shard in self.shards)
        self.samples, self.position, self.bad, self.good = None, 0, Counter(), 0
        self.identity = {"shards": [shown(shard) for shard in self.shards]}
        if not self.stream:
            self.read_index()
        elif world > 1 and not resample:
            raise DataError("a stream across several processes needs --resample and --steps")

    def read_index(self):
        """Finds what is readable in local shards."""
        index = list(in_parallel(index_shard, [(shard, self.captions) for shard in self.shards], "indexing"))
        keys = [os.fsencode(key) for found, _, _ in index for key in found]
        # Few arrays: of a list of many objects every forked worker would make a copy as it looks at them.
        self.names, self.ends = np.frombuffer(b"".join(keys), np.uint8), np.cumsum([0, *map(len, keys)])
        self.rows = np.concatenate([np.array(rows, np.int64).reshape(-1, 5) for _, rows, _ in index])
        self.shard_of = np.repeat(np.arange(len(index)), [len(rows) for _, rows, _ in index])
        self.samples, batch = len(keys), self.batch_size * self.world
        for shard, (_, rows, bad) in zip(self.shards, index, strict=True):
            self.skip([(f"{shown(shard)} {key}", cause) for key, cause in bad], len(rows), math.inf)
        if self.samples < max(batch, sum(self.bad.values())):
            raise DataError(f"{self.samples} usable samples, a batch is {batch}; {self.report()}")
        sizes, digest = [os.path.getsize(shard) for shard in self.shards], hashlib.sha256(b"\n".join(keys))
        self.identity |= {"sizes": sizes, "samples": self.samples, "keys": digest.hexdigest()}

    def __len__(self):
        """Batches an epoch, the same on every rank; DataError for a stream."""
        if self.stream:
            raise DataError("the samples of a stream are not counted beforehand; give --steps")
        return self.samples // (self.batch_size * self.world)

    def skip(self, failed, good, least=100):
        """Counts and logs what failed, (name, cause) each, beside how many did not; DataError if most did."""
        for name, cause in failed:
            if isinstance(cause, Exception):  # a worker's last words
                raise DataError(str(cause))
            self.bad[cause] += 1
            if sum(self.bad.values()) <= 5:
                tqdm.write(f"skipped: {name}: {cause}", file=sys.stderr)
        self.good += good
        if sum(self.bad.values()) > max(self.good, least):
            raise DataError(f"most samples are of no use, {self.good} are usable; {self.report()}")

    def report(self):
        """What was skipped, in a line; empty if nothing was."""
        causes = ", ".join(f"{n} x {cause}" for cause, n in self.bad.most_common())
        return causes and f"skipped: {causes}"

    def read(self, n):
        """Sample n of the index, as raw bytes."""
        at, size, text_at, text_size, is_json = self.rows[n].tolist()
        key = self.names[self.ends[n] : self.ends[n + 1]]
        with open(self.shards[self.shard_of[n]], "rb", buffering=0) as file:
            image, text = os.pread(file.fileno(), size, at), os.pread(file.fileno(), text_size, text_at)
        return {"__key__": os.fsdecode(key.tobytes()), "jpg": image, ("txt", "json")[is_json]: text}

    def texts(self):
        """Yields captions for the tokenizer: all, or of a stream the first 200,000."""
        samples = read_samples(self.shards) if self.stream else map(self.read, range(self.samples))
        texts = (text for sample in samples for text in captions(sample))
        return islice(texts, 200_000 if self.stream else None)

    def make(self, sample, rng):
        """A sample as raw bytes -> its image (3,S,S) and a caption; Damaged where it is no good."""
        image, texts = usable(sample, self.captions)
        text = texts[rng.integers(len(texts))]
        if self.crop < 1:
            return random_crop(image, self.image_size, self.crop, rng), text
        if self.image_size <= 64:
            return small_whole(image, self.image_size), text
        return preprocess(decode(image), self.image_size), text

    def indexed(self, steps):
        """Yields (sample, noise) of the batches with these numbers, which count on from epoch to epoch, each
        batch followed by (None, None)."""
        last = None
        for step in steps:
            epoch, number = divmod(step, len(self))
            if epoch != last:
                order, last = np.random.default_rng([self.seed, epoch]).permutation(self.samples), epoch
            first = (number * self.world + self.rank) * self.batch_size
            for n in order[first : first + self.batch_size].tolist():
                yield self.read(n), np.random.default_rng([self.seed, epoch, n])
            yield None, None

    def streamed(self, numbers):
        """Yields (sample, noise) of the shards with these numbers in the endless sequence, shuffled in a
        window."""
        window, count = [], len(self.shards)
        for number in numbers:
            self.position = number + 1
            rng = np.random.default_rng([self.seed, number if self.resample else number // count, self.rank])
            place = rng.integers(count) if self.resample else rng.permutation(count)[number % count]
            with opened(shard := self.shards[place]) as file:
                for n, sample in enumerate(grouped(file)):
                    sample["__key__"] = sample["__key__"] or shown(shard)
                    wanted = {field: sample[field] for field in sample if field in WANTED}
                    window.append((wanted, np.random.default_rng([self.seed, number, self.rank, n])))
                    if len(window) > WINDOW:
                        yield window.pop(rng.integers(WINDOW))
        yield from (window[n] for n in np.random.default_rng(self.seed).permutation(len(window)))

    def work(self, numbers):
        """What a worker does: yields images, tokens, keys, (name, cause) of what failed, the position."""
        made, failed = [], []
        def chunk():
            keys, images, texts = zip(*made, strict=True) if made else ((), [torch.empty(0)], ())
            tokens = (self.tokenizer or Tokenizer([])).batch(texts, self.context)
            return torch.stack(images), tokens, list(keys), failed, self.position
        for sample, noise in (self.streamed if self.stream else self.indexed)(numbers):
            if sample:
                try:
                    made.append((sample["__key__"], *self.make(sample, noise)))
                except Damaged as error:
                    failed.append((sample["__key__"], str(error)))
            elif made:
                made = [made[n % len(made)] for n in range(self.batch_size)]  # in place of failed ones
            elif failed:
                raise DataError(f"no image of a whole batch decodes: {failed[0][1]}")
            if len(made) == self.batch_size or (self.stream and len(failed) > 100):
                yield chunk()
                made, failed = [], []
        yield chunk()

    def deliver(self, start, stop):
        """Yields the batches, or a stream's shards, start ... stop as Batches, from the workers."""
        rest, B, workers = None, self.batch_size, min(self.workers, stop - start)
        for images, tokens, keys, failed, position in DataLoader(
                Feed(self, start, stop), None, num_workers=workers, collate_fn=tuple, worker_init_fn=be_quiet,
                pin_memory=torch.cuda.is_available()):
            self.position = max(self.position, position)
            self.skip(failed, len(keys))
            if not keys:
                continue
            if rest:
                keys = rest[0] + keys
                images, tokens = torch.cat([rest[1], images]), torch.cat([rest[2], tokens])
            whole = len(keys) // B * B
            for n in range(0, whole, B):
                yield Batch(images[n : n + B], tokens[n : n + B], keys[n : n + B])
            rest = whole < len(keys) and (keys[whole:], images[whole:], tokens[whole:])

    def epoch(self, n, skip=0):
        """Yields this rank's batches of epoch n after the first `skip`, all of full size; of a stream, those
        of one pass over its shards."""
        size = len(self.shards) if self.stream else len(self)
        return self.deliver(n * size + skip, (n + 1) * size)

    def batches(self, step, position=0):
        """Yields batches without end from this step on; of a stream, from this number in its sequence of
        shards."""
        self.position = position
        return self.deliver(position if self.stream else step, sys.maxsize)

class Feed(IterableDataset):
    """A Loader's work as a DataLoader wants it, the share of one worker."""

    def __init__(self, loader, start, stop):
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self):
        worker, workers = (info.id, info.num_workers) if (info := get_worker_info()) else (0, 1)
        try:
            yield from self.loader.work(range(self.start + worker, self.stop, workers))
        except (DataError, OSError) as error:  # which the parent raises, in one line
            yield torch.empty(0), torch.empty(0), [], [("", error)], 0

# --- Augmentation ----------------------------------------------------------------------------------------
def simclr_view(images, noise, least=0.08):
    """One of SimCLR's views of each image, on the batch and on its device: crop, flip and colours.

    images uint8 (B,3,H,W), noise (B,12) uniform, the only chance; least: share of the area that a crop keeps
    -> uint8 (B,3,H,W). Strengths are SLIP's: jitter 0.4, 0.4, 0.4, 0.1 with p 0.8, grey 0.2; no blur."""
    u, x = noise.T, images.float() / 255
    area, ratio = least + (1 - least) * u[0], torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares of the sides
    left, top, flip = (1 - w) * (2 * u[2] - 1), (1 - h) * (2 * u[3] - 1), torch.where(u[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(w)
    affine = torch.stack([w * flip, zero, left, zero, h, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    # Brightness, saturation and hue are one 3x3 matrix on colours: hue turns them about the grey axis.
    jitter = (u[5] < 0.8).float()
    bright, contrast, saturation = (1 + 0.4 * (2 * u[n] - 1) * jitter for n in (6, 7, 8))
    saturation = torch.where(u[10] < 0.2, 0.0, saturation)
    angle = 0.2 * math.pi * (2 * u[9] - 1) * jitter
    grey = torch.tensor([0.299, 0.587, 0.114], device=x.device).expand(3, 3)
    third = torch.full((3, 3), 1 / 3, device=x.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=x.device) / math.sqrt(3)
    eye = torch.eye(3, device=x.device)
    cos, sin, bright, saturation = (y.view(-1, 1, 1) for y in (angle.cos(), angle.sin(), bright, saturation))
    hue = third + cos * (eye - third) + sin * cross
    colour = bright * (saturation * eye + (1 - saturation) * grey) @ hue
    x = torch.einsum("bij,bjhw->bihw", colour, x)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + contrast.view(-1, 1, 1, 1) * (x - mean)
    return (x.clamp(0, 1) * 255).round().byte()

# --- Writing and inspecting shards ------------------------------------------------------------------------
def write_shard(path, samples):
    """Writes samples (key, {field: bytes}) as a tar."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in samples:
            for field, content in fields.items():
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

@contextmanager
def new_folder(folder):
    """A folder to fill, which takes its name when it is whole; DataError where there is one of that name."""
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    if folder.exists():
        raise DataError(f"{folder}: exists already; give a new folder")
    part.mkdir(parents=True)
    try:
        yield part
        with suppress(OSError):  # another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)

def label_folder(folder, names, templates, shards):
    """Makes CLIP_benchmark's layout: a folder for each split of {split: shards}, and what describes them."""
    for split, count in shards.items():
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text(str(count))
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))

def pack_shard(job):
    """Writes one shard; job: path, (number, image's path, text) each, field of the text, size -> broken
    ones."""
    path, items, field, size = job
    broken = []
    def samples():
        for number, place, text in items:
            try:
                if not text:
                    raise Damaged("no caption")
                content = place.read_bytes()
                kind, image = open_image(content).format, decode(content)
                if kind not in ("JPEG", "PNG", "WEBP") or 0 < size < min(image.size):
                    out, shrink = io.BytesIO(), min(1, (size or math.inf) / min(image.size))
                    sides = [round(side * shrink) for side in image.size]
                    image.resize(sides, Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
                    kind, content = "JPEG", out.getvalue()
                yield f"{number:08d}", {kind.lower().replace("jpeg", "jpg"): content, field: text.encode()}
            except (DataError, OSError) as error:
                broken.append(f"{place}: {getattr(error, 'strerror', None) or error}")
    write_shard(path, samples())
    return broken

def pack(source, folder, size=0, caption=False, templates="a photo of a {c}", test=0.0, shard=1000, seed=0,
         workers=0):
    """Makes shards, in a new folder, of images that lie in files.

    SOURCE is a csv or tsv of path and captions, which gives train-*.tar; or a folder of class folders, which
    gives a labelled set in CLIP_benchmark's layout, or with --caption train-*.tar, captioned by the templates
    (joined by `::`). --size: pixels of the short side where it is longer; --test: share of a test split
    (without it, a labelled set is all test); --shard: samples a shard; --seed: of the order; --workers: 0 is
    one a core."""
    source, templates, rows = Path(source), templates.split("::"), defaultdict(list)
    names = sorted(path.name for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    for label, name in enumerate(names):
        texts = [template.replace("{c}", name) for template in templates] if caption else [str(label)]
        rows |= {path: texts for path in sorted((source / name).rglob("*")) if path.is_file()}
    if not source.is_dir():
        with source.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            for row in filter(None, csv.reader(file, delimiter="\t" if source.suffix == ".tsv" else ",")):
                rows[source.parent / row[0]] += [" ".join(text.split()) for text in row[1:] if text.strip()]
        if rows and not next(iter(rows)).is_file():
            del rows[next(iter(rows))]  # names of the columns
    if not rows:
        raise DataError(f"{source}: neither a table of paths and captions nor class folders of images")
    items = [(n, path, "\n".join(texts)) for n, (path, texts) in enumerate(rows.items())]
    items = [items[n] for n in np.random.default_rng(seed).permutation(len(items))]
    labels, jobs = names and not caption, []
    first = round(test * len(items)) if test or not labels else len(items)
    splits = {"test": items[:first], "train": items[first:]}
    with new_folder(folder) as part:
        if labels:
            counts = {split: -(-len(rows) // shard) for split, rows in splits.items() if rows}
            label_folder(part, names, templates, counts)
        for split, rows in splits.items():
            for n in range(0, len(rows), shard):
                path = f"{split}/{n // shard}.tar" if labels else f"{split}-{n // shard:05d}.tar"
                jobs.append((part / path, rows[n : n + shard], "cls" if labels else "txt", size))
        broken = [each for found in in_parallel(pack_shard, jobs, "packing", workers) for each in found]
        if len(broken) == len(items):
            raise DataError(f"{source}: nothing of it can be used; {broken[0]}")
    print("\n".join(f"left out: {each}" for each in broken), file=sys.stderr)
    print(f"{folder}: {len(items) - len(broken)} samples in {len(jobs)} shards; {len(broken)} left out")

def inspect_shard(shard):
    """-> causes of what is bad; of the rest key, sides and lengths of captions; seconds; pictures with
    captions."""
    causes, rows, shots, began = Counter(), [], [], time.perf_counter()
    with opened(shard) as file:
        for sample in grouped(file):
            try:
                content, texts = usable(sample, "cls" not in sample)
                image = decode(content)
                rows.append((sample["__key__"], image.size, [len(text) for text in texts]))
                if len(shots) < 25:
                    shots.append((ImageOps.contain(image, (150, 150)), texts[0] or str(sample["cls"][:20])))
            except Damaged as error:
                causes[str(error)] += 1
                print(f"{shown(shard)} {sample['__key__']!a}: {error}", file=sys.stderr)
    return causes, rows, time.perf_counter() - began, shots

def inspect(source, sheet="contact-sheet.png", workers=0):
    """Says what is in shards and what is wrong, and saves some pictures with their captions as --sheet. The
    exit code is 1 where something is wrong, 2 where nothing can be read."""
    found = in_parallel(inspect_shard, expand(source), "inspecting", workers)
    causes, rows, seconds, shots = zip(*found, strict=True)
    causes, rows, shots = sum(causes, Counter()), sum(rows, []), sum(shots, [])
    if not rows:
        raise DataError(f"{source}: no usable sample; {dict(causes)}")
    print(f"{len(seconds)} shards, {len(rows)} usable samples; decoding takes {sum(seconds):.1f} s")
    widths, heights = zip(*(size for _, size, _ in rows), strict=True)
    lengths, counts = [length for *_, each in rows for length in each], [len(each) for *_, each in rows]
    for name, values in {"width": widths, "height": heights, "captions": counts, "letters": lengths}.items():
        print(f"{name}: {min(values)} to {max(values)}, median {np.median(values):g}, in all {sum(values)}")
    twice = len(rows) - len({key for key, *_ in rows})
    print("bad samples:", ", ".join(f"{n} x {cause}" for cause, n in causes.items()) or "none")
    print(f"keys that come again: {twice}")
    page = Image.new("RGB", (800, 950), "white")
    for n, (image, text) in enumerate(shots[:: -(-len(shots) // 25)]):
        x, y = n % 5 * 160 + 5, n // 5 * 190 + 5
        page.paste(image, (x, y))
        lines = "\n".join(text.encode("ascii", "replace").decode()[start : start + 24] for start in (0, 24))
        ImageDraw.Draw(page).text((x, y + 152), lines, "black")
    page.save(sheet)
    print(f"pictures with captions: {sheet}")
    return 1 if causes or twice else 0

# --- Built-in scenes --------------------------------------------------------------------------------------
COLOURS = {
    "red": (214, 39, 40), "green": (44, 150, 60), "blue": (40, 80, 220), "yellow": (245, 220, 50),
    "orange": (250, 130, 20), "purple": (130, 50, 170), "pink": (250, 150, 200), "brown": (120, 72, 40),
    "cyan": (60, 210, 225), "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
CLASSES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PHRASES = ("{}", "{}", "one {}", "there is {}", "a picture of {}", "a drawing of {}", "this is {}", "{} here")
SETS = {  # labelled sets: the names of their classes, and templates
    "objects": ([" ".join(pair) for pair in CLASSES], ["a {c}", "there is a {c}", "a picture of a {c}"]),
    "count": (["one object", "two objects", "three objects", "four objects"], ["{c}", "a picture of {c}"]),
    "position": (["top left", "top right", "bottom left", "bottom right"], ["a shape in the {c}"]),
    "relation": ([f"a red circle {relation} a blue square" for relation in RELATIONS], ["{c}"]),
}
SIDE = 32  # pixels

def polar(radius, angle):
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

def outlines():
    """The outline (points,2) of each shape, about the unit circle, y down."""
    turn, tips, bite = np.linspace(0, 2 * np.pi, 33), np.arange(10), np.linspace(-1.9, 1.9, 25)
    arms = np.array([0.995, 0.995, 0.453] * 4)  # of a cross: two corners at the end, one in the angle between
    at = np.concatenate([n * np.pi / 2 + np.array([-0.32, 0.32, np.pi / 4]) for n in range(4)])
    heart = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    outer = polar(1, np.linspace(0.74, 2 * np.pi - 0.74, 25))
    return {
        "circle": polar(0.9, turn), "square": polar(1.1, np.pi / 4 + np.arange(4) * np.pi / 2),
        "triangle": polar(1.1, np.arange(3) * 2 * np.pi / 3 - np.pi / 2),
        "star": polar(np.where(tips % 2, 0.42, 1.05), tips * np.pi / 5 - np.pi / 2), "cross": polar(arms, at),
        "ring": np.concatenate([polar(1, turn), polar(0.55, -turn)]),
        "heart": np.stack([np.sin(turn) ** 3, -heart / 16], axis=1),
        "crescent": np.concatenate([outer, polar(0.8, bite) * (-1, 1) + (0.45, 0)]),
    }

OUTLINES = outlines()

def render(rng, objects):
    """Draws objects (colour, shape, x, y, radius; pixels) on a random background with noise -> JPEG bytes."""
    paints = np.array([COLOURS[colour] for colour, *_ in objects], dtype=np.float32)
    for _ in range(20):  # a background, shaded from one colour to another, in which no object drowns
        ends = rng.uniform(0, 255, (3, 3))
        ends[1] = (ends[0] + ends[2]) / 2
        if np.abs(paints[:, None] - ends).sum(axis=2).min() > 150:
            break
    angle, grid = rng.uniform(0, 2 * math.pi), np.linspace(-0.7, 0.7, SIDE)
    ramp = (0.5 + grid * math.cos(angle) + grid[:, None] * math.sin(angle)).clip(0, 1)[..., None]
    pixels = ends[0] * ramp + ends[2] * (1 - ramp)
    for paint, (_, shape, x, y, radius) in zip(paints, objects, strict=True):
        turn = rng.uniform(-0.26, 0.26)
        matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        points = OUTLINES[shape] @ matrix * radius + (x, y)
        cover = Image.new("L", (3 * SIDE, 3 * SIDE))  # drawn three times as fine, for smooth edges
        ImageDraw.Draw(cover).polygon((3 * points).ravel().tolist(), fill=255)
        alpha = np.asarray(cover.reduce(3))[..., None] / 255
        pixels = pixels * (1 - alpha) + (paint * rng.uniform(0.88, 1.05) + rng.normal(0, 6, 3)) * alpha
    pixels = pixels + rng.uniform(2, 10) * rng.standard_normal(pixels.shape, dtype=np.float32)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()

def related(rng, first, second, relation):
    """Two objects, the first in that relation to the second."""
    step = np.array(RELATIONS[relation])
    aside, centre = 8 * step + rng.uniform(-5, 5) * step[::-1], rng.uniform(15, 17, 2)
    pairs = (first, centre + aside), (second, centre - aside)
    return [(*pair, *place, rng.uniform(5, 7.5)) for pair, place in pairs]

def alone(rng, pair):
    radius = rng.uniform(6, 11)
    return [(*pair, *rng.uniform(radius, SIDE - radius, 2), radius)]

def articled(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

def captioned_scene(rng, pairs):
    """One object or, a time in five, two in a relation -> objects, caption. Colour, shape and size are named
    or left out; place, background and turn are never named."""
    if rng.random() < 0.2:
        first, second = (pairs[n] for n in rng.choice(len(pairs), 2, replace=False))
        relation = list(RELATIONS)[rng.integers(4)]
        text = f"{articled(' '.join(first))} {relation} {articled(' '.join(second))}"
        return related(rng, first, second, relation), text
    objects = alone(rng, pairs[rng.integers(len(pairs))])
    (colour, shape, _, _, radius), chance = objects[0], rng.random()
    words = [shape] if chance < 0.12 else [colour, "shape"] if chance < 0.24 else [colour, shape]
    if rng.random() < 0.5 and not 7.7 < radius < 9.3:
        words.insert(0, (("small", "little"), ("big", "large"))[int(radius > 9)][rng.integers(2)])
    phrase, words = PHRASES[rng.integers(len(PHRASES))], " ".join(words)
    return objects, phrase.format(words if phrase.startswith("one") else articled(words))

def labelled_scene(rng, name, label):
    """The objects of a sample of a labelled set."""
    if name == "objects":
        return alone(rng, CLASSES[label])
    if name == "relation":  # the same two in every picture: only the relation tells the classes apart
        return related(rng, ("red", "circle"), ("blue", "square"), list(RELATIONS)[label])
    quarters = [label] if name == "position" else rng.permutation(4)[: label + 1]
    radii = rng.uniform(4, 6.5, len(quarters))
    return [(*CLASSES[rng.integers(len(CLASSES))],
             *(rng.uniform(r, SIDE / 2 - r, 2) + (q % 2 * SIDE / 2, q // 2 * SIDE / 2)), r)
            for r, q in zip(radii, quarters, strict=True)]

def unseen(seed):
    """Classes that captioned training never shows: each shape in one colour, no colour twice."""
    colours = np.random.default_rng([seed, 1]).permutation(len(COLOURS))[: len(SHAPES)]
    return sorted(int(colour) * len(SHAPES) + shape for shape, colour in enumerate(colours))

def draw_shard(job):
    """Draws one shard; job: path, kind, how many, the first one's number, seed."""
    path, kind, count, first, seed = job
    name, hidden = kind.split("-")[0], unseen(seed)
    pairs = [pair for n, pair in enumerate(CLASSES) if n not in hidden]
    def scenes():
        for number in range(first, first + count):
            rng = np.random.default_rng([seed, *kind.encode(), number])
            if name in SETS:
                label = number % len(SETS[name][0])
                fields = {"jpg": render(rng, labelled_scene(rng, name, label)), "cls": str(label).encode()}
            else:
                objects, text = captioned_scene(rng, pairs)
                fields = {"jpg": render(rng, objects), "txt": text.encode()}
            yield f"{kind}-{number:06d}", fields
    write_shard(path, scenes())

def draw(folder, scenes=40_000, seed=0, workers=0):
    """Draws the built-in data into a new folder, the same for a seed: captioned shards train-*.tar and
    dev-00000.tar, labelled sets in CLIP_benchmark's layout, and objects/unseen.txt, the classes never
    captioned."""
    with new_folder(folder) as part:
        size, few = min(2500, -(-scenes // 4)), scenes // 4
        jobs = [(part / f"train-{n // size:05d}.tar", "train", min(size, scenes - n), n, seed)
                for n in range(0, scenes, size)]
        jobs.append((part / "dev-00000.tar", "dev", min(1000, few), 0, seed))
        for name, (names, templates) in SETS.items():
            for split in ("train", "test"):
                count = min(2000 if name == "objects" else 600, few)
                jobs.append((part / name / split / "0.tar", f"{name}-{split}", count, 0, seed))
            label_folder(part / name, names, templates, {"train": 1, "test": 1})
        (part / "objects" / "unseen.txt").write_text("\n".join(map(str, unseen(seed))))
        list(in_parallel(draw_shard, jobs, "drawing", workers))

def builtin(scenes, seed):
    """The folder of the built-in data in the cache; drawn where it is missing."""
    folder = cache_folder() / f"scenes-{scenes}-{seed}"
    if not folder.exists():
        draw(folder, scenes, seed)
    return folder

# --- Command line -----------------------------------------------------------------------------------------
def train_tokenizer(source, file, vocab_size=32_768):
    """Trains a tokenizer of at most --vocab-size ids on the captions of shards, and writes it as json."""
    texts = (text for _, _, texts in captioned(source) for text in texts)
    state = Tokenizer.train(tqdm(texts, "captions", disable=None), vocab_size).state()
    if not state["merges"]:
        raise DataError(f"{source}: no captions to learn from")
    Path(f"{file}.part").write_text(json.dumps(state))
    Path(f"{file}.part").replace(file)

def main(argv=None):
    """Runs a command; its flags are its function's parameters. Bad input: one line on stderr and exit code
    2."""
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    functions = {"pack": pack, "inspect": inspect, "tokenizer": train_tokenizer, "draw": draw}
    for name, function in functions.items():
        command = commands.add_parser(name, help=function.__doc__.split(".")[0], description=function.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        for flag in signature(function).parameters.values():
            default, name = flag.default, f"--{flag.name.replace('_', '-')}"
            if default is flag.empty:
                command.add_argument(flag.name)
            elif default is False:
                command.add_argument(name, action="store_true")
            else:
                command.add_argument(name, type=type(default), default=default, help="default: %(default)s")
    given = vars(parser.parse_args(argv))
    try:
        sys.exit(functions[given.pop("command")](**given))
    except KeyboardInterrupt:
        sys.exit(130)
    except (DataError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
