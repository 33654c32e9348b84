"""Image-caption shards in, exact batches out: reading, tokenizer, loader, augmentation and built-in scenes.

Shards are webdataset tars as img2dataset writes them: KEY.jpg, jpeg, png or webp with KEY.txt (one caption a
line) or KEY.json (field `caption`). The file runs when copied out alone.

    python data.py draw FOLDER                                    draws the built-in scenes
    python data.py tokenizer 'pairs-{000..123}.tar' vocab.json    trains a tokenizer to share between runs
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
import sys
import tarfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 89_478_485  # an image of more is refused by its header, as a decompression bomb (Pillow's limit)
PAD, SOT, EOT = 0, 1, 2

class DataError(ValueError):
    """What the user gave does not work; the message is one line that says what, and what to do."""

def cache_folder():
    """$XDG_CACHE_HOME/mae_clip, else ~/.cache/mae_clip."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_clip"

# --- Reading shards --------------------------------------------------------------------------------------
def expand(source):
    """A source as a list of shards: paths, globs and {000..123}, joined by `::`; a list is taken as it is."""
    if not isinstance(source, str):
        return [str(shard) for shard in source]
    shards = []
    for part in source.split("::"):
        texts = [part]
        while re.search(r"\{\d+\.\.\d+\}", texts[0]):
            texts = [each for text in texts for each in unbrace(text)]
        for text in texts:
            found = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
            if not found or not os.path.isfile(found[0]):
                raise DataError(f"{text}: no such shard; check the path, and quote it if it holds braces or stars")
            shards += found
    return shards

def unbrace(text):
    """The texts that the first {000..123} in a text stands for."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    first, last = match.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [text[: match.start()] + number + text[match.end() :] for number in numbers]

def members(path):
    """Yields (key, field, offset, size) of a tar's regular files, by webdataset's rule: the key is the path up
    to the first dot of the base name. tarfile.TarError where the tar breaks off."""
    with tarfile.open(path, "r:") as tar:
        size = os.path.getsize(path)
        for member in tar:
            match = re.match(r"((?:.*/|)[^./]+)\.([^/]*)$", member.name)
            if member.isreg() and match:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield match[1], match[2].lower(), member.offset_data, member.size

def grouped(path, bad):
    """Yields each whole sample of a tar as {field: (offset, size)}, with `__key__`; counts in the dict bad, by
    cause, where a tar breaks off."""
    sample = {}
    try:
        for key, field, offset, size in members(path):
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            sample |= {"__key__": key, field: (offset, size)}
    except (tarfile.TarError, EOFError):
        sample = {}  # it may lack a field
        bad["tar breaks off"] = bad.get("tar breaks off", 0) + 1
    if sample:
        yield sample

def read_samples(source):
    """Yields each sample of the shards, in order, as raw bytes by lower-cased field name, with `__key__`."""
    for shard in expand(source):
        with open(shard, "rb") as file:
            for sample in grouped(shard, {}):
                yield {field: where if field == "__key__" else os.pread(file.fileno(), where[1], where[0])
                       for field, where in sample.items()}

def captioned(source):
    """Yields (key, image bytes, captions) of the samples that have both."""
    for sample in read_samples(source):
        image = next((sample[field] for field in IMAGE_FIELDS if field in sample), None)
        texts = captions("txt", sample["txt"]) if "txt" in sample else captions("json", sample.get("json", b""))
        if image is not None and texts:
            yield sample["__key__"], image, texts

def labelled(folder, split):
    """Yields (key, image bytes, label) of a split of a folder in CLIP_benchmark's layout."""
    folder = Path(folder) / split
    try:
        count = int((folder / "nshards.txt").read_text())
    except (OSError, ValueError):
        raise DataError(f"{folder}/nshards.txt: must hold the number of shards") from None
    for number in range(count):
        if not (folder / f"{number}.tar").is_file():
            raise DataError(f"{folder}/{number}.tar: missing, though nshards.txt announces {count} shards")
        for sample in read_samples([folder / f"{number}.tar"]):
            image = next((sample[field] for field in IMAGE_FIELDS if field in sample), None)
            try:
                yield sample["__key__"], image, int(sample["cls"])
            except (KeyError, ValueError):
                raise DataError(f"{folder}/{number}.tar: {sample['__key__']}.cls holds no class index") from None

