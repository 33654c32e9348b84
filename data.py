"""Image-caption shards in, exact batches out: reading, tokenizer, loader, augmentation and built-in scenes.

Shards are webdataset tars as img2dataset writes them: KEY.jpg, jpeg, png or webp with KEY.txt (one caption a
line) or KEY.json (field `caption`). The file runs when copied out alone.

    python data.py draw FOLDER    draws the built-in scenes
"""

import argparse
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
PAD, SOT, EOT = 0, 1, 2

class DataError(ValueError):
    """What the user gave does not work; the message is one line that says what, and what to do."""

def cache_folder():
    """$XDG_CACHE_HOME/mae_clip, else ~/.cache/mae_clip."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_clip"

def in_parallel(function, jobs, label):
    """Yields function(job) of each job, in order, from worker processes, with a progress bar."""
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count()), initializer=be_quiet) as pool:
        yield from tqdm(pool.map(function, jobs), label, len(jobs), leave=False, disable=None)

def be_quiet(worker=0):
    """In a worker process: Ctrl-C is the parent's, and it computes on one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

# --- Reading shards ---------------------------------------------------------------------------------------
def expand(source):
    """A source as a list of shards: paths, globs and {000..123}, joined by `::`; a list is taken as it is."""
    if not isinstance(source, str):
        return [str(shard) for shard in source]
    shards, texts = [], source.split("::")
    while texts:
        text = texts.pop(0)
        match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
        found = [text] if os.path.isfile(text) else sorted(filter(os.path.isfile, glob.glob(text)))
        if match and int(match[1]) <= int(match[2]):
            numbers = [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2]) + 1)]
            texts[:0] = [text.replace(match[0], n, 1) for n in numbers]
        elif not found:
            raise DataError(f"{text}: no such shard; check the path, and quote braces and stars")
        else:
            shards += found
    return shards

def grouped(file):
    """Yields a tar's samples {field: (offset, size)} with `__key__`, by webdataset's rule: key is the path
    up to the first dot of the base name, fields are in lower case; of one that comes twice the first counts.
    Where a tar breaks off or has no sample, a last one has the cause in `__bad__`."""
    name, sample, end = os.path.basename(file.name), {}, os.fstat(file.fileno()).st_size
    bad = f"{name} holds no sample"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # where tarfile would keep them all
                match = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
                if not info.isreg() or not match or re.match(r"__[^/]*__($|/)", info.name):
                    continue
                if sample and sample["__key__"] != match[1]:
                    yield sample
                    sample = {}
                if info.offset_data + info.size > end:
                    raise tarfile.ReadError
                sample = {"__key__": match[1], match[2].lower(): (info.offset_data, info.size)} | sample
                bad = None
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # a damaged header or none, which tarfile takes for the end
                bad = f"{name} breaks off"
    except (tarfile.TarError, OverflowError):  # the last sample may lack a field
        sample, bad = {}, f"{name} breaks off, or is no uncompressed tar"
    if sample:
        yield sample
    if bad:
        yield {"__key__": "", "__bad__": bad}

def read_samples(source):
    """Yields the shards' samples as raw bytes by field, with `__key__`; tells where a tar breaks off."""
    for shard in expand(source):
        with open(shard, "rb") as tar, open(shard, "rb") as file:
            for sample in grouped(tar):
                if "__bad__" in sample:
                    print(f"skipped: {sample['__bad__']}", file=sys.stderr)
                else:
                    yield {field: where if field == "__key__" else os.pread(file.fileno(), where[1], where[0])
                           for field, where in sample.items()}

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

def captioned(source):
    """Yields (key, image bytes, captions) of the samples that have both."""
    for sample in read_samples(source):
        image, texts = image_of(sample), captions(sample)
        if image and texts:
            yield sample["__key__"], image, texts

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

