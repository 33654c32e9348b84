"""Image-caption shards in, exact batches out: reading, images, tokenizer, index, loader.

A shard is a webdataset tar as img2dataset writes it: KEY.jpg, jpeg, png or webp, with KEY.txt (one
caption a line) or KEY.json (its field `caption`). A source is one shard or several, joined by `::`:
paths, globs, numbers as in {000..123}, folders, and pipe:COMMAND, which sends a tar.

The file can be copied out alone and imported. Its commands, `python data.py pack` and others, stand
in files of their own.
"""

import ctypes
import errno
import glob
import hashlib
import io
import json
import math
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm


class DataError(ValueError):
    """What the user gave does not work; the message is one line that says what, and what to do."""


def printable(text):
    """A text in which no character is an order to the terminal, such as a tar's or a file's name
    may hold."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def one_line(error):
    """The last line of an error's message (a worker's comes with its traceback)."""
    message = str(error).strip() or repr(error)
    if isinstance(error, OSError) and error.filename:  # else it begins with "[Errno 2]"
        message = f"{error.filename}: {error.strerror}"
    return printable(re.sub(r"^[\w.]*Error: ", "", message.split("\n")[-1]))


def cache_folder():
    """$XDG_CACHE_HOME/mae_clip, else ~/.cache/mae_clip. It may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mae_clip")


# The signals that ask a process to stop. Windows has no SIGHUP.
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


@contextmanager
def held_signals():
    """Inside `with`, what asks this process to stop waits; it comes at the end."""
    came = []
    before = {}
    try:
        with suppress(ValueError):  # not in the main thread, which alone gets signals
            for number in STOPPING:
                before[number] = signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def end_with_parent(worker):
    """In a worker process: on Linux it ends with its parent, even if that is killed while this one
    waits for a command or a lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent and not parent.is_alive():  # it was killed before
        os._exit(1)


def be_quiet(worker):
    """In a worker process that loads while the parent trains: Ctrl-C is the parent's, and so are
    the cores, where it wants them. It ends with its parent, as above."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(worker)
    with suppress(AttributeError):  # Windows has no nice
        os.nice(19)


def share_folder():
    """Makes the folder for the sockets by which workers send tensors. This process removes it when
    it ends regularly; a folder that a worker made would stay. DataError where a socket's path would
    be too long: then no batch would ever come."""
    folder = multiprocessing.util.get_temp_dir()
    if len(folder) > 85:  # of at most 104 with the socket's name
        raise DataError(f"TMPDIR: {folder} is too long a path for sockets; export TMPDIR=/tmp")


@contextmanager
def workers_of(loader):
    """What a torch DataLoader yields. Its workers end with the `with`, also busy ones: torch alone
    would wait five seconds for each."""
    others = set(multiprocessing.active_children())
    workers = set()
    try:
        # An exception from a signal, while torch starts the workers, may leave the lock of a queue
        # taken. At the end torch would wait for that lock for ever.
        with held_signals():
            results = iter(loader)
            workers = set(multiprocessing.active_children()) - others
        yield results
    finally:
        with suppress(AttributeError, ValueError):  # Windows has none; not in the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error now
        for worker in workers:
            worker.terminate()  # which torch's handler in the worker makes a regular end
        deadline = time.time() + 5
        for worker in workers:
            worker.join(max(0, deadline - time.time()))
            worker.kill()  # one that was stopped (SIGSTOP) has not ended
        if workers:
            # One of them may have ended while it held the lock of torch's event, which torch sets
            # once more: it would wait for ever. It gets an event that nobody else has.
            results._workers_done_event = multiprocessing.Event()


def in_parallel(function, jobs, title):
    """Yields function(job) of each job, in order, by worker processes, with a progress bar."""
    loader = DataLoader(
        jobs,
        batch_size=None,
        num_workers=min(len(jobs), os.cpu_count()),
        collate_fn=function,
        worker_init_fn=end_with_parent,
    )
    try:
        with workers_of(loader) as results:
            yield from tqdm(results, title, len(jobs), leave=False, disable=None)
    except RuntimeError as error:  # torch's, of a worker that was killed
        raise DataError(f"a worker process failed: {one_line(error)}") from None


# --- Reading shards -------------------------------------------------------------------------------
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LINE_BREAK = re.compile(r"\r?\n")
LEFT_OUT = re.compile(r"^__[^/]*__($|/)|(^|/)\._")  # webdataset's __meta__, and what macOS adds


FOLDER_NAMES = ("train/*.tar", "train*.tar", "*.tar")  # a folder's shards: the first that it has


def parts_of(source):
    """A source -> the paths and commands that are joined in it. What follows pipe: is a command up
    to the next `::pipe:`, as `::` may be part of it."""
    # The whole source may be one path with `::` in it, such as a::b.tar where that file exists, or
    # a::b/*.tar where the folder does.
    if os.path.exists(re.sub(r"/[^/]*[*{][^/]*$", "", source)):
        return [source]
    source = source.strip()
    paths, *commands = re.split(r"(?i:(?:^|::)\s*pipe:)", source)
    parts = [path for path in paths.split("::") if path or not commands]
    return parts + [f"pipe:{command}" for command in commands]