def captions(field, data):
    """The captions in a txt (its lines that are not empty) or a json (its field `caption`)."""
    text = data.decode("utf-8", "replace")
    if field == "json":
        try:
            text = json.loads(text)["caption"]
        except (ValueError, KeyError, TypeError):
            return []
    return [line.strip() for line in str(text or "").splitlines() if line.strip()]

def decode(data, least=None):
    """Image bytes -> upright PIL image in RGB, the first frame; DataError with a short cause where that fails.

    least: a (width, height) that is enough: a JPEG is decoded at 1/2, 1/4 or 1/8 where that suffices."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise DataError("image too large")
        if least and image.format == "JPEG":
            image.draft("RGB", least)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "LA", "PA", "RGBA", "La", "RGBa"):  # what is transparent shows white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: Pillow's convert would clip
            pixels = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((pixels / max(255.0, pixels.max()) * 255).astype(np.uint8))
        return image.convert("RGB")
    except DataError:
        raise
    except Exception:  # Pillow raises nearly anything on damaged files
        raise DataError("image does not decode") from None

def preprocess(image, size):
    """The test transform: PIL image -> uint8 (3,S,S), short side resized (bicubic, antialiased), centre crop."""
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if image.size != (width, height):  # of what is resized only the box that is seen, so that strips stay cheap
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    elif image.size != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

def random_crop(data, size, least, rng):
    """Image bytes -> uint8 (3,S,S): a random box, of `least` to 1 of the area and sides from 3:4 to 4:3, resized
    (bicubic, antialiased) as it is cut. A JPEG is decoded no finer than the smallest such box needs."""
    enough = math.ceil(size / math.sqrt(least * 3 / 4))
    image = decode(data, (enough, enough))
    width, height = image.size
    for _ in range(10):
        area, ratio = width * height * rng.uniform(least, 1), (4 / 3) ** rng.uniform(-1, 1)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    image = image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

# --- Tokenizer -------------------------------------------------------------------------------------------
class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016), lossless on any bytes.

    Ids: PAD, SOT, EOT, the 256 bytes, then the merges in the order in which they were learned."""

    pieces = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[\x80-\xff]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+")

    def __init__(self, merges):
        """merges: pairs of ids, the n-th of which becomes id 259 + n."""
        self.merges = [tuple(pair) for pair in merges]
        self.new = {pair: 259 + n for n, pair in enumerate(self.merges)}
        self.bytes = [b"", b"", b""] + [bytes([n]) for n in range(256)]
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.cache = {}

    @property
    def vocab_size(self):
        """How many ids there are."""
        return len(self.bytes)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns merges from texts (str or bytes) until there are vocab_size ids, or no pair occurs twice."""
        if vocab_size < 259:
            raise DataError(f"a vocabulary of {vocab_size}: must be at least 259, 256 bytes and 3 specials")
        counts = Counter(piece for text in texts for piece in cls.pieces.findall(as_bytes(text)))
        words, counts = [[byte + 3 for byte in piece] for piece in counts], list(counts.values())
        pairs, where = Counter(), defaultdict(set)
        for n, word in enumerate(words):
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += counts[n]
                where[pair].add(n)
        # The most frequent pair, the smallest ids first among equals; counts in the heap may be out of date.
        heap, merges = [(-count, pair) for pair, count in pairs.items()], []
        heapify(heap)
        while heap and len(merges) < vocab_size - 259:
            count, pair = heappop(heap)
            if -count != pairs[pair]:
                heappush(heap, (-pairs[pair], pair))
                continue
            if -count < 2:
                break
            changed = set()
            for n in where.pop(pair):
                for old in zip(words[n], words[n][1:], strict=False):
                    pairs[old] -= counts[n]
                words[n] = merge(words[n], pair, 259 + len(merges))
                for now in zip(words[n], words[n][1:], strict=False):
                    pairs[now] += counts[n]
                    where[now].add(n)
                    changed.add(now)
            merges.append(pair)
            for now in changed:
                heappush(heap, (-pairs[now], now))
        return cls(merges)

    def encode(self, text):
        """str or bytes -> ids, without specials."""
        ids = []
        for piece in self.pieces.findall(as_bytes(text)):
            if piece not in self.cache:
                tokens = [byte + 3 for byte in piece]
                while len(tokens) > 1:
                    found = [pair for pair in zip(tokens, tokens[1:], strict=False) if pair in self.new]
                    if not found:
                        break
                    pair = min(found, key=self.new.get)
                    tokens = merge(tokens, pair, self.new[pair])
                if len(self.cache) > 1_000_000:
                    self.cache.clear()
                self.cache[piece] = tokens
            ids += self.cache[piece]
        return ids

    def decode(self, ids):
        """ids -> bytes; specials vanish."""
        return b"".join(self.bytes[int(n)] for n in ids)

    def batch(self, texts, context):
        """texts -> (B, context) int64: SOT, ids, EOT, cut so that EOT stays, padded."""
        rows = np.full((len(texts), context), PAD, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text[: 64 * context])[: context - 2]  # no id stands for more bytes than that
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
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not a tokenizer's file; make one with data.py tokenizer") from None

def as_bytes(text):
    """str -> its UTF-8 bytes; bytes stay."""
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)

def merge(tokens, pair, new):
    """tokens with every occurrence of pair, from the left, replaced by new."""
    out, n = [], 0
    while n < len(tokens):
        if tuple(tokens[n : n + 2]) == pair:
            out.append(new)
            n += 2
        else:
            out.append(tokens[n])
            n += 1
    return out

# --- Index and loader ------------------------------------------------------------------------------------
def fault(image, text, field):
    """Why a sample cannot be used, by what can be told without decoding it, or None."""
    if image is None:
        return "no image"
    if field and not captions(field, text):
        return "no caption"
    try:
        width, height = Image.open(io.BytesIO(image)).size
    except Exception:  # Pillow raises nearly anything on damaged files
        return "image header unreadable"
    if width * height > MAX_PIXELS:
        return "image too large"
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}  # JPEG's and PNG's end markers
    return None if ends.get(image[:2], b"") in image[-4096:] else "image incomplete"

def index_shard(job):
    """job: a shard, whether captions are needed -> keys and rows (n,5) of what is readable, faults by cause.

    A row: offset and size of the image, offset and size of the caption, 1 where that is json. The result is
    kept in the cache folder, under the shard's path, size and time of change."""
    path, need = job
    about = os.stat(path)
    name = f"{os.path.abspath(path)} {about.st_size} {about.st_mtime_ns} {need}"
    cache = cache_folder() / "index" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(cache.read_text())
        return found["keys"], np.array(found["rows"], dtype=np.int64).reshape(-1, 5), found["bad"]
    except (OSError, ValueError, KeyError):
        keys, rows, bad = [], [], {}
    with open(path, "rb") as file:
        for sample in grouped(path, bad):
            image = next((sample[field] for field in IMAGE_FIELDS if field in sample), None)
            field = next((field for field in ("txt", "json") if field in sample), "txt") if need else None
            text = sample.get(field, (0, 0))
            read = [where and os.pread(file.fileno(), where[1], where[0]) for where in (image, text)]
            cause = fault(*read, field)
            if cause:
                bad[cause] = bad.get(cause, 0) + 1
            else:
                keys.append(sample["__key__"])
                rows.append([*image, *text, int(field == "json")])
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"keys": keys, "rows": rows, "bad": bad}))
        part.replace(cache)
    except OSError:  # a cache that cannot be written costs time only
        pass
    return keys, np.array(rows, dtype=np.int64).reshape(-1, 5), bad

