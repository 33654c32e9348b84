"""What training asks of the machine and of other processes: device and precision, the allocator,
signals, one run a folder, ranks that agree, flags that do not fit; and what it says before it
begins."""

import argparse
import ctypes
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import timeit
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from data import STOPPING, DataError, as_bytes, one_line, public

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# --- The device -----------------------------------------------------------------------------------
@cache
def bf16_speedup(width):
    """Of a matrix product of that width on this CPU: the time in float32 over that in bfloat16."""

    def seconds(x):
        return timeit.timeit(lambda: x @ x.T, number=1)

    x = torch.ones(1024, width)
    # By turns, and of each the least: other programs may be running.
    rounds = [(seconds(x), seconds(x.bfloat16())) for _ in range(8)]
    full, half = map(min, zip(*rounds, strict=True))
    return full / half


def keep_memory():
    """Makes glibc keep freed memory, which the next step would have to fault in again; not blocks
    above 32 MiB."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its maximum of 32 MiB
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def pick_device(config):
    """-> the device of this process and the autocast for its forward passes. From now on glibc
    keeps freed memory, and new CUDA memory lies on that device."""
    keep_memory()
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # mps has never been tried
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        there = torch.ones(1, device=name)
        there.cpu()  # raises where there is no such device, or none that computes
        device = there.device
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            f"--device {name}: not to be had here, as cpu is ({one_line(error):.90})"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = config.precision == "bf16"
    if config.precision == "auto":
        bf16 = device.type == "cuda"
        if device.type == "cpu":
            bf16 = bf16_speedup(config.width) > 1.2  # since casts cost time, too
    return device, torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


# --- Signals --------------------------------------------------------------------------------------
class Interrupted(BaseException):
    """A signal came between two steps, while a run waited for data or was being scored. Not an
    Exception: where an image is decoded, that would mean that it is damaged."""


class Signals:
    """Inside `with Signals() as signals`, Ctrl-C, kill and a closed terminal (which Windows does
    not tell) set signals.came, which is 0 before, to their number; the run ends when it has saved.
    In the last step that is too late: the run is done. A signal that has come before ends the
    program at once."""

    def __init__(self):
        self.seen = set()
        self.waiting = False
        self.alone = ranks()[1] == 1
        self.previous = {}

    @property
    def came(self):
        """The largest number of the signals that came, 0 where none did."""
        return max(self.seen, default=0)

    def __enter__(self):
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self.previous[number] = signal.signal(number, self.handle)
        if hasattr(signal, "SIGALRM"):
            self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.late)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """Called by Python between two operations of the main thread."""
        # One Ctrl-C under torchrun is two signals: the terminal's SIGINT and torchrun's SIGTERM.
        if number in self.seen:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.seen.add(number)
        self.hurry()

    def hurry(self):
        """Ends what is going on between two steps, if anything is. Several processes stop together,
        before the same step: of these one ends alone only where this takes long."""
        if self.waiting and self.alone:
            raise Interrupted
        if self.waiting:
            signal.alarm(5)

    def late(self, *_):
        """Five seconds after `hurry`."""
        if self.waiting:
            print("still waiting or scoring 5 s after the signal; rank 0 saves", file=sys.stderr)
            sys.exit(128 + self.came)

    @contextmanager
    def heeded(self):
        """For what may take long between two steps: inside, a signal may end it (see `hurry`)."""
        self.waiting = True
        try:
            if self.came:
                self.hurry()
            yield
        finally:
            self.waiting = False
            if hasattr(signal, "alarm"):
                signal.alarm(0)  # the next wait sets it anew

    @contextmanager
    def interruptible(self):
        """`heeded`, for the wait for data: inside, the death of a worker raises DataError. Outside
        it is not noticed: PyTorch's own handler would raise in the middle of a step. A worker may
        die of a signal that this process got, too: then nothing is raised, as the run stops before
        it would need the data (unless the last step was lost, see `fit`)."""
        try:
            with self.heeded():
                yield
        except (RuntimeError, EOFError, ConnectionError) as error:
            if not self.came:
                raise DataError(f"a worker that loads data failed: {one_line(error)}") from None
        finally:
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# --- Ranks ----------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """One for which a wrong flag is a ValueError: so it ends a run as any other bad input does, and
    stands in torchrun's report."""

    def error(self, message):
        """Called where an argument does not fit."""
        raise ValueError(f"{message} (--help lists the flags)")