def public(source):
    """A source, or a list of them, without what may be secret: commands are replaced by the names
    that they show."""
    parts = parts_of(source) if isinstance(source, str) else source
    return "::".join(shown(part) if part.startswith("pipe:") else part for part in parts)


def expand(source):
    """A source, or a list of them, as the list of its shards; DataError where one has none."""
    shards = []
    for part in parts_of(source) if isinstance(source, str) else source:
        found = []
        folder = os.path.dirname(part)
        named = len(folder) if os.path.isdir(folder) else 0  # so much is no pattern, but a name
        numbers = re.compile(r"\{(\d+)\.\.(\d+)\}").search(part, named)
        if os.path.isfile(part):
            found = [part]
        elif os.path.isdir(part):  # its shards for training, where these are set apart
            for names in FOLDER_NAMES:
                found = found or sorted(glob.glob(f"{glob.escape(part)}/{names}"))
            if not found:
                raise DataError(
                    f"{part}: a folder without {', '.join(FOLDER_NAMES)}; `data.py pack` makes "
                    "shards of photos"
                )
        elif numbers:
            first, last = numbers.groups()
            for number in range(int(first), int(last) + 1):
                digits = f"{number:0{len(first)}}"
                found += expand([part[: numbers.start()] + digits + part[numbers.end() :]])
        elif part.startswith("pipe:"):
            found = [part]
        else:
            found = sorted(glob.glob(glob.escape(part[:named]) + part[named:]))
        if not found:
            # What follows a `pipe:` that is not understood may be secret, too.
            name = re.sub(r"(?i)(pipe\s*:).*", r"\1...", part) or "empty"
            raise DataError(f"{name}: no such shard; check the path, and quote braces and stars")
        shards += found
    return shards


def shown(shard):
    """A shard's name without its folder; of a command the last tar's, as the rest may be secret."""
    if not shard.startswith("pipe:"):
        return printable(os.path.basename(shard))
    tars = re.findall(r"[\w.-]+\.tar\b", re.sub(r"[?#]\S*", "", shard))
    return tars[-1] if tars else "a command"


PAUSES = (1, 5, 20)  # seconds before a command that failed is tried again
# A command, and beside it what ends it and all that it started once stdin is closed: so nothing is
# left of it when the program that reads it has ended, however that ended.
GUARDED = """exec 3<&0 </dev/null
(read _; kill -9 0) <&3 >/dev/null 2>&1 &
guard=$!
exec 3<&-
(
{}
)
code=$?
kill -9 $guard
wait $guard
exit $code"""