@dataclass
class Batch:
    """One step's samples of one rank: images uint8 (B,3,S,S), tokens int64 (B,T), keys."""

    images: torch.Tensor
    tokens: torch.Tensor
    keys: list

class Loader:
    """Batches of a source: every readable sample once an epoch over all ranks and workers, but for the last
    `count mod global batch` of its order. Order, crops and captions are a pure function of (seed, epoch)."""

    def __init__(self, source, batch_size, image_size, tokenizer, context, seed=0, rank=0, world=1, workers=0,
                 crop=1.0, captions=True, spawn=False, cache_bytes=2 << 30):
        """batch_size: of one rank; crop: least area of a random resized crop, 1 for the test transform;
        captions: whether samples need one (tokens are else SOT, EOT). DataError where there is too little."""
        self.batch_size, self.image_size, self.tokenizer, self.context = batch_size, image_size, tokenizer, context
        self.seed, self.rank, self.world, self.workers, self.crop = seed, rank, world, workers, crop
        self.captions, self.spawn, self.shards, self.files = captions, spawn, expand(source), {}
        jobs = [(shard, captions) for shard in self.shards]
        with ProcessPoolExecutor(min(len(jobs), os.cpu_count())) as pool:
            index = list(tqdm(pool.map(index_shard, jobs), total=len(jobs), desc="indexing", unit="shard",
                              disable=None, leave=False))
        self.keys = [key for keys, _, _ in index for key in keys]
        self.rows = np.concatenate([rows for _, rows, _ in index])
        self.shard_of = np.repeat(np.arange(len(index)), [len(rows) for _, rows, _ in index])
        self.samples, self.bad = len(self.keys), dict(sum((Counter(bad) for _, _, bad in index), Counter()))
        skipped = ", ".join(f"{count} x {cause}" for cause, count in self.bad.items())
        if self.samples < batch_size * world:
            raise DataError(f"{source}: {self.samples} usable samples, fewer than one batch of "
                            f"{batch_size * world}; skipped: {skipped or 'none'}")
        if skipped and rank == 0:
            print(f"skipped while indexing: {skipped}", file=sys.stderr)
        digest = hashlib.sha256("\n".join(self.keys).encode()).hexdigest()
        sizes = [[os.path.basename(shard), os.path.getsize(shard)] for shard in self.shards]
        self.identity = {"shards": sizes, "samples": self.samples, "keys": digest}
        # Without random crops pixels never change: where they fit, they stay decoded, in shared memory.
        self.cache = self.cached = None
        if crop == 1 and self.samples * 3 * image_size**2 <= cache_bytes:
            self.cache = torch.empty(self.samples, 3, image_size, image_size, dtype=torch.uint8).share_memory_()
            self.cached = torch.zeros(self.samples, dtype=torch.bool).share_memory_()

    def __len__(self):
        """Batches an epoch, the same on every rank."""
        return self.samples // (self.batch_size * self.world)

    def __getstate__(self):
        return self.__dict__ | {"files": {}}  # a worker opens shards itself

    def read(self, shard, offset, size):
        """Bytes of a local shard."""
        if shard not in self.files:
            self.files[shard] = open(self.shards[shard], "rb")
        return os.pread(self.files[shard].fileno(), size, offset)

    def texts(self):
        """Yields all captions, for the tokenizer."""
        for shard, (_, _, offset, size, is_json) in zip(self.shard_of, self.rows.tolist(), strict=True):
            yield from captions(("txt", "json")[is_json], self.read(shard, offset, size))

    def image(self, n, rng):
        """Sample n's image, uint8 (3,S,S); DataError where it does not decode."""
        if self.cache is not None and self.cached[n]:
            return self.cache[n]
        data = self.read(self.shard_of[n], *self.rows[n, :2].tolist())
        if self.crop < 1:
            return random_crop(data, self.image_size, self.crop, rng)
        pixels = preprocess(decode(data), self.image_size)
        if self.cache is not None:
            self.cache[n] = pixels
            self.cached[n] = True
        return pixels

    def caption(self, n, share):
        """One of sample n's captions, chosen by share in 0..1."""
        _, _, offset, size, is_json = self.rows[n].tolist()
        texts = captions(("txt", "json")[is_json], self.read(self.shard_of[n], offset, size))
        return texts[int(share * len(texts))]

    def epoch(self, n, skip=0):
        """Yields this rank's batches of epoch n, after the first `skip`, all of full size."""
        epoch, workers = Epoch(self, n), min(self.workers, len(self) - skip)
        context = ("spawn" if self.spawn else "fork") if workers > 0 else None
        batches = DataLoader(epoch, None, sampler=range(skip, len(self)), num_workers=workers, collate_fn=same,
                             multiprocessing_context=context, worker_init_fn=be_quiet,
                             pin_memory=torch.cuda.is_available())
        for images, tokens, keys, failed in batches:
            for cause in failed:
                self.bad[cause] = self.bad.get(cause, 0) + 1
            yield Batch(images, tokens, keys)