def say_last(line):
    """The line that a program ends with, on stderr. torchrun prints a report after it, in which the
    line then stands, too."""
    with suppress(OSError):  # of a terminal that was closed
        print(line, file=sys.stderr)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # of this form; the time decides which rank's line comes last, as the first failure
        about = {"timestamp": str(int(time.time())), "py_callstack": line}
        content = {"message": {"message": line, "extraInfo": about}}
        Path(report).write_text(json.dumps(content))


def ranks():
    """-> (rank of this process, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


STARTER = os.getppid()  # torchrun, in a run of several processes


@contextmanager
def process_group():
    """Inside `with`, the processes that torchrun started are one group. They end with torchrun, on
    Linux also when it is killed: those that train save before. DataError in place of the error by
    which this process learns that another has failed, and of one for want of memory."""
    if "WORLD_SIZE" in os.environ:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            # It may have been killed before: then another process is the parent, mostly init.
            init = os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
            if init or os.getppid() != STARTER:
                sys.exit(143)
        try:
            dist.init_process_group(timeout=timedelta(minutes=5))
        except RuntimeError as error:
            raise DataError(
                f"not all processes of this run came within 5 minutes ({one_line(error):.90})"
            ) from None
        # From now on a long time to wait, as rank 0 scores alone. A rank that fails is noticed.
        dist.distributed_c10d._set_pg_timeout(timedelta(days=1))
    try:
        yield
    except RuntimeError as error:
        if "allocate" in str(error):  # which torch says of a GPU's memory and of a CPU's
            raise DataError(
                f"out of memory: raise --accumulate, or lower --batch-size ({one_line(error):.90})"
            ) from None
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise DataError(
            "another process of this run has ended too early: see what it said last"
        ) from None
    if "WORLD_SIZE" in os.environ:
        end_group()


def end_group():
    """Ends the group of processes."""
    # Meanwhile its threads let go of their tensors: for these they need the interpreter, which
    # destroy_process_group keeps from them in torch 2.6, so both would wait for ever.
    time.sleep(0.1)
    dist.destroy_process_group()


def leave(code):
    """Ends the program; at once, where it is one of several processes. To take down a group that
    has not come to its end may abort (in torch 2.6)."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def from_first(function, *arguments):
    """What the function gives on rank 0, on all ranks; its OSError or ValueError, too."""
    box = [None]
    rank, world = ranks()
    if rank == 0:
        try:
            box = [function(*arguments)]
        except (OSError, ValueError) as error:
            box = [error]
    if world > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def agree(facts):
    """{name: value}, the same on all ranks; else a DataError on each, which names the rank and
    what differs there."""
    _, world = ranks()
    everywhere = [facts]
    if world > 1:
        everywhere = [None] * world
        dist.all_gather_object(everywhere, facts)
    for rank, there in enumerate(everywhere):
        for name, value in there.items():
            first = everywhere[0][name]
            if value != first:
                raise DataError(f"rank {rank}: {difference(name, value, first)}")


def difference(name, value, first):
    """In words, where a value differs from rank 0's."""
    # The first part that differs, as far down as there are parts.
    while isinstance(value, (dict, list)) and type(value) is type(first):
        if len(value) != len(first):
            return f"{name} has {len(value)} parts, but {len(first)} on rank 0"
        if isinstance(value, list):
            value = dict(enumerate(value))
            first = dict(enumerate(first))
        part = next(part for part in value if value[part] != first.get(part))
        name = f"{name}[{part}]"
        value = value[part]
        first = first.get(part)
    return f"{name} is {str(value):.60}, but {str(first):.60} on rank 0"


# --- Words ----------------------------------------------------------------------------------------
def announce(run, device, autocast, rate):
    """Says, before training, what will happen; rate: the first step's learning rate."""
    config = run.config
    precision = "bf16" if autocast._enabled else "fp32"
    if device.type == "cpu":
        precision += f" (products in bf16 run at {bf16_speedup(config.width):.2f} x fp32 here)"
    warmup = f"warm-up to {config.warmup:,}"
    if config.warmup >= config.steps:
        warmup = "all of them warm-up"
    print(
        f"method      {config.method}, {sum(each.numel() for each in run.model.parameters()):,} "
        f"parameters, images at {config.image_size} px\n"
        f"loss        weights {config.weights()}\n"
        f"{run.loader.about()}\n"
        f"device      {device}, {ranks()[1]} process(es), {precision}\n"
        f"steps       {run.step:,} to {config.steps:,}, {warmup}; "
        f"learning rate now {rate:.2g}"
    )
    if "contrastive" in config.weights():
        print(f"chance      a contrastive loss of {math.log(config.batch_size):.3f}")