def sent_by(command):
    """A command -> its exit code, and all that it sent."""
    script = command if os.name == "nt" else GUARDED.format(command)
    with subprocess.Popen(
        script,
        shell=True,
        stdin=subprocess.DEVNULL if os.name == "nt" else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        content = process.stdout.read()
        return process.wait(), content


def opened(shard):
    """A shard as a file; of a command all that it sends. A command that fails is tried again, then
    DataError. How long it may take is its own affair (curl --max-time)."""
    if not shard.startswith("pipe:"):
        return open(shard, "rb")
    command = shard.removeprefix("pipe:")
    for pause in (*PAUSES, None):
        code, content = sent_by(command)
        if code == 0:
            return io.BytesIO(content)
        failure = f"{shown(shard)}: its command ended with exit code {code}"
        if pause is None or code in (126, 127):  # no such command
            raise DataError(failure)
        tqdm.write(f"{failure}; tried again in {pause} s", file=sys.stderr)
        time.sleep(pause)


def grouped(file):
    """Yields the samples of a tar as key, {field: (offset, size)}, by webdataset's rule: the key is
    the path up to the first dot of the base name, the field is the rest in lower case, and members
    of a sample are adjacent. A field that comes twice, which webdataset refuses, begins another
    sample. DataError at the end where the tar breaks off or has no sample."""
    key = ""
    sample = {}
    cause = "tar without samples"
    reached = 0
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # where tarfile would keep them all
                size = info.size if info.isreg() else 0  # what a folder's header says is void
                if info.size < 0 or size > end - info.offset_data or info.issparse():
                    raise tarfile.ReadError
                if info.offset < reached:  # a size below 0 leads back, and tarfile follows
                    raise tarfile.ReadError
                reached = info.offset + 1
                name = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
                if not info.isreg() or not name or LEFT_OUT.search(info.name):
                    continue
                field = name[2].lower()
                if sample and (key != name[1] or field in sample):
                    yield key, sample
                    sample = {}
                key = name[1]
                sample[field] = (info.offset_data, info.size)
                cause = None
            # tarfile stops at a damaged or missing header as at the end. A true end is zeros.
            rest = read(file, tar.offset, 1 << 20)
            if len(rest) < 512 or rest.strip(b"\0"):
                cause = "tar breaks off"
    except (tarfile.TarError, OverflowError, ValueError, MemoryError, RecursionError):
        sample = {}  # it may lack a field
        cause = "tar breaks off, or is compressed"
    except OSError as error:
        if error.errno != errno.EINVAL:  # a size that leads to where no file reaches
            raise
        cause = "tar breaks off"
    if sample:
        yield key, sample
    if cause:
        raise DataError(cause)


def read(file, offset, size):
    """Bytes of a file."""
    file.seek(offset)
    return file.read(size)


def loaded(file, key, fields, places):
    """A raw sample: bytes by field, which lie at (offset, size) each, and `__key__`."""
    sample = {"__key__": key}
    for field, place in zip(fields, places, strict=True):
        sample[field] = read(file, *place)
    return sample


def read_samples(source, strict=False):
    """Yields the shards' raw samples in order. Where a tar breaks off it says so and goes on with
    the next; if strict, that is a DataError."""
    for shard in expand(source):
        with opened(shard) as file:
            try:
                for key, places in grouped(file):
                    yield loaded(file, key, places.keys(), places.values())
            except DataError as error:
                if strict:
                    raise DataError(f"{shown(shard)}: {error}") from None
                print(f"{shown(shard)}: {error}", file=sys.stderr)


def captions(sample, errors="replace"):
    """A raw sample's captions: the lines of its txt that are not empty. If there are none, or if a
    caption in its json has a line break, they are those of the json instead: its field `caption`, a
    text or a list of texts. If errors is "strict", a txt that is not in UTF-8 is a DataError."""
    text = sample.get("txt", b"")
    try:
        lines = LINE_BREAK.split(text.decode("utf-8-sig", errors))
    except UnicodeDecodeError:
        raise DataError(f"a caption is not in UTF-8: {text[:60]}; save its txt so") from None
    lines = [line.strip() for line in lines if line.strip()]
    noted = []
    with suppress(ValueError, KeyError, TypeError, RecursionError):  # no json, or of another shape
        field = json.loads(sample.get("json") or "{}")["caption"]
        texts = field if isinstance(field, list) else [field]
        noted = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    # img2dataset writes a caption to both files: where it has line breaks, the txt looks like many.
    if lines and not any("\n" in text for text in noted):
        return lines
    return [LINE_BREAK.sub(" ", text) for text in noted]


def image_of(sample):
    """What a sample has of an image's fields, or None."""
    return next((sample[field] for field in IMAGE_FIELDS if field in sample), None)


def whole_samples(source, labelled=False):
    """Yields (key, image bytes, captions or, if labelled, class index) of a test set's shards. No
    sample may lack its image, nor its class index; captions may be none."""
    for sample in read_samples(source, strict=True):
        key = sample["__key__"]
        image = image_of(sample)
        label = sample.get("cls", b"").strip()
        if not image:
            fields = {name: len(sample[name]) for name in list(sample)[1:]}
            raise DataError(
                f"{public(source)}: {key}: in a test set each sample needs an image; found the "
                f"fields (with their bytes) {fields}"
            )
        if labelled and not label.isdigit():
            raise DataError(
                f"{public(source)}: {key}: in a labelled set each sample needs a class index, 0 or "
                f"more, in KEY.cls; found {label!r:.40}"
            )
        yield key, image, int(label) if labelled else captions(sample)


def split_shards(folder, split):
    """The shards of a split of a folder in CLIP_benchmark's layout."""
    path = Path(folder, split, "nshards.txt")
    count = path.read_text("utf-8-sig").strip() if path.exists() else "no such file"
    if not count.isdecimal() or count == "0":
        raise DataError(f"{path}: says {count!r:.40}, where a number of shards is needed")
    return [f"{folder}/{split}/{number}.tar" for number in range(int(count))]


# --- Images ---------------------------------------------------------------------------------------
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
warnings.filterwarnings("ignore", module="PIL")  # of images that decode all the same


def open_image(data):
    """Image bytes -> PIL image of which the header alone is read, or DataError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= Image.MAX_IMAGE_PIXELS:
            return image
    except Image.DecompressionBombError:  # over twice as many
        pass
    except Exception:  # Pillow raises nearly anything on damaged files
        raise DataError("image header unreadable") from None
    raise DataError(f"image of over {Image.MAX_IMAGE_PIXELS:,} pixels is too large")


def decode(data, pixels=1 << 30):
    """Image bytes -> upright RGB image, of the first frame; or DataError. A JPEG is decoded at 1/2,
    1/4 or 1/8 of its size where that leaves so many pixels a side."""
    image = open_image(data)
    try:
        image.draft("RGB", (pixels, pixels))
        image.load()
        with suppress(Exception):  # it turns the image, and then may fail on its other tags
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:  # what is transparent shows white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception:
        raise DataError("image does not decode") from None


def as_tensor(image):
    """RGB image -> uint8 (3,H,W)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def middle(image, width, height):
    """The middle of an image, or all where it is smaller."""
    width = min(width, image.width)
    height = min(height, image.height)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def preprocess(image, size):
    """The test transform, open_clip's and torchvision's: PIL image -> uint8 (3,S,S), the short side
    resized to `size` (bicubic, antialiased), then the centre cut out."""
    short = min(image.size)
    image = middle(image, 9 * short, 9 * short)  # so that long strips stay cheap
    width = int(size * image.width / short)  # torchvision truncates the longer side
    height = int(size * image.height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return as_tensor(middle(image, size, size))


def random_crop(data, size, least, rng):
    """Image bytes -> uint8 (3,S,S): a random box, of `least` to 1 of the area and sides from 3:4 to
    4:3, cut short where it does not fit, resized."""
    # A JPEG may be decoded at a part of its size: the smallest box keeps `size` pixels a side.
    image = decode(data, math.ceil(size / math.sqrt(0.75 * least)))
    area = image.width * image.height * rng.uniform(least, 1)
    ratio = (4 / 3) ** rng.uniform(-1, 1)
    width = min(image.width, math.sqrt(area * ratio))
    height = min(image.height, math.sqrt(area / ratio))
    left = rng.uniform(0, image.width - width)
    top = rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return as_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box))