class Epoch(Dataset):
    """The batches of one epoch of a Loader, by number; what a worker process runs."""

    def __init__(self, loader, n):
        self.loader, self.n = loader, n
        rng = np.random.default_rng([loader.seed, n])
        self.order, self.draws = rng.permutation(loader.samples), rng.random(loader.samples)

    def __getitem__(self, number):
        """-> images, tokens, keys, causes of failure. Another sample of the batch takes a failed one's slot."""
        loader, B = self.loader, self.loader.batch_size
        first = number * B * loader.world + loader.rank * B
        good, images, failed = [], [], []
        for n in self.order[first : first + B].tolist():
            try:
                images.append(loader.image(n, np.random.default_rng([loader.seed, self.n, n])))
                good.append(n)
            except DataError as error:
                failed.append(str(error))
        if not good:
            raise DataError(f"no image of a whole batch decodes ({failed[0]})")
        good = [good[slot % len(good)] for slot in range(B)]
        images = torch.stack([images[slot % len(images)] for slot in range(B)])
        if loader.captions:
            texts = [loader.caption(n, self.draws[n]) for n in good]
            tokens = loader.tokenizer.batch(texts, loader.context)
        else:
            tokens = F.pad(torch.tensor([[SOT, EOT]]), (0, loader.context - 2)).repeat(B, 1)
        return images, tokens, [loader.keys[n] for n in good], failed

