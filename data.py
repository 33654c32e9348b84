"""Image-caption shards in, exact batches out: reading, tokenizer, loader, augmentation and built-in scenes.

Shards are webdataset tars as img2dataset writes them: KEY.jpg, jpeg, png or webp with KEY.txt (one caption a
line) or KEY.json (field `caption`). A source is paths, globs, {000..123} and pipe:COMMAND, joined by `::`.
The file runs when copied out alone.

    python data.py pack captions.csv FOLDER         makes shards of what you have
    python data.py inspect 'FOLDER/train/*.tar'     says what is in them, and what is wrong
    python data.py tokenizer SOURCE FILE            learns a tokenizer that runs can share
    python data.py draw FOLDER                      draws the built-in scenes
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
import textwrap
import time
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from functools import lru_cache
from heapq import heappop, heappush
from inspect import signature
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
PAD, SOT, EOT = 0, 1, 2
PIPE_SECONDS, PIPE_BYTES = 60, 1 << 32  # a command that is silent for so long, or sends so much, has failed

class DataError(ValueError):
    """What the user gave does not work; the message is one line that says what, and what to do."""

def one_line(error):
    """An error's message; of a worker's, which comes with its traceback, the last line."""
    return re.sub(r"^[\w.]*Error: ", "", (str(error).strip() or repr(error)).splitlines()[-1])

def cache_folder():
    """$XDG_CACHE_HOME/mae_clip, else ~/.cache/mae_clip."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_clip"

def in_parallel(function, jobs, label):
    """function(job) of each job, in order, from worker processes, with a progress bar -> iterable."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = DataLoader(jobs, None, num_workers=min(len(jobs), cores), collate_fn=function,
                      worker_init_fn=be_quiet)
    return tqdm(load, label, leave=False, disable=None)

def be_quiet(worker):
    """In a worker process: Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

# --- Reading shards ---------------------------------------------------------------------------------------
def expand(source):
    """A source, or a list of them, as a list of shards: paths, globs and {000..123}, joined by `::`."""
    shards = []
    for text in source.split("::") if isinstance(source, str) else map(str, source):
        numbers = re.search(r"\{(\d+)\.\.(\d+)\}", text)
        if counted := numbers and range(int(numbers[1]), int(numbers[2]) + 1):
            shards += expand(text.replace(numbers[0], f"{n:0{len(numbers[1])}}", 1) for n in counted)
        elif text.startswith("pipe:") or os.path.isfile(text):
            shards.append(text)
        elif found := sorted(filter(os.path.isfile, glob.glob(text))):
            shards += found
        else:
            raise DataError(f"{text}: no such shard; check the path, and quote braces and stars")
    return shards

def shown(shard):
    """A shard's name without its folder; of a command the last tar's alone, as the rest may be secret."""
    if not shard.startswith("pipe:"):
        return os.path.basename(shard)
    return (re.findall(r"[\w.-]+\.tar\b", re.sub(r"[?#]\S*", "", shard)) or ["a command"])[-1]