# --- Tokenizer ------------------------------------------------------------------------------------
PAD, SOT, EOT = 0, 1, 2


def as_bytes(text):
    """str -> its UTF-8 bytes; bytes stay."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def as_word(piece):
    """Bytes -> a str of one character for each byte's id."""
    return "".join(chr(byte + 3) for byte in piece)


def pairs_of(word):
    """All pairs of neighbouring characters of a word."""
    return [first + second for first, second in pairwise(word)]


class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016), lossless on any bytes. Ids: PAD, SOT,
    EOT, 256 bytes, then the merges as they were learned. Inside, a piece of text is a str of which
    each character is an id, so that a merge is a replace."""

    pieces = re.compile(
        rb" ?(?:[A-Z]{1,63}|\d{1,63}|[\x80-\xff]{1,63}|[!-/:-@[-`{-~]{1,9})|\s{1,64}|.", re.I
    )

    def __init__(self, merges):
        """merges: pairs of ids, the n-th of which becomes id 259 + n."""
        self.merges = [tuple(pair) for pair in merges]
        self.bytes = 3 * [b""] + [bytes([byte]) for byte in range(256)]  # of each id
        self.new = {}  # pair -> its id
        for first, second in self.merges:
            self.new[chr(first) + chr(second)] = len(self.bytes)
            self.bytes.append(self.bytes[first] + self.bytes[second])
        self.vocab_size = len(self.bytes)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns merges from the 100,000 most frequent pieces of texts (str or bytes) until there
        are vocab_size ids, or no pair occurs twice."""
        if vocab_size < 259:
            raise DataError(f"a vocabulary of {vocab_size}: needs 259, for 256 bytes, 3 specials")
        pieces = Counter()
        for text in texts:
            pieces.update(cls.pieces.findall(as_bytes(text)))
        common = pieces.most_common(100_000)
        words = [as_word(piece) for piece, _ in common]
        times = [number for _, number in common]

        # A merge changes only the words that hold its pair: their pairs are subtracted from the
        # counts before, and added after.
        counts = Counter()  # of pairs
        where = defaultdict(set)  # pair -> the words that have held it
        changed = set()  # pairs that the last merge counted anew

        def count(n, sign):  # of word n
            for pair in pairs_of(words[n]):
                counts[pair] += sign * times[n]
                where[pair].add(n)
                changed.add(pair)

        for n in range(len(words)):
            count(n, 1)
        # The heap gives the most frequent pair first, the smallest ids among equals. Each change of
        # a count adds an entry to it, so entries with an older count are passed over.
        heap = sorted((-number, pair) for pair, number in counts.items())
        merges = []
        while heap and heap[0][0] < -1 and len(merges) < vocab_size - 259:
            number, pair = heappop(heap)
            if -number != counts[pair]:
                continue
            changed.clear()
            for n in where.pop(pair):
                count(n, -1)
                words[n] = words[n].replace(pair, chr(259 + len(merges)))
                count(n, 1)
            for each in changed:
                heappush(heap, (-counts[each], each))
            merges.append((ord(pair[0]), ord(pair[1])))
        return cls(merges)

    @classmethod
    def load(cls, path):
        """Reads what `data.py tokenizer` wrote."""
        try:
            merges = json.loads(Path(path).read_text())
            if not isinstance(merges, list):
                raise TypeError
            return cls(merges)
        except (OSError, ValueError, TypeError, IndexError, OverflowError):
            raise DataError(f"{path}: not a tokenizer; make one with data.py tokenizer") from None

    @lru_cache(200_000)  # noqa: B019 (tokenizers are few, and stay)
    def merge(self, piece):
        """Bytes of one piece -> ids: of the pairs in it the one learned first is merged, until none
        is left."""
        word = as_word(piece)
        while True:
            known = [pair for pair in pairs_of(word) if pair in self.new]
            if not known:
                return [ord(character) for character in word]
            first = min(known, key=self.new.get)
            word = word.replace(first, chr(self.new[first]))

    def encode(self, text):
        """str or bytes -> ids, without specials."""
        ids = []
        for piece in self.pieces.findall(as_bytes(text)):
            ids += self.merge(piece)
        return ids

    def decode(self, ids):
        """ids -> bytes; specials vanish."""
        return b"".join(self.bytes[int(token)] for token in ids)

    def batch(self, texts, context):
        """texts -> (B, context) int64: SOT, ids, EOT, cut so that EOT stays, padded."""
        rows = np.full((len(texts), context), PAD, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            text = text[: 64 * context]  # a piece, so an id, has at most 64 bytes
            ids = [SOT] + self.encode(text)[: context - 2] + [EOT]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)