# --- Files ----------------------------------------------------------------------------------------
def plain(config):
    """A Config as plain values, as files keep it: without what may be secret in commands."""
    values = asdict(config)
    return values | {name: public(values[name]) for name in ("data", "eval_data")}


def write_record(run, record):
    """Adds a line to the run's log; on rank 0 alone."""
    if ranks()[0] == 0:
        line = json.dumps(record) + "\n"
        run.logged += line
        path = Path(run.config.out, "log.jsonl")
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError as error:
            raise unwritten(path, error) from None


def unwritten(path, error):
    """-> an OSError that says which file could not be written, and how full its disk is."""
    while isinstance(error, RuntimeError) and error.__context__:  # torch's own hides the cause
        error = error.__context__
    free = shutil.disk_usage(Path(path).parent).free >> 20
    return OSError(f"{path}: could not be written, with {free} MiB free there ({one_line(error)})")


@contextmanager
def whole_file(path, part):
    """Inside `with`, a new file, open for bytes, that takes its name when it is whole and on the
    disk; until then it has the name `part`. If anything fails it is gone; OSError, which names the
    file, where writing does. A link, such as /dev/stdout, is written through, and what is no plain
    file, such as /dev/null, directly."""
    path = Path(path)
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no such folder")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with open(path, "wb") as file:
            yield file
        return
    part = path.with_name(part)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise unwritten(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def save_whole(state, path):
    """torch.save, whole or not at all."""
    # The next checkpoint takes the place of a part that was left behind.
    with whole_file(path, "checkpoint.part") as file:
        torch.save(state, file)


def load_whole(path):
    """What save_whole wrote, on the CPU; an error where a byte of its contents is
    another now."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # torch.load does not look at the checksums
    if damaged:
        raise ValueError(f"{damaged} in it is not as it was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_whole(path, content):
    """Writes text or bytes, whole or not at all."""
    with whole_file(path, f"{Path(path).name}.part") as file:
        file.write(as_bytes(content))


def checkpoints(out):
    """The checkpoints of a run's folder, newest first; none where `out` is a file."""
    found = Path(out).glob("checkpoint-*.pt")
    found = [path for path in found if path.stem.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: -int(path.stem.split("-")[1]))


@contextmanager
def usable(path):
    """Inside `with`, a DataError in place of any error: a damaged checkpoint raises nearly
    anything, and so does one with a setting that this version lacks, or of another model."""
    try:
        yield
    except Exception as error:
        if not Path(path).exists():
            raise DataError(f"{path}: there is no such file or folder") from None
        if Path(path).is_dir():
            raise DataError(
                f"{path}: holds no checkpoint-STEP.pt, as a run's folder does"
            ) from None
        raise DataError(
            f"{path}: is no checkpoint that this version can use ({error!r:.90}). If another "
            "version wrote it, use that one; if it is a run's newest and damaged, remove it: "
            "--resume goes on from the one before"
        ) from None


# --- One run a folder -----------------------------------------------------------------------------
def lock_file(path, wait=False):
    """Opens a file and takes its lock, which lasts until all that hold the file open have ended
    -> the file; None where another program has the lock and `wait` is not set."""
    file = open(path, "a+")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a file system without locks
            pass
    return file


@contextmanager
def own_folder(folder):
    """Makes a run's folder and, inside `with`, keeps other programs out of it; DataError, which
    says who is in it, where it is taken."""
    held = []

    def take():
        if not folder:
            raise DataError("--out: names no folder")
        path = Path(folder, ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"--out {folder}: is no folder, and none can be made ({one_line(error)})"
            ) from None
        file = lock_file(path)
        if file is None:
            raise DataError(f"{folder}: is being trained in by {path.read_text().strip()}")
        held.append(file)
        file.truncate(0)
        try:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:
            raise OSError(f"{path}: could not be written ({one_line(error)})") from None

    from_first(take)
    try:
        yield
    finally:
        for file in held:
            file.close()