def opened(shard):
    """A shard as a file; of a command all that it sends, once it has ended well, else DataError."""
    if not shard.startswith("pipe:"):
        return open(shard, "rb")
    content = io.BytesIO()
    with subprocess.Popen(shard.removeprefix("pipe:"), bufsize=0, shell=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            while content.tell() < PIPE_BYTES and select.select([process.stdout], [], [], PIPE_SECONDS)[0]:
                if chunk := process.stdout.read(1 << 20):
                    content.write(chunk)
                elif code := process.wait(PIPE_SECONDS):
                    raise DataError(f"{shown(shard)}: its command ended with exit code {code}")
                else:
                    return content
            raise subprocess.TimeoutExpired(shard, PIPE_SECONDS)
        except subprocess.TimeoutExpired:
            raise DataError(f"{shown(shard)}: its command did not end after {content.tell():,} bytes; it may "
                            f"send at most {PIPE_BYTES:,}, and be silent for {PIPE_SECONDS} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

def grouped(file):
    """Yields the samples {field: (offset, size)} of a tar with their `__key__`, by webdataset's rule: key is
    the path up to the first dot of the base name, fields are in lower case; of one that comes twice the first
    counts. Where the tar breaks off or has no sample, a last one has the cause in `__bad__`."""
    sample, bad = {}, "tar without samples"
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # where tarfile would keep them all
                if not 0 <= info.size < 1 << 40 or info.issparse():
                    raise tarfile.ReadError
                match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
                if not info.isreg() or not match or re.match(r"__[^/]*__($|/)", info.name):
                    continue
                if sample and sample["__key__"] != match[1]:
                    yield sample
                    sample = {}
                sample = {"__key__": match[1], match[2].lower(): (info.offset_data, info.size)} | sample
                bad = None
            rest = read(file, tar.offset, 1 << 20)
            if len(rest) < 512 or rest.strip(b"\0"):  # a damaged header, or none: for tarfile the end
                bad = "tar breaks off"
    except (tarfile.TarError, OverflowError, ValueError):  # the last sample may lack a field
        sample, bad = {}, "tar breaks off, or is compressed"
    if sample:
        yield sample
    if bad:
        yield {"__key__": "", "__bad__": bad}

def read(file, offset, size):
    """Bytes of a file."""
    file.seek(offset)
    return file.read(size)

def loaded(file, sample):
    """One of grouped's samples with the bytes of its fields."""
    return {field: at if field == "__key__" else read(file, *at) for field, at in sample.items()}

def read_samples(source, strict=False):
    """Yields the shards' samples as raw bytes by field, with `__key__`. Where a tar breaks off it says so and
    goes on with the next; if strict, that is a DataError."""
    for shard in expand(source):
        with opened(shard) as file:
            for sample in grouped(file):
                if "__bad__" not in sample:
                    yield loaded(file, sample)
                elif strict:
                    raise DataError(f"{shown(shard)}: {sample['__bad__']}")
                else:
                    print(f"{shown(shard)}: {sample['__bad__']}", file=sys.stderr)

def captions(sample):
    """A sample's captions: the lines of its txt that are not empty, else the field `caption` of its json."""
    text, lines = sample.get("txt", sample.get("json", b"")).decode("utf-8-sig", "replace"), []
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):  # json of another shape
        text = text if "txt" in sample else json.loads(text)["caption"]
        lines = text if isinstance(text, list) else text.splitlines()
    return [line.strip() for line in lines if isinstance(line, str) and line.strip()]

def image_of(sample):
    """A sample's image, or None."""
    return next((sample[field] for field in IMAGE_FIELDS if field in sample), None)

def usable(sample, captioned=True):
    """A sample's image and, if it must have some, its captions; DataError where one is missing."""
    image, texts = image_of(sample), captions(sample) if captioned else [""]
    if not image or not texts:
        raise DataError("no caption" if image else "no image")
    return image, texts

def captioned(source):
    """Yields (key, image bytes, captions) of shards of which every sample must be whole, as a test set's."""
    for sample in read_samples(source, strict=True):
        try:
            yield sample["__key__"], *usable(sample)
        except DataError as error:
            raise DataError(f"{sample['__key__']}: {error}; in a test set every image needs one") from None

def labelled(folder, split):
    """Yields (key, image bytes, label) of a split of a folder in CLIP_benchmark's layout."""
    count = Path(folder, split, "nshards.txt")
    try:
        shards = [count.with_name(f"{n}.tar") for n in range(int(count.read_text()))]
    except (OSError, ValueError):
        raise DataError(f"{count}: must hold the number of shards") from None
    for sample in read_samples(shards, strict=True):
        try:
            yield sample["__key__"], usable(sample, False)[0], int(sample["cls"])
        except (KeyError, ValueError) as error:
            raise DataError(f"{folder}/{split}: {sample['__key__']}: no class index, or {error}") from None

# --- Images -----------------------------------------------------------------------------------------------
def open_image(data):
    """Image bytes -> PIL image of which the header is read; DataError where that is no use."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # it may be a decompression bomb
            raise DataError
        return image
    except Exception:  # Pillow raises nearly anything on damaged files
        raise DataError("image header unreadable, or image too large") from None

def decode(data, finer=1):
    """Image bytes, or what open_image made of them -> upright RGB image, of the first frame; or DataError.
    finer: how far its sides exceed what is needed: a JPEG is then decoded at 1/2, 1/4 or 1/8."""
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
        raise DataError("image does not decode") from None

def cut(image, size, box):
    """A box (left, top, right, bottom) of a PIL image, resized (bicubic, antialiased) -> uint8 (3,S,S)."""
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

def preprocess(image, size):
    """The test transform: PIL image -> uint8 (3,S,S), short side resized (bicubic), its centre."""
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    x, y = image.width / width, image.height / height  # what is not seen is not resized, so strips stay cheap
    return cut(image, size, (left * x, top * y, (left + size) * x, (top + size) * y))

def random_crop(data, size, least, rng):
    """Image bytes -> uint8 (3,S,S): a random box, of `least` to 1 of the area and sides from 3:4 to 4:3 as
    far as these fit, resized. A JPEG is decoded no finer than the box needs."""
    image = open_image(data)
    if image.format != "JPEG":  # the only one that can be decoded at less than its full size
        image = decode(image)
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    width, height = image.size[::-1] if turned else image.size
    area, ratio = width * height * rng.uniform(least, 1), (4 / 3) ** rng.uniform(-1, 1)
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    image = decode(image, max(1, min(w, h) / size))
    x, y = image.width / width, image.height / height  # below 1 where it was decoded smaller
    return cut(image, size, (left * x, top * y, (left + w) * x, (top + h) * y))

@lru_cache(1 << 16)
def whole(data, size):
    """The test transform of image bytes, which then stay decoded; whole.__wrapped__ does not keep them."""
    return preprocess(decode(data), size)

# --- Tokenizer --------------------------------------------------------------------------------------------
class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016), lossless on any bytes. Ids: PAD, SOT, EOT, bytes,
    the merges as they were learned; inside they are characters of a str: a merge is a replace."""
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
        pieces, counts = zip(*counts.most_common(100_000), strict=True) if counts else ((), ())
        words = ["".join(chr(byte + 3) for byte in piece) for piece in pieces]
        pairs, where, merges, changed = Counter(), defaultdict(set), [], set()
        def count(n, times):
            for pair in map("".join, pairwise(words[n])):
                pairs[pair] += times
                where[pair].add(n)
                changed.add(pair)
        for n in range(len(words)):
            count(n, counts[n])
        # The most frequent pair, the smallest ids first among equals; counts in the heap may be out of date.
        heap = sorted((-number, pair) for pair, number in pairs.items())
        while heap and heap[0][0] < -1 and len(merges) < vocab_size - 259:
            number, pair = heappop(heap)
            if -number != pairs[pair]:
                continue
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
                word = "".join(chr(byte + 3) for byte in piece)
                while found := self.new.keys() & map("".join, pairwise(word)):
                    pair = min(found, key=self.new.get)
                    word = word.replace(pair, chr(self.new[pair]))
                if len(self.cache) > 200_000:
                    self.cache.clear()
                self.cache[piece] = list(map(ord, word))
            ids += self.cache[piece]
        return ids
    @classmethod
    def load(cls, path):
        """Reads what `data.py tokenizer` wrote; without a path None."""
        try:
            return cls(json.loads(Path(path).read_text())) if path else None
        except (OSError, ValueError, TypeError, IndexError):
            raise DataError(f"{path}: not a tokenizer; make one with data.py tokenizer") from None
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

def as_bytes(text):
    """str -> its UTF-8 bytes; bytes stay."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)

# --- Index and loader -------------------------------------------------------------------------------------
def fault(file, at, size, least=2048):
    """What is wrong with the image that lies there in a shard, by its header and its end alone, or None."""
    head, tail = read(file, at, min(size, least)), min(size, 1024)
    try:
        open_image(head)
    except DataError as error:  # perhaps its header is longer
        return fault(file, at, size, 1 << 24) if least < min(size, 1 << 24) else str(error)
    marker = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2], b"")  # of a JPEG's or PNG's end
    return None if marker in read(file, at + size - tail, tail) else "image incomplete"

def index(file, need):
    """An open shard -> keys and rows of what is readable, (key, cause) of the rest. A row: offset and size of
    the image and, if captions are needed, of the caption, 1 where that is json."""
    keys, rows, bad = [], [], []
    for sample in grouped(file):
        image, field = image_of(sample) or (0, 0), "txt" if "txt" in sample else "json"
        text = sample.get(field, (0, 0)) if need else (0, 0)
        cause = sample.get("__bad__") or (fault(file, *image) if image[1] else "no image")
        if cause := cause or (need and not captions({field: read(file, *text)}) and "no caption"):
            bad.append((sample["__key__"], cause))
        else:
            keys.append(sample["__key__"])
            rows.append([*image, *text, int(field == "json")])
    return keys, rows, bad

def index_shard(job):
    """The index of a local shard, kept in the cache folder; job: its path, are captions needed."""
    (path, need), about = job, os.stat(job[0])
    name = os.fsencode(f"4 {os.path.abspath(path)} {about.st_size} {about.st_mtime_ns} {need}")
    cache = cache_folder() / "index" / f"{hashlib.sha256(name).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError):
        keys, rows, bad = json.loads(cache.read_text())
        return keys, rows, bad
    with open(path, "rb") as file:
        found = index(file, need)
    with suppress(OSError):  # a cache that cannot be written costs time only
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(cache)
    return found

def indexed(file, key, row):
    """A sample of an index, as raw bytes."""
    return loaded(file, {"__key__": key, "jpg": row[:2], "json" if row[4] else "txt": row[2:4]})

Batch = namedtuple("Batch", "images tokens keys")  # of one rank: uint8 (B,3,S,S), int64 (B,T), B names

class Loader(IterableDataset):
    """Batches of a source. Of local shards every readable sample comes once an epoch over all ranks and
    workers, but for the last `count mod global batch` of its order; order, crops and captions are a pure
    function of (seed, epoch). Streams (`pipe:`, or resample) are read shard after shard, each by one worker.
    `samples`: how many (of a stream None); `identity`: plain values that tell the same data again; `bad`:
    what was skipped, by cause; `position`: at which shard of its endless sequence a stream goes on."""
    def __init__(self, source, batch_size, image_size, tokenizer, context, seed=0, rank=0, world=1, workers=0,
                 crop=1.0, captions=True, resample=False):
        """batch_size: of one rank; crop: least area of a random crop, 1 for the test transform; captions: are
        they needed (else tokens are SOT, EOT); resample: shards are drawn with replacement, without end.
        DataError if a batch, or most of the data, is not usable."""
        self.batch_size, self.image_size, self.crop = batch_size, image_size, crop
        self.tokenizer, self.context, self.captions = tokenizer, context, captions
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.shards, self.resample, self.samples, self.position = expand(source), resample, None, 0
        self.bad, self.order, names = Counter(), (None, None), [shown(shard) for shard in self.shards]
        self.stream = resample or any(shard.startswith("pipe:") for shard in self.shards)
        self.identity = {"shards": names}
        if self.stream:
            if world > 1 and not resample:
                raise DataError(f"{names[0]}: a stream in several processes needs --resample and --steps")
            return
        found = list(in_parallel(index_shard, [(shard, captions) for shard in self.shards], "indexing"))
        self.keys = [key for keys, _, _ in found for key in keys]
        self.rows = np.concatenate([np.array(rows, np.int64).reshape(-1, 5) for _, rows, _ in found])
        self.shard_of = np.repeat(np.arange(len(found)), [len(rows) for _, rows, _ in found])
        self.samples, batch = len(self.keys), batch_size * world
        self.skip((f"{names[n]} {key}", cause) for n, (*_, bad) in enumerate(found) for key, cause in bad)
        if self.samples < max(batch, sum(self.bad.values())):
            raise DataError(f"{source}: {self.samples} usable samples, a batch is {batch}; {self.report()}")
        digest = hashlib.sha256("\n".join(self.keys).encode("utf-8", "replace")).hexdigest()
        self.identity = {"sizes": [os.path.getsize(shard) for shard in self.shards], "keys": digest}
    def __len__(self):
        """Batches an epoch, the same on every rank."""
        if self.stream:
            raise DataError("how many samples a stream has is not known: give --steps, not --epochs")
        return self.samples // (self.batch_size * self.world)
    def epochs(self, step):
        """How often the data have been gone through after that step."""
        return self.position / len(self.shards) if self.stream else step / len(self)
    def about(self):
        """What there is, in words."""
        samples = "" if self.stream else f"{self.samples:,} samples, {len(self):,} batches an epoch, in "
        return f"{samples}{len(self.shards)} {'streamed ' if self.stream else ''}shards"
    def skip(self, failed):
        """Counts what failed, (name, cause) each, and logs the first few."""
        for name, cause in failed:
            self.bad[cause] += 1
            if sum(self.bad.values()) <= 5:
                tqdm.write(f"skipped: {ascii(name)[1:-1]}: {cause}", file=sys.stderr)
    def report(self):
        """What was skipped, in a line; empty if nothing was."""
        causes = ", ".join(f"{n} x {cause}" for cause, n in self.bad.most_common())
        return causes and f"skipped: {causes}"
    def texts(self):
        """Yields captions for the tokenizer: all, or those of a stream's first 200,000 samples."""
        local = (self.sample(n, image=0) for n in range(self.samples or 0))
        samples = read_samples(self.shards) if self.stream else local
        for sample in islice(samples, 200_000 if self.stream else None):
            yield from captions(sample)
    def sample(self, n, image=1):
        """Sample n of the index, as raw bytes; with image 0 its caption alone."""
        with open(self.shards[self.shard_of[n]], "rb", buffering=0) as file:
            return indexed(file, self.keys[n], (self.rows[n] * (1, image, 1, 1, 1)).tolist())
    def local(self, steps):
        """Yields for each step, which count on from epoch to epoch, its raw samples with the seed of each
        one's chance, and what failed."""
        for step in steps:
            epoch, number = divmod(step, len(self))
            if self.order[0] != epoch:
                self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.samples)
            first = (number * self.world + self.rank) * self.batch_size
            order = self.order[1][first : first + self.batch_size].tolist()
            yield [(self.sample(n), [self.seed, epoch, n]) for n in order], []
    def streamed(self, numbers):
        """The same of the shards with these numbers in a stream's endless sequence."""
        samples, failed, count = [], [], len(self.shards)
        for number in numbers:
            rng = np.random.default_rng([self.seed, number if self.resample else number // count, self.rank])
            place = rng.integers(count) if self.resample else rng.permutation(count)[number % count]
            self.position, shard, need = number + 1, self.shards[place], self.captions
            name, local = shown(shard), not shard.startswith("pipe:")
            with opened(shard) as file:  # the index of a local shard is kept from one pass to the next
                keys, rows, lost = index_shard((shard, need)) if local else index(file, need)
                failed += [(f"{name} {key}", cause) for key, cause in lost]
                if len(failed) > max(100, self.batch_size):
                    raise DataError(f"{name}: most samples are of no use: {failed[-1][1]}")
                for n in rng.permutation(len(keys)).tolist():
                    samples.append((indexed(file, keys[n], rows[n]), [self.seed, number, self.rank, n]))
                    if len(samples) == self.batch_size:
                        yield samples, failed
                        samples, failed = [], []
        yield [], failed
    def prepare(self, sample, rng):
        """A raw sample -> its key, a caption and its image (3,S,S); DataError where that does not decode."""
        (image, texts), size = usable(sample, self.captions), self.image_size
        text = texts[rng.integers(len(texts))]
        test = whole if size <= 64 and len(image) < 1 << 13 else whole.__wrapped__  # small ones stay decoded
        image = random_crop(image, size, self.crop, rng) if self.crop < 1 else test(image, size)
        return sample["__key__"], text, image
    def __iter__(self):
        """What a worker makes: images, tokens, keys, (name, cause) of what failed, and the position."""
        info, tokenizer = get_worker_info(), self.tokenizer or Tokenizer([])
        numbers = range(self.start + (info.id if info else 0), self.stop, info.num_workers if info else 1)
        for samples, failed in (self.streamed if self.stream else self.local)(numbers):
            made = []
            for sample, seed in samples:
                try:
                    made.append(self.prepare(sample, np.random.default_rng(seed)))
                except DataError as error:
                    failed.append((sample["__key__"], str(error)))
            if not made and samples:
                raise DataError(f"no image of a whole batch decodes: {failed[0][1]}")
            if not made:  # the rest of a stream, too few for a batch
                yield None, None, [], failed, self.position
                continue
            keys, texts, images = zip(*(made[n % len(made)] for n in range(self.batch_size)), strict=True)
            yield torch.stack(images), tokenizer.batch(texts, self.context), list(keys), failed, self.position
    def batches(self, start, stop=sys.maxsize):
        """Yields the Batches of steps start ... stop - 1, which count on from epoch to epoch; of a stream
        those of its shards start ... stop - 1."""
        self.start, self.stop, lost, seen = start, stop, 0, 0
        load = DataLoader(self, None, num_workers=min(self.workers, stop - start), collate_fn=tuple,
                          worker_init_fn=be_quiet, pin_memory=torch.cuda.is_available())
        for images, tokens, keys, failed, position in load:
            self.position = max(self.position, position)
            self.skip(failed)
            lost, seen = lost + len(failed), seen + len(keys)
            if lost > max(100, seen / 2):
                raise DataError(f"most samples are of no use; {self.report()}")
            if keys:
                yield Batch(images, tokens, keys)
    def epoch(self, n, skip=0):
        """Yields this rank's batches of epoch n after the first `skip`, all of full size."""
        size = len(self.shards) if self.stream else len(self)
        return self.batches(n * size + skip, (n + 1) * size)

# --- Augmentation -----------------------------------------------------------------------------------------
def simclr_view(images, noise, least=0.08):
    """One of SimCLR's views of each image, on the batch and on its device: crop, flip and colours.
    images uint8 (B,3,H,W), noise (B,12) uniform, the only chance; least: share of the area that a crop keeps
    -> uint8 (B,3,H,W). Strengths are SLIP's: jitter 0.4 with p 0.8, grey 0.2; no hue, no blur."""
    u, x = noise.T, images.float() / 255
    area, ratio = least + (1 - least) * u[0], torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares of the sides
    left, top, flip = (1 - w) * (2 * u[2] - 1), (1 - h) * (2 * u[3] - 1), torch.where(u[4] < 0.5, -1.0, 1.0)
    affine = torch.stack([w * flip, 0 * w, left, 0 * w, h, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    # Brightness and saturation are one 3x3 matrix on colours.
    jitter = (u[5, :, None, None] < 0.8).float()
    bright, contrast, saturation = (1 + 0.4 * (2 * u[n, :, None, None] - 1) * jitter for n in (6, 7, 8))
    saturation = torch.where(u[10, :, None, None] < 0.2, 0.0, saturation)
    grey = torch.tensor([0.299, 0.587, 0.114], device=x.device).expand(3, 3)
    colour = bright * (saturation * torch.eye(3, device=x.device) + (1 - saturation) * grey)
    x = torch.einsum("bij,bjhw->bihw", colour, x)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + contrast[..., None] * (x - mean)
    return (x.clamp(0, 1) * 255).round().byte()

# --- Making and inspecting shards -------------------------------------------------------------------------
def write_shard(path, samples):
    """Writes samples (key, {field: str or bytes}) as a tar."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, fields in samples:
            for field, content in fields.items():
                info, content = tarfile.TarInfo(f"{key}.{field}"), as_bytes(content)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

def build(folder, texts, function, jobs, label):
    """Makes a new folder of texts {path: str} and of the shards that function writes, whose jobs begin with
    their paths; it takes its name when it is whole -> what function returned for each."""
    folder, part = Path(folder), Path(f"{folder}.{os.getpid()}.part")
    if folder.exists():
        raise DataError(f"{folder}: exists already; give a new folder")
    try:
        for path in [*texts, *(job[0] for job in jobs)]:
            (part / path).parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            (part / path).write_text(text, encoding="utf-8")
        found = list(in_parallel(function, [(part / path, *job) for path, *job in jobs], label))
        part.rename(folder)
        return found
    finally:
        shutil.rmtree(part, ignore_errors=True)

def described(classes, templates, shards, where=""):
    """The texts of a folder in CLIP_benchmark's layout; shards: {split: how many}."""
    texts = {f"{split}/nshards.txt": [str(count)] for split, count in shards.items()}
    if classes:
        texts |= {"classnames.txt": classes, "zeroshot_classification_templates.txt": templates}
    return {where + path: "\n".join(lines) for path, lines in texts.items()}

def listed(source, templates):
    """What a csv or tsv of paths and captions, or a folder of class folders, holds
    -> {image's path: the fields beside it}, the names of the classes."""
    rows, classes = defaultdict(list), []
    if source.is_dir():
        classes = sorted(path.name for path in source.iterdir() if path.is_dir())
        for label, name in enumerate(classes):
            fields = {"cls": str(label), "txt": "\n".join(text.replace("{c}", name) for text in templates)}
            rows |= {path: fields for path in sorted((source / name).rglob("*")) if path.is_file()}
        return rows, classes
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if source.suffix == ".tsv" else {"strict": True}
    try:
        for row in filter(None, csv.reader(source.open(newline="", encoding="utf-8-sig"), **form)):
            rows[source.parent / row[0]] += [" ".join(text.split()) for text in row[1:] if text.strip()]
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"{source}: row {len(rows) + 1} is no csv, in UTF-8: {error}") from None
    return {path: {"txt": "\n".join(texts)} for path, texts in rows.items()}, classes

def pack_shard(job):
    """Writes one shard; job: path, (number, image's path, fields) each, size -> what is left out, and why."""
    path, items, size = job
    broken = []
    def samples():
        for number, place, fields in items:
            try:
                content = place.read_bytes()
                kind, image = open_image(content).format.lower(), decode(content)
                if kind not in IMAGE_FIELDS or 0 < size < min(image.size):
                    shrink, out = min(1, (size or math.inf) / min(image.size)), io.BytesIO()
                    sides = [round(side * shrink) for side in image.size]
                    image.resize(sides, Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
                    kind, content = "jpeg", out.getvalue()
                if not fields["txt"]:
                    raise DataError("no caption")
                yield f"{number:08d}", {kind.replace("jpeg", "jpg"): content} | fields
            except (ValueError, OSError) as error:
                broken.append(f"{place}: {getattr(error, 'strerror', None) or error}")
    write_shard(path, samples())
    return broken

def pack(source, folder, size=0, templates="a photo of a {c}", test=0.0, shard=1000, seed=0):
    """Makes shards FOLDER/train/*.tar and, with --test, test/*.tar of images. SOURCE: a csv or tsv of paths
    and captions, or a folder of class folders, which become labels, in CLIP_benchmark's layout, and captions
    by --templates (joined by `::`). --size: short side that larger images shrink to; --test: share of a test
    split; --shard: samples a shard; --seed: of their order."""
    rows, classes = listed(Path(source), templates.split("::"))
    if not rows or not 0 <= test <= 1 or min(size, seed) < 0 or shard < 1:
        raise DataError(f"{source}: neither paths and captions nor class folders, or a flag out of range")
    rows = [(n, *row) for n, row in enumerate(rows.items())]
    rows = [rows[n] for n in np.random.default_rng(seed).permutation(len(rows))]
    first, shards, jobs = round(test * len(rows)), {}, []
    for split, part in {"test": rows[:first], "train": rows[first:]}.items():
        shards |= {split: -(-len(part) // shard)} if part else {}
        jobs += [(f"{split}/{n // shard}.tar", part[n : n + shard], size) for n in range(0, len(part), shard)]
    texts = described(classes, templates.split("::"), shards)
    broken = sum(build(folder, texts, pack_shard, jobs, "packing"), [])
    print("".join(f"left out: {line}\n" for line in broken), end="", file=sys.stderr)
    if len(broken) == len(rows):
        shutil.rmtree(folder)
        raise DataError(f"{source}: nothing in it can be used")
    print(f"{folder}: {len(rows) - len(broken)} samples in {len(jobs)} shards; {len(broken)} left out")

def inspect_shard(shard):
    """-> rows (width, height, captions' lengths) of what is good, lines on the rest, pictures, seconds."""
    rows, bad, shots, began = [], [], [], time.perf_counter()
    with opened(shard) as file:
        for sample in grouped(file):
            try:
                if "__bad__" in sample:
                    raise DataError(sample["__bad__"])
                content, texts = usable(sample := loaded(file, sample), "cls" not in sample)
                image = decode(content)
                rows.append((*image.size, [len(text) for text in texts]))
                if len(shots) < 25:
                    shots.append((ImageOps.contain(image, (150, 150)), texts[0] or str(sample["cls"][:20])))
            except DataError as error:
                bad.append(f"{shown(shard)} {sample['__key__']!a}: {error}")
    return rows, bad, shots, time.perf_counter() - began

def inspect(source, sheet="contact-sheet.png"):
    """Says what is in shards and what is wrong with it, and saves --sheet, pictures with their captions. Exit
    code 1: something is wrong with samples; 2: there is nothing to read."""
    found = list(in_parallel(inspect_shard, expand(source), "inspecting"))
    rows, bad, shots = (sum((each[n] for each in found), []) for n in range(3))
    print("".join(f"{line}\n" for line in bad), end="", file=sys.stderr)
    if not rows:
        raise DataError(f"{len(found)} shards: no usable sample")
    seconds = sum(each[3] for each in found)
    print(f"{len(found)} shards, {len(rows)} usable samples; one core decodes them in {seconds:.1f} s")
    widths, heights, lengths = zip(*rows, strict=True)
    for name, values in {"width": widths, "height": heights, "captions": [len(each) for each in lengths],
                         "letters": [length for each in lengths for length in each]}.items():
        print(f"{name}: {min(values)} to {max(values)}, median {np.median(values):g}")
    causes = Counter(line.split(": ", 1)[1] for line in bad)
    print("bad samples:", ", ".join(f"{n} x {cause}" for cause, n in causes.items()) or "none")
    page = Image.new("RGB", (800, 950), "white")
    for n, (image, text) in enumerate(shots[:: -(-len(shots) // 25)]):
        x, y = n % 5 * 160 + 5, n // 5 * 190 + 5
        page.paste(image, (x, y))
        ImageDraw.Draw(page).text((x, y + 152), "\n".join(textwrap.wrap(text[:99], 24)[:2]), "black")
    page.save(sheet)
    print(f"pictures with captions: {sheet}")
    return 1 if bad else 0

# --- Built-in scenes --------------------------------------------------------------------------------------
COLOURS = "red green blue yellow cyan magenta teal purple black white".split()
SHAPES = {  # a star's tips, how far its dents lie from the middle (tips: 1), degrees that it is turned by
    "circle": (16, 1, 0), "triangle": (3, 0.5, 0), "square": (4, 0.71, 45), "diamond": (2, 0.5, 0),
    "star": (5, 0.4, 0), "sun": (9, 0.6, 0), "plus": (4, 0.3, 0), "cross": (4, 0.3, 45),
}
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
RELATIONS = {"left of": (0, 1), "right of": (1, 0), "above": (0, 2), "below": (2, 0)}  # of which quarters
PHRASES = ("a {}", "a {}", "one {}", "there is a {}", "a picture of a {}", "a drawing of a {}", "a {} here")
SETS = {  # labelled sets: the names of their classes, and templates
    "objects": (CLASSES, ["a {c}", "there is a {c}", "a picture of a {c}"]),
    "count": (["one object", "two objects", "three objects", "four objects"], ["{c}", "a picture of {c}"]),
    "position": (["top left", "top right", "bottom left", "bottom right"], ["a shape in the {c}"]),
    "relation": ([f"a red circle {relation} a blue square" for relation in RELATIONS], ["{c}"]),
}
SIDE = 32  # pixels

def scene(rng, name, label, classes):
    """A scene of a labelled set or, of another name, one of one object or, a time in five, two
    -> classes of its objects, their quarters of the image, and a caption, which never names the place."""
    two = name == "relation" or (name not in SETS and rng.random() < 0.2)
    count = label + 1 if name == "count" else 1 + two
    objects = [classes[n] for n in rng.permutation(len(classes))[:count]]
    quarters = rng.permutation(4)[:count]
    objects = [CLASSES[label]] if name == "objects" else objects
    quarters = [label] if name == "position" else quarters
    if not two:
        colour, shape = objects[0].split()
        words = (f"{colour} {shape}", shape, f"{colour} shape")[max(0, int(8 * rng.random()) - 5)]
        return objects, quarters, PHRASES[rng.integers(len(PHRASES))].format(words)
    if name == "relation":  # the same two in every picture: only the relation tells the classes apart
        objects = ["red circle", "blue square"]
    relation, quarters = list(RELATIONS.items())[label % 4]
    quarters = np.add(quarters, rng.integers(2) * (2 if sum(quarters) == 1 else 1))  # of both rows or columns
    return objects, quarters, f"a {objects[0]} {relation} a {objects[1]}"

def render(rng, objects, quarters):
    """Objects, each in its quarter, on a shaded background of middling colours, with noise -> JPEG bytes."""
    first, last = rng.uniform(70, 185, (2, 3))
    angle, grid, half = rng.uniform(0, 2 * math.pi), np.linspace(-0.7, 0.7, SIDE), SIDE / 2
    ramp = (0.5 + grid * math.cos(angle) + grid[:, None] * math.sin(angle)).clip(0, 1)[..., None]
    image = Image.fromarray((first * ramp + last * (1 - ramp)).astype(np.uint8))
    image = image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST)  # so that edges come out smooth
    for (colour, shape), quarter in zip(map(str.split, objects), quarters, strict=True):
        (tips, dent, turn), radius = SHAPES[shape], rng.uniform(5, 8)
        x, y = rng.uniform(radius, half - radius, 2) + (quarter % 2 * half, quarter // 2 * half)
        angle = np.arange(2 * tips) * np.pi / tips + np.radians(turn) + rng.uniform(-0.2, 0.2)
        reach = radius * np.tile([1, dent], tips)
        points = np.stack([x + reach * np.sin(angle), y - reach * np.cos(angle)], axis=1)
        ImageDraw.Draw(image).polygon((3 * points).ravel().tolist(), fill=colour)
    pixels, out = np.asarray(image.reduce(3)) * rng.uniform(0.8, 1.1), io.BytesIO()
    pixels += rng.uniform(2, 12) * rng.standard_normal(pixels.shape, dtype=np.float32)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()

def unseen(seed):
    """Classes that captioned training never shows: each shape in one colour, no colour twice."""
    colours = np.random.default_rng([seed, 1]).permutation(len(COLOURS))[: len(SHAPES)]
    return sorted(int(colour) * len(SHAPES) + shape for shape, colour in enumerate(colours))

def draw_shard(job):
    """Draws one shard; job: path, kind, numbers of its scenes, seed."""
    path, kind, numbers, seed = job
    name, hidden = kind.split("-")[0], unseen(seed)
    classes = [each for n, each in enumerate(CLASSES) if n not in hidden]
    def samples():
        for number in numbers:
            rng = np.random.default_rng([seed, *kind.encode(), number])
            label = number % len(SETS[name][0]) if name in SETS else int(rng.integers(4))
            objects, quarters, text = scene(rng, name, label, classes)
            about = {"cls": str(label)} if name in SETS else {"txt": text}
            yield f"{kind}-{number:06d}", {"jpg": render(rng, objects, quarters)} | about
    write_shard(path, samples())

def draw(folder, scenes=40_000, seed=0):
    """Draws the built-in data into a new folder, the same for a seed: captioned shards train-* and dev-*,
    labelled sets in CLIP_benchmark's layout, and objects/unseen.txt, the classes never captioned."""
    few, size = scenes // 4, min(2500, -(-scenes // 4))
    jobs = [(f"train-{n // size:05d}.tar", "train", range(n, min(n + size, scenes)), seed)
            for n in range(0, scenes, size)]
    jobs.append(("dev-00000.tar", "dev", range(min(1000, few)), seed))
    texts = {"objects/unseen.txt": "\n".join(map(str, unseen(seed)))}
    for name, (classes, templates) in SETS.items():
        numbers = range(min(2000 if name == "objects" else 600, few))
        jobs += [(f"{name}/{split}/0.tar", f"{name}-{split}", numbers, seed) for split in ("train", "test")]
        texts |= described(classes, templates, {"train": 1, "test": 1}, f"{name}/")
    build(folder, texts, draw_shard, jobs, "drawing")

def builtin(scenes, seed):
    """The folder of the built-in data in the cache; drawn where it is missing."""
    folder = cache_folder() / f"scenes-2-{scenes}-{seed}"
    try:
        draw(folder, scenes, seed)
    except (DataError, OSError):  # it is there already, or another process was faster
        if not folder.exists():
            raise
    return folder

# --- Command line -----------------------------------------------------------------------------------------
def tokenizer(source, file, vocab_size=32_768):
    """Learns a tokenizer of at most --vocab-size ids from the captions of SOURCE and writes it to FILE."""
    texts = tqdm(Loader(source, 1, 1, None, 3).texts(), "captions", disable=None)
    if not (merges := Tokenizer.train(texts, vocab_size).merges):
        raise DataError("no captions to learn from, or a vocabulary of bytes alone")
    Path(f"{file}.part").write_text(json.dumps(merges))
    Path(f"{file}.part").replace(file)

def main(argv=None):
    """Runs a command, whose flags are its function's parameters; bad input: one line, and exit code 2."""
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (pack, inspect, tokenizer, draw):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        for name, given in signature(function).parameters.items():
            needed = given.default is given.empty  # then it is no flag
            command.add_argument(name if needed else f"--{name.replace('_', '-')}", default=given.default,
                                 type=str if needed else type(given.default))
    given = vars(parser.parse_args(argv))
    try:
        sys.exit(globals()[given.pop("command")](**given))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"data.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