# --- Index ----------------------------------------------------------------------------------------
INDEXED = ("jpg", "txt", "json")  # the fields whose places an index holds; jpg: of any image
NOWHERE = (0, 0)
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what is found near the end of a whole file


def check(sample, captioned):
    """DataError where a raw sample with the fields of INDEXED is of no use. An image is judged by
    its header and, of a JPEG or PNG, its end. Where the end leaves a doubt it is decoded: how a
    file ends is no reason to leave it out."""
    content = sample["jpg"]
    if not content:
        raise DataError("no image")
    if captioned and not captions(sample):
        raise DataError("no caption")
    with suppress(DataError):
        header = open_image(content)
        if ENDS.get(header.format, b"") in content[-1024:]:
            return
    decode(content)


def index(file, shard, captioned):
    """An open shard -> keys and rows (offset and size of each of INDEXED) of what is readable,
    (name, cause) of the rest, a digest of the former's texts. captioned: must samples have a
    caption."""
    keys = []
    rows = []
    bad = []
    texts = hashlib.sha256()
    try:
        for key, places in grouped(file):
            row = [places.get(field, NOWHERE) for field in INDEXED]
            row[0] = image_of(places) or NOWHERE
            try:
                sample = loaded(file, key, INDEXED, row)
                check(sample, captioned)
                texts.update(sample["txt"] + sample["json"])
                keys.append(key)
                rows.append(row)
            except DataError as error:
                bad.append((f"{shown(shard)} {key} ({', '.join(islice(places, 6))})", str(error)))
    except DataError as error:
        bad.append((shown(shard), str(error)))
    return keys, rows, bad, texts.hexdigest()


def lock(file):
    """Waits until this process alone has the file, up to its closing; nothing on Windows."""
    with suppress(ImportError, OSError):
        from fcntl import LOCK_EX, flock

        flock(file, LOCK_EX)


def cached(path, function):
    """What the function gives, kept as JSON at that path of the cache folder. Of several processes
    one makes it while the others wait; a cache that cannot be written costs time only."""
    path = cache_folder() / path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)
    except OSError:
        with suppress(OSError, ValueError):  # what cannot be written may still be read
            return json.loads(path.read_bytes())
        return function()
    with file:
        lock(file)
        with suppress(OSError, ValueError):  # new, or left by a process that was killed
            file.seek(0)
            return json.loads(file.read())
        found = function()
        with suppress(OSError):
            file.truncate(0)
            file.write(json.dumps(found).encode())
    return found


def index_shard(job):
    """The index of a local shard, as arrays; job: its path, captioned -> its keys, joined; their
    lengths; rows; what is of no use; the digest of its texts."""
    path, captioned = job
    about = os.stat(path)
    # Inode and time of change tell a shard that was rewritten with equal size and date.
    times = f"{about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"
    state = f"8 {os.path.abspath(path)} {about.st_size} {times} {captioned}"
    name = hashlib.sha256(os.fsencode(state)).hexdigest()
    with open(path, "rb") as file:
        found = cached(f"index/{name[:32]}.json", lambda: index(file, path, captioned))
    keys, rows, bad, texts = found
    keys = [as_bytes(key) for key in keys]
    lengths = np.array([len(key) for key in keys], dtype=np.int64)
    rows = np.array(rows, dtype=np.int64).reshape(-1, len(INDEXED), 2)
    return b"".join(keys), lengths, rows, bad, texts


# --- Loader ---------------------------------------------------------------------------------------
TOKENIZED = 200_000  # samples from which the tokenizer is learned
Batch = namedtuple("Batch", "images tokens keys")  # of a rank: uint8 (B,3,S,S), int64 (B,T), keys