def same(batch):
    """A batch as it is."""
    return batch

def be_quiet(worker):
    """Leaves Ctrl-C to the parent process, and its cores to the other workers."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

# --- Augmentation ----------------------------------------------------------------------------------------
def simclr_view(images, noise, least=0.08):
    """One of SimCLR's views of each image, on the batch and on its device: crop, flip and colours.

    images uint8 (B,3,H,W), noise (B,12) uniform, the only chance; least: share of the area that a crop keeps ->
    uint8 (B,3,H,W). Strengths are SLIP's: jitter 0.4, 0.4, 0.4, 0.1 with p 0.8, grey 0.2; no blur."""
    u, x = noise.T, images.float() / 255
    area, ratio = least + (1 - least) * u[0], torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)  # shares of width and height
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
    """Points (n,2) at these radii and angles about the origin, y down."""
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

def in_quarters(rng, quarters):
    """An object of any kind in each of these quarters of the picture."""
    radii, places = rng.uniform(4, 6.5, len(quarters)), [(q % 2 * SIDE / 2, q // 2 * SIDE / 2) for q in quarters]
    return [(*CLASSES[rng.integers(len(CLASSES))], *(rng.uniform(r, SIDE / 2 - r, 2) + place), r)
            for r, place in zip(radii, places, strict=True)]

def related(rng, first, second, relation):
    """Two objects, the first in that relation to the second."""
    step = np.array(RELATIONS[relation])
    aside, centre = 8 * step + rng.uniform(-5, 5) * step[::-1], rng.uniform(15, 17, 2)
    return [(*first, *(centre + aside), rng.uniform(5, 7.5)), (*second, *(centre - aside), rng.uniform(5, 7.5))]

def alone(rng, pair):
    """One object, anywhere."""
    radius = rng.uniform(6, 11)
    return [(*pair, *rng.uniform(radius, SIDE - radius, 2), radius)]

def articled(words):
    """"a red star", "an orange ring"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

def captioned_scene(rng, pairs):
    """A sample for training: one object or, a time in five, two in a relation -> objects, caption. Colour, shape and
    size are named or left out; place, background and turn are never named."""
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
    return in_quarters(rng, [label] if name == "position" else rng.permutation(4)[: label + 1])

def unseen(seed):
    """Classes that captioned training never shows: each shape in one colour, no colour twice."""
    colours = np.random.default_rng([seed, 1]).permutation(len(COLOURS))[: len(SHAPES)]
    return sorted(int(colour) * len(SHAPES) + shape for shape, colour in enumerate(colours))

def draw_shard(job):
    """Writes one shard of scenes; job: path, kind, numbers, seed -> how many."""
    path, kind, numbers, seed = job
    hidden = unseen(seed)
    pairs = [pair for n, pair in enumerate(CLASSES) if n not in hidden]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            rng, name = np.random.default_rng([seed, *kind.encode(), number]), kind.split("-")[0]
            if name in SETS:
                text = number % len(SETS[name][0])
                objects = labelled_scene(rng, name, text)
            else:
                objects, text = captioned_scene(rng, pairs)
            files = {"jpg": render(rng, objects), "cls" if name in SETS else "txt": str(text).encode()}
            for field, data in files.items():
                info = tarfile.TarInfo(f"{kind}-{number:06d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(numbers)

def draw(folder, scenes=40_000, seed=0, workers=None):
    """Draws the built-in data into a new folder, the same for a seed: captioned shards train-*.tar and
    dev-00000.tar, labelled sets in CLIP_benchmark's layout, and objects/unseen.txt, the classes never captioned."""
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; give a new folder")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # renamed when it is whole
    size = min(2500, -(-scenes // 4))
    jobs = [(part / f"train-{n // size:05d}.tar", "train", range(n, min(scenes, n + size)), seed)
            for n in range(0, scenes, size)]
    jobs.append((part / "dev-00000.tar", "dev", range(min(1000, scenes // 4)), seed))
    for name, (names, templates) in SETS.items():
        for split in ("train", "test"):
            count = range(min(2000 if name == "objects" else 600, scenes // 4))
            (part / name / split).mkdir(parents=True, exist_ok=True)
            (part / name / split / "nshards.txt").write_text("1")
            jobs.append((part / name / split / "0.tar", f"{name}-{split}", count, seed))
        (part / name / "classnames.txt").write_text("\n".join(names))
        (part / name / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    (part / "objects" / "unseen.txt").write_text("\n".join(map(str, unseen(seed))))
    with ProcessPoolExecutor(workers) as pool, tqdm(total=sum(len(j[2]) for j in jobs), desc="drawing") as bar:
        for count in pool.map(draw_shard, jobs):
            bar.update(count)
    try:
        part.rename(folder)
    except OSError:  # another process was faster, with the same scenes
        shutil.rmtree(part)

def builtin(scenes, seed):
    """The folder of the built-in data in the cache; drawn where it is missing."""
    folder = cache_folder() / f"scenes-{scenes}-{seed}"
    if not folder.exists():
        draw(folder, scenes, seed)
    return folder

# --- Command line -----------------------------------------------------------------------------------------
def main(argv=None):
    """data.py draw FOLDER | data.py tokenizer SOURCE FILE; exit code 2, and one line, for bad input."""
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("draw", help="draw the built-in scenes into a new folder")
    command.add_argument("folder")
    command.add_argument("--scenes", type=int, default=40_000)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("tokenizer", help="train a tokenizer on the captions of shards")
    command.add_argument("source")
    command.add_argument("file")
    command.add_argument("--vocab-size", type=int, default=32_768)
    given = parser.parse_args(argv)
    try:
        if given.command == "draw":
            draw(given.folder, given.scenes, given.seed)
        else:
            texts = (text for _, _, texts in captioned(given.source) for text in texts)
            Path(given.file).write_text(json.dumps(Tokenizer.train(texts, given.vocab_size).state()))
    except KeyboardInterrupt:
        sys.exit(130)
    except (DataError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