# --- Images -----------------------------------------------------------------------------------------------
def open_image(data):
    """Image bytes -> PIL image of which the header is read; DataError where that is no use."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"))
    except Exception:  # Pillow raises nearly anything on damaged files
        raise DataError("image header unreadable, or image too large") from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # refused by its header, as a decompression bomb
        raise DataError("image too large")
    return image

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
    far as these fit, resized. A JPEG is decoded no finer than the smallest such box needs."""
    image = open_image(data)
    image = decode(image, max(1, min(image.size) / size * math.sqrt(least * 3 / 4)))
    area, ratio = image.width * image.height * rng.uniform(least, 1), (4 / 3) ** rng.uniform(-1, 1)
    w, h = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
    x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
    return cut(image, size, (x, y, x + w, y + h))

@lru_cache(1 << 16)
def small_whole(data, size):
    """The test transform of a small image, which then stays decoded."""
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
        words, counts = ["".join(chr(byte + 3) for byte in piece) for piece in counts], list(counts.values())
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
                word = "".join(chr(byte + 3) for byte in piece)
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

def as_bytes(text):
    """str -> its UTF-8 bytes; bytes stay."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)

def adjacent(word):
    return [a + b for a, b in zip(word, word[1:], strict=False)]

# --- Index and loader -------------------------------------------------------------------------------------
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
    """job: a shard, are captions needed -> keys and rows of what is readable, causes of the rest.
    A row: offset, size of image and caption, 1 where that is json. All is kept in the cache folder."""
    path, need = job
    about, keys, rows, bad = os.stat(path), [], [], []
    name = os.fsencode(f"3 {os.path.abspath(path)} {about.st_size} {about.st_mtime_ns} {need}")
    cache = cache_folder() / "index" / f"{hashlib.sha256(name).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(cache.read_text())
    with open(path, "rb") as tar, open(path, "rb") as file:
        for sample in grouped(tar):
            image, field = image_of(sample) or (0, 0), "txt" if "txt" in sample else "json"
            text = sample.get(field, (0, 0)) if need else (0, 0)
            cause = sample.get("__bad__") or (fault(file.fileno(), *image) if image[1] else "no image")
            if need and not cause and not captions({field: os.pread(file.fileno(), text[1], text[0])}):
                cause = "no caption"
            if cause:
                bad.append(cause)
            else:
                keys.append(sample["__key__"])
                rows.append([*image, *text, int(field == "json")])
    with suppress(OSError):  # a cache that cannot be written costs time only
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps([keys, rows, bad]))
        part.replace(cache)
    return keys, rows, bad

Batch = namedtuple("Batch", "images tokens keys")  # of one rank: uint8 (B,3,S,S), int64 (B,T), B names

class Loader:
    """Batches of a source: every readable sample once an epoch over all ranks and workers, but for the last
    `count mod global batch` of its order. Order, crops and captions are a pure function of (seed, epoch).
    `samples`: how many; `identity`: plain values that tell the same data again; `bad`: skipped."""
    def __init__(self, source, batch_size, image_size, tokenizer, context, seed=0, rank=0, world=1, workers=0,
                 crop=1.0, captions=True):
        """batch_size: of one rank; crop: least area of a random crop, 1 for the test transform; captions: are
        they needed (else tokens are SOT, EOT). DataError if a batch, or most of the data, is not usable."""
        self.batch_size, self.image_size, self.crop = batch_size, image_size, crop
        self.tokenizer, self.context, self.captions = tokenizer, context, captions
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.shards, self.bad, self.order = expand(source), Counter(), (None, None)
        index = list(in_parallel(index_shard, [(shard, captions) for shard in self.shards], "indexing"))
        self.keys = [key for keys, _, _ in index for key in keys]
        self.rows = np.concatenate([np.array(rows, np.int64).reshape(-1, 5) for _, rows, _ in index])
        self.shard_of = np.repeat(np.arange(len(index)), [len(rows) for _, rows, _ in index])
        self.samples, batch = len(self.keys), batch_size * world
        self.bad.update(cause for _, _, bad in index for cause in bad)
        if self.samples < max(batch, sum(self.bad.values())):
            raise DataError(f"{source}: {self.samples} usable samples, a batch is {batch}; {self.report()}")
        digest = hashlib.sha256("\n".join(self.keys).encode("utf-8", "replace")).hexdigest()
        self.identity = {"sizes": [os.path.getsize(shard) for shard in self.shards], "keys": digest}

    def __len__(self):
        """Batches an epoch, the same on every rank."""
        return self.samples // (self.batch_size * self.world)

    def report(self):
        """What was skipped, in a line; empty if nothing was."""
        causes = ", ".join(f"{n} x {cause}" for cause, n in self.bad.most_common())
        return causes and f"skipped: {causes}"

    def read(self, n):
        """Sample n of the index, as raw bytes."""
        at, size, text_at, text_size, is_json = self.rows[n].tolist()
        with open(self.shards[self.shard_of[n]], "rb", buffering=0) as file:
            image, text = os.pread(file.fileno(), size, at), os.pread(file.fileno(), text_size, text_at)
        return {"__key__": self.keys[n], "jpg": image, ("txt", "json")[is_json]: text}

    def texts(self):
        """Yields all captions, for the tokenizer."""
        for n in range(self.samples):
            yield from captions(self.read(n))

    def image(self, content, rng):
        """A sample's image, raw bytes -> uint8 (3,S,S); DataError where it does not decode."""
        if self.crop < 1:
            return random_crop(content, self.image_size, self.crop, rng)
        if self.image_size <= 64:
            return small_whole(content, self.image_size)
        return preprocess(decode(content), self.image_size)

    def __getitem__(self, step):
        """What a worker makes of a step (of all epochs, counted on): images, tokens, keys, what failed."""
        epoch, number = divmod(step, len(self))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        first, made, failed = (number * self.world + self.rank) * self.batch_size, [], []
        for n in self.order[1][first : first + self.batch_size].tolist():
            sample, rng = self.read(n), np.random.default_rng([self.seed, epoch, n])
            texts = captions(sample) if self.captions else [""]
            try:
                text = texts[rng.integers(len(texts))]
                made.append((sample["__key__"], text, self.image(sample["jpg"], rng)))
            except DataError as error:
                failed.append(f"{error}")
        if not made:
            raise DataError(f"no image of a whole batch decodes: {failed[0]}")
        keys, texts, images = zip(*(made[n % len(made)] for n in range(self.batch_size)), strict=True)
        tokens = (self.tokenizer or Tokenizer([])).batch(texts, self.context)
        return torch.stack(images), tokens, list(keys), failed

    def batches(self, start, stop=sys.maxsize):
        """Yields the Batches of steps start ... stop - 1, which count on from epoch to epoch."""
        for images, tokens, keys, failed in DataLoader(
                self, None, sampler=range(start, stop), num_workers=min(self.workers, stop - start),
                collate_fn=tuple, worker_init_fn=be_quiet, pin_memory=torch.cuda.is_available()):
            self.bad.update(failed)
            yield Batch(images, tokens, keys)

    def epoch(self, n, skip=0):
        """Yields this rank's batches of epoch n after the first `skip`, all of full size."""
        return self.batches(n * len(self) + skip, (n + 1) * len(self))

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
    jitter = (u[5] < 0.8).float()
    bright, contrast, saturation = (1 + 0.4 * (2 * u[n] - 1) * jitter for n in (6, 7, 8))
    saturation = torch.where(u[10] < 0.2, 0.0, saturation)
    grey = torch.tensor([0.299, 0.587, 0.114], device=x.device).expand(3, 3)
    bright, saturation = bright.view(-1, 1, 1), saturation.view(-1, 1, 1)
    colour = bright * (saturation * torch.eye(3, device=x.device) + (1 - saturation) * grey)
    x = torch.einsum("bij,bjhw->bihw", colour, x)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + contrast.view(-1, 1, 1, 1) * (x - mean)
    return (x.clamp(0, 1) * 255).round().byte()