class LocalShards:
    """The samples of a Loader's local shards, in an order that is a pure function of (seed, epoch).
    Over all ranks and workers every readable one (with `samples`, every chosen one) comes once an
    epoch, but for the last ones of its order: these are too few for a whole batch of all ranks. One
    that does not decode: see make_batch. Memory is about 80 bytes a sample, in arrays: a list of
    Python objects would be copied page by page into each worker, as reading one changes its count
    of references."""

    def __init__(self, loader, shards):
        self.loader = loader
        self.shards = shards
        jobs = [(shard, loader.captions) for shard in shards]
        indexes = list(in_parallel(index_shard, jobs, "indexing"))
        keys, lengths, rows, bad, texts = zip(*indexes, strict=True)
        self.bad = sum(bad, [])  # (name, cause) of what is of no use
        self.keys = b"".join(keys)
        self.ends = np.concatenate([[0], *lengths]).cumsum()  # of each key, after a zero
        self.rows = np.concatenate(rows)  # (samples, fields, 2)
        counts = [len(each) for each in rows]
        self.shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self.chosen = np.arange(len(self.rows), dtype=np.int32)
        if loader.samples:  # the first ones of an order that is always the same: sets are nested
            self.chosen = np.random.default_rng(0).permutation(self.chosen)[: loader.samples]
        self.epoch_size = len(self.chosen) // (loader.batch_size * loader.world)  # steps
        self.identity = {
            "sizes": [os.path.getsize(shard) for shard in shards],
            "keys": hashlib.sha256(self.ends.tobytes() + self.keys).hexdigest(),
            "texts": hashlib.sha256("".join(texts).encode()).hexdigest(),
        }

    def sample(self, n):
        """Sample n of the index, raw."""
        key = self.keys[self.ends[n] : self.ends[n + 1]].decode("utf-8", "surrogatepass")
        with open(self.shards[self.shard_of[n]], "rb") as file:
            return loaded(file, key, INDEXED, self.rows[n].tolist())

    def drawn(self, n, epoch):
        """Sample n of the index -> raw, the seed of its chance, its name."""
        sample = self.sample(n)
        name = f"{self.shards[self.shard_of[n]]} {sample['__key__']}"
        return sample, [self.loader.seed, epoch, n], name

    def others(self, seed):
        """Yields a hundred samples, as `drawn` gives them, for a batch of which nothing decodes;
        seed: of one of that batch."""
        rng = np.random.default_rng(seed)
        for n in rng.choice(self.chosen, 100).tolist():
            yield self.drawn(n, seed[1])

    def read(self, steps):
        """Yields for each step (they count on from epoch to epoch) three things, as Stream.read
        does: a list of what `drawn` gives; what failed, here nothing; the position, here 0."""
        loader = self.loader
        known = None  # the epoch whose order this is
        for step in steps:
            epoch, number = divmod(step, self.epoch_size)
            if epoch != known:
                order = np.random.default_rng([loader.seed, epoch]).permutation(self.chosen)
                known = epoch
            # The batch of all ranks is cut into consecutive parts, one a rank.
            first = (number * loader.world + loader.rank) * loader.batch_size
            numbers = order[first : first + loader.batch_size].tolist()
            yield [self.drawn(n, epoch) for n in numbers], [], 0


class Stream:
    """The samples of an endless sequence of shards, which are read one after another, each by one
    worker: all in an order that is new in each turn, or with `resample` drawn with replacement."""

    def __init__(self, loader, shards):
        self.loader = loader
        self.shards = shards
        self.epoch_size = len(shards)
        self.identity = {"shards": [shown(shard) for shard in shards]}

    def others(self, seed):
        """Nothing: where nothing of a batch decodes, the stream goes on with the next one."""
        return ()

    def read(self, numbers):
        """Reads the shards with these numbers. For each batch, and once more at the end of each
        shard, it yields three things:
        the batch's samples, (raw sample, seed of its chance, name) each; at the end of a shard
        none, as what is too little for a batch waits for the next shard;
        at the end of a shard (name, cause) of each sample of it that is of no use, else nothing;
        the position, which is the number of the next shard."""
        loader = self.loader
        count = len(self.shards)
        samples = []
        for number in numbers:
            turn, place = divmod(number, count)
            rng = np.random.default_rng([loader.seed, turn, loader.rank])
            order = rng.permutation(count)
            if loader.resample:
                order = rng.integers(count, size=count)
            shard = self.shards[order[place]]
            mix = np.random.default_rng([loader.seed, number, loader.rank])
            with opened(shard) as file:
                keys, rows, bad, _ = index(file, shard, loader.captions)
                for n in mix.permutation(len(keys)).tolist():
                    chance = [loader.seed, number, loader.rank, n]
                    sample = loaded(file, keys[n], INDEXED, rows[n])
                    samples.append((sample, chance, f"{shown(shard)} {keys[n]}"))
                    if len(samples) == loader.batch_size:
                        yield samples, [], number + 1
                        samples = []
            yield [], bad, number + 1


@dataclass(eq=False)
class Work(IterableDataset):
    """What torch's DataLoader runs, here or in its worker processes: each makes its part of the
    steps, or of a stream's shards."""

    loader: object
    steps: range

    def __iter__(self):
        """Yields Batch or None, (name, cause) of what failed, the position."""
        info = get_worker_info()
        steps = self.steps[info.id :: info.num_workers] if info else self.steps
        for samples, failed, position in self.loader.reader.read(steps):
            yield self.loader.make_batch(samples, failed), failed, position


@dataclass(eq=False)
class Loader:
    """Batches of a source, of local shards or a stream. Order, crops and captions drawn depend on
    seed, epoch and sample alone, of a stream also on rank and workers. `stream`: is it one (a
    pipe:, or resample); `position`: the number of the shard at which a stream goes on; `identity`:
    plain values that tell the same data again; `bad`: {cause: samples skipped; a tar that breaks
    off counts as one}. DataError where too little is usable: of local shards less than a batch,
    half of the samples or `samples`; while reading, if more than 99 and more than half are not."""

    source: str  # or a list
    batch_size: int  # of one rank
    image_size: int
    tokenizer: Tokenizer
    context: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0  # processes that make batches ahead; 0: made when asked for
    crop: float = 1.0  # least area of a random crop; 1: the test transform
    captions: bool = True  # are they needed; else tokens are SOT, EOT
    resample: bool = False  # shards are drawn with replacement, without end
    samples: int = 0  # so many of the source alone, nested; 0: all

    def __post_init__(self):
        self.position = 0
        self.bad = Counter()
        self.counted = set()  # the names of these
        self.decoded = {}  # hash of an image's bytes -> (3,S,S)
        shards = expand(self.source)
        self.stream = self.resample or any(shard.startswith("pipe:") for shard in shards)
        if self.stream:
            self.reader = Stream(self, shards)
            if self.samples or (self.world > 1 and not self.resample):
                raise DataError("a stream takes no --samples; several processes need --resample")
        else:
            self.reader = LocalShards(self, shards)
            self.count(self.reader.bad, once=False)
            found = len(self.reader.rows)
            enough = max(self.samples, len(self.reader.bad), 1)
            if found >= enough and not self.reader.epoch_size:
                raise DataError(
                    f"{self.source}: {len(self.reader.chosen)} usable samples, a batch is "
                    f"{self.batch_size * self.world}: lower --batch-size; {self.report()}"
                )
            if found < enough:
                fields = list(next(read_samples(shards[0]), {}))[1:7]
                raise DataError(
                    f"{self.source}: {found} usable samples, and {enough} are needed (half of all, "
                    f"or --samples); {self.report()}; "
                    f"the first sample has {fields}; a sample is KEY.jpg, jpeg, png or webp and "
                    "next to it, but for mae, KEY.txt or KEY.json with `caption`, no dot in KEY; "
                    "KEY.cls is no caption: docs/data.md says how to caption labelled shards; "
                    "`data.py pack` makes shards of photos"
                )
        self.identity = self.reader.identity
        # If all images together have at most 256 MiB, and none is cropped at random, they stay
        # decoded, in each process that decodes, so that later epochs need not do it again. More
        # than that would fill a worker's memory for little.
        size = 0 if self.stream else len(self.reader.chosen) * 3 * self.image_size**2
        self.keeps = 0 < size <= 1 << 28

    def __len__(self):
        """Batches an epoch, the same on every rank."""
        if self.stream:
            raise DataError(
                "a stream's number of samples is unknown: --steps alone says how long it is read"
            )
        return self.reader.epoch_size

    def epochs(self, step):
        """How often the data have been gone through after that step; a stream's by this rank."""
        return (self.position if self.stream else step) / self.reader.epoch_size

    def about(self):
        """What there is, in lines of a label and words."""
        shards = len(self.reader.shards)
        if self.stream:
            return f"data        {shards} streamed shards, which are checked as they are read"
        image = open_image(self.reader.sample(0)["jpg"])
        lines = [
            f"data        {len(self.reader.chosen):,} samples in {shards} shards, {len(self):,} "
            "batches an epoch",
            f"images      the first one has {image.width} x {image.height} pixels",
        ]
        if self.tokenizer:
            texts = islice(self.texts(), 1000)
            lengths = [len(self.tokenizer.encode(text)) + 2 for text in texts]
            lines.append(
                f"captions    {np.greater(lengths, self.context).mean():.1%} are cut at --context "
                f"{self.context}; {np.quantile(lengths, 0.99):.0f} would hold 99 %"
            )
        return "\n".join(lines)

    def count(self, failed, once=True):
        """Counts what failed, (name, cause) each, and logs the first few; if `once`, what has been
        counted before is left out."""
        for name, cause in failed:
            if once and name in self.counted:
                continue
            self.counted.add(name)
            self.bad[cause] += 1
            if self.bad.total() <= 5:
                tqdm.write(f"skipped: {name!a}: {cause}", file=sys.stderr)

    def report(self):
        """What was skipped, in one line."""
        causes = [f"{number} x {cause}" for cause, number in self.bad.most_common()]
        where = " (a shard's faults count at its end)" if self.stream else ""
        return f"skipped{where}: {', '.join(causes) or 'nothing'}"

    def texts(self):
        """Yields captions for the tokenizer: of local shards those of 200,000 samples at even
        distances, or of all; of a stream those of the first so many."""
        if self.stream:
            samples = islice(read_samples(self.reader.shards), TOKENIZED)
        else:
            count = len(self.reader.chosen)
            places = np.linspace(0, count - 1, min(count, TOKENIZED)).astype(int)
            samples = map(self.reader.sample, self.reader.chosen[places])
        for sample in samples:
            yield from captions(sample)

    def make_image(self, content, rng):
        """Image bytes -> uint8 (3,S,S), or DataError."""
        if self.crop < 1:
            return random_crop(content, self.image_size, self.crop, rng)
        if not self.keeps:
            return preprocess(decode(content), self.image_size)
        name = hashlib.sha256(content).digest()
        if name not in self.decoded:
            self.decoded[name] = preprocess(decode(content), self.image_size)
        return self.decoded[name]

    def make_samples(self, samples, failed):
        """Yields (key, caption, image) of each (raw sample, seed of its chance, name) that decodes;
        adds the others to failed, (name, cause) each."""
        for sample, seed, name in samples:
            texts = captions(sample) if self.captions else [""]
            rng = None
            # Else nothing is left to chance, and to make a generator would take as long as all else
            # for a small image that is decoded already.
            if self.crop < 1 or len(texts) > 1:
                rng = np.random.default_rng(seed)
            try:
                # The crop comes first: it is the same whether captions are drawn or not.
                image = self.make_image(sample["jpg"], rng)
            except ValueError as error:
                failed.append((name, str(error)))
                continue
            text = texts[rng.integers(len(texts))] if rng else texts[0]
            yield sample["__key__"], text, image

    def make_batch(self, samples, failed):
        """As make_samples, but -> a Batch, of full size: where a sample does not decode, another of
        them comes again. Where none does, the batch is of another sample of the data; None where
        there is no such one."""
        made = list(self.make_samples(samples, failed))
        if samples and not made:
            others = self.reader.others(samples[0][1])
            made = list(islice(self.make_samples(others, failed), 1))
        if not made:
            return None
        made = [made[n % len(made)] for n in range(self.batch_size)]
        keys, texts, images = zip(*made, strict=True)
        tokens = (self.tokenizer or Tokenizer([])).batch(texts, self.context)
        images = torch.from_numpy(np.stack(images))  # numpy starts no threads beside the model's
        return Batch(images, tokens, list(keys))

    def batches(self, start, stop=sys.maxsize):
        """Yields the Batches of steps start ... stop - 1, which count on from epoch to epoch; of a
        stream those of its shards start ... stop - 1."""
        if self.workers:
            share_folder()
        loader = DataLoader(
            Work(self, range(start, stop)),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=tuple,
            worker_init_fn=be_quiet,
            pin_memory=torch.cuda.is_available(),
        )
        lost = 0
        seen = 0
        with workers_of(loader) as results:
            for batch, failed, position in results:
                self.position = max(self.position, position)
                self.count(failed)
                lost += len(failed)
                if lost > max(99, seen):
                    raise DataError(f"most samples are of no use; {self.report()}")
                if batch:
                    seen += self.batch_size
                    yield batch

    def epoch(self, n, skip=0):
        """Yields this rank's batches of epoch n after the first `skip`, all of full size."""
        size = self.reader.epoch_size
        return self.batches(n * size + skip, (n + 1) * size)