# --- Built-in scenes --------------------------------------------------------------------------------------
COLOURS = {
    "red": (214, 39, 40), "green": (44, 150, 60), "blue": (40, 80, 220), "yellow": (245, 220, 50),
    "orange": (250, 130, 20), "purple": (130, 50, 170), "pink": (250, 150, 200), "brown": (120, 72, 40),
    "cyan": (60, 210, 225), "white": (250, 250, 250),
}
def outline(tips, dent=1.0):
    """Corners (2 tips,2) of a star within the unit circle, y down; dent: the radius between its tips."""
    angle = np.arange(2 * tips) * np.pi / tips - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.tile([1, dent], tips)[:, None]

SHAPES = {
    "circle": 0.9 * outline(12), "triangle": 1.1 * outline(3, 0.5), "star": 1.1 * outline(5, 0.42),
    "square": np.array([(-8, -8), (8, -8), (8, 8), (-8, 8)]) / 10,
    "cross": np.array([(-3, -10), (3, -10), (3, -3), (10, -3), (10, 3), (3, 3), (3, 10), (-3, 10), (-3, 3),
                       (-10, 3), (-10, -3), (-3, -3)]) / 10,
    "ring": np.concatenate([outline(12), outline(12)[:1], 0.55 * outline(12)[:1], 0.55 * outline(12)[::-1]]),
    "bar": np.array([(-10, -4), (10, -4), (10, 4), (-10, 4)]) / 10,
    "arrow": np.array([(0, -10), (9, 1), (4, 1), (4, 10), (-4, 10), (-4, 1), (-9, 1)]) / 10,
}
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
        points = SHAPES[shape] @ matrix * radius + (x, y)
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
    """One object or, a time in five, two -> objects, caption, which never names place, background or turn."""
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
    """Draws one shard; job: path, kind, numbers of its scenes, seed."""
    path, kind, numbers, seed = job
    name, pairs = kind.split("-")[0], [pair for n, pair in enumerate(CLASSES) if n not in unseen(seed)]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            rng = np.random.default_rng([seed, *kind.encode(), number])
            if name in SETS:
                text = str(number % len(SETS[name][0]))
                objects = labelled_scene(rng, name, int(text))
            else:
                objects, text = captioned_scene(rng, pairs)
            fields = {"jpg": render(rng, objects), "cls" if name in SETS else "txt": text.encode()}
            for field, content in fields.items():
                info = tarfile.TarInfo(f"{kind}-{number:06d}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

def draw(folder, scenes=40_000, seed=0):
    """Draws the built-in data into a new folder, the same for a seed: captioned shards train-* and dev-*,
    labelled sets in CLIP_benchmark's layout, and objects/unseen.txt, the classes never captioned."""
    folder, few, size = Path(folder), scenes // 4, min(2500, -(-scenes // 4))
    if folder.exists():
        raise DataError(f"{folder}: exists already; give a new folder")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # renamed when it is whole
    jobs = [(part / f"train-{n // size:05d}.tar", "train", range(n, min(n + size, scenes)), seed)
            for n in range(0, scenes, size)]
    jobs.append((part / "dev-00000.tar", "dev", range(min(1000, few)), seed))
    for name, (names, templates) in SETS.items():
        count = range(min(2000 if name == "objects" else 600, few))
        for split in ("train", "test"):
            (part / name / split).mkdir(parents=True)
            (part / name / split / "nshards.txt").write_text("1")
            jobs.append((part / name / split / "0.tar", f"{name}-{split}", count, seed))
        (part / name / "classnames.txt").write_text("\n".join(names))
        (part / name / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    (part / "objects" / "unseen.txt").write_text("\n".join(map(str, unseen(seed))))
    list(in_parallel(draw_shard, jobs, "drawing"))
    with suppress(OSError):  # where another process was faster, with the same scenes
        part.rename(folder)
    shutil.rmtree(part, ignore_errors=True)

def builtin(scenes, seed):
    """The folder of the built-in data in the cache; drawn where it is missing."""
    folder = cache_folder() / f"scenes-{scenes}-{seed}"
    if not folder.exists():
        draw(folder, scenes, seed)
    return folder

# --- Command line -----------------------------------------------------------------------------------------
def main(argv=None):
    """data.py draw FOLDER; exit code 2, and one line, for bad input."""
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["draw"], help="draw the built-in scenes")
    parser.add_argument("folder", help="a new one")
    given = parser.parse_args(argv)
    try:
        draw(given.folder)
    except (DataError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