# --- Augmentation ---------------------------------------------------------------------------------
def simclr_view(images, noise):
    """One of SimCLR's views of each image, on the batch and on its device: a square crop of 0.08 to
    1 of the area, flip, colours. images uint8 (B,3,H,W), noise (B,12) uniform in [0, 1), which
    decides all (three of the twelve are spare) -> uint8 (B,3,H,W).

    Strengths are SLIP's: brightness, contrast and saturation by up to 0.4 with p 0.8, grey with p
    0.2. Left out are its changes of hue and of the crop's aspect, and its blur; contrast is about
    middle grey, grey the mean of the colours."""
    chance = noise.T  # (12,B)
    side = (0.08 + 0.92 * chance[0]).sqrt()  # of the crop, as a share of the image's
    width = torch.where(chance[1] < 0.5, -side, side)  # a negative one flips the view
    # Where the crop's middle is: the image reaches from -1 to 1, so a crop has room for 1 - side.
    across, down = (1 - side) * (2 * chance[2:4] - 1)
    zero = torch.zeros_like(side)
    affine = torch.stack([width, zero, across, zero, side, down], dim=1).view(-1, 2, 3)
    grid = affine_grid(affine, images.shape, align_corners=False)
    # Reflection is for what lies less than half a pixel from the edge.
    pixels = grid_sample(images / 255, grid, padding_mode="reflection", align_corners=False)

    chance = chance[..., None, None, None]  # (12,B,1,1,1)
    brightness, contrast, saturation = torch.where(chance[4] < 0.8, 0.6 + 0.8 * chance[5:8], 1)
    saturation = torch.where(chance[8] < 0.2, 0, saturation)
    pixels = 0.5 + contrast * (brightness * pixels - 0.5)
    pixels = torch.lerp(pixels.mean(dim=1, keepdim=True), pixels, saturation)
    return (pixels.clamp(0, 1) * 255).round().byte()


if __name__ == "__main__":  # the commands stand in a file of their own
    from shards import main

    main()
