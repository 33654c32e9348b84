"""The built-in scenes: coloured shapes with captions, drawn in seconds, so that mae_clip.py can be
tried without any data; and the labelled sets on which it is scored then.

    python data.py draw FOLDER
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from data import DataError, cache_folder
from shards import as_jpeg, build, described

COLOURS = "red green blue yellow cyan magenta teal purple black white".split()
SHAPES = {  # a star's tips, how far its dents lie from the middle (tips: 1), degrees of its turn
    "circle": (16, 1, 0),
    "triangle": (3, 0.5, 0),
    "square": (4, 0.71, 45),
    "diamond": (2, 0.5, 0),
    "star": (5, 0.4, 0),
    "sun": (9, 0.6, 0),
    "plus": (4, 0.3, 0),
    "cross": (4, 0.3, 45),
}
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
RELATIONS = {  # quarters of two objects, and the way to the other two quarters
    "left of": (0, 1, 2),
    "right of": (1, 0, 2),
    "above": (0, 2, 1),
    "below": (2, 0, 1),
}
PHRASES = (
    "a {}::a {}::one {}::there is a {}::a picture of a {}::a drawing of a {}::a {} here".split("::")
)
SETS = {  # labelled sets: the names of their classes
    "objects": CLASSES,
    "count": ["one object", "two objects", "three objects", "four objects"],
    "position": ["top left", "top right", "bottom left", "bottom right"],
    "relation": [f"a red circle {relation} a blue square" for relation in RELATIONS],
}
TEMPLATES = {  # of their captions
    "objects": "a {c}::there is a {c}::a picture of a {c}",
    "count": "{c}::a picture of {c}",
    "position": "a shape in the {c}",
    "relation": "{c}",
}
SIDE = 32  # pixels
GRID = np.linspace(-0.7, 0.7, SIDE)  # places along a side


def scene(rng, name, label, classes):
    """A scene of a labelled set or, of another name, one of one object or, a time in five, two
    -> classes of its objects, their quarters of the image, and a caption, which never names the
    place."""
    two = name == "relation" or (name not in SETS and rng.random() < 0.2)
    count = 2 if two else 1
    if name == "count":
        count = label + 1
    objects = [classes[n] for n in rng.permutation(len(classes))[:count]]
    quarters = rng.permutation(4)[:count].tolist()
    if name == "objects":
        objects = [CLASSES[label]]
    if name == "position":
        quarters = [label]
    if not two:
        colour, shape = objects[0].split()
        shorter = {6: shape, 7: f"{colour} shape"}  # twice in eight a word is not told
        words = shorter.get(int(8 * rng.random()), objects[0])
        return objects, quarters, PHRASES[rng.integers(len(PHRASES))].format(words)
    if name == "relation":  # always these two: only the relation tells the classes apart
        objects = ["red circle", "blue square"]
    relation = list(RELATIONS)[label]
    first, second, way = RELATIONS[relation]
    shift = rng.integers(2) * way
    quarters = [first + shift, second + shift]
    return objects, quarters, f"a {objects[0]} {relation} a {objects[1]}"


def render(rng, objects, quarters):
    """Objects, each in its quarter, on a shaded background of middling colours, with noise -> JPEG
    bytes."""
    first, last = rng.uniform(70, 185, (2, 3, 1, 1))  # colours
    angle = rng.uniform(0, 2 * math.pi)
    ramp = 0.5 + GRID * math.cos(angle) + GRID[:, None] * math.sin(angle)
    ramp = ramp.clip(0, 1)
    planes = first * ramp + last * (1 - ramp)  # (3, SIDE, SIDE): numpy is faster along SIDE than 3
    image = Image.fromarray(planes.astype(np.uint8).transpose(1, 2, 0))
    # Drawn three times as large, so that edges come out smooth.
    image = image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST)
    half = SIDE / 2
    for name, quarter in zip(objects, quarters, strict=True):
        colour, shape = name.split()
        tips, dent, turn = SHAPES[shape]
        radius = rng.uniform(5, 8)
        x, y = rng.uniform(radius, half - radius, 2)
        x += quarter % 2 * half
        y += quarter // 2 * half
        angle = np.arange(2 * tips) * np.pi / tips + np.radians(turn) + rng.uniform(-0.2, 0.2)
        reach = radius * np.tile([1, dent], tips)
        points = np.stack([x + reach * np.sin(angle), y - reach * np.cos(angle)], axis=1)
        ImageDraw.Draw(image).polygon((3 * points).ravel().tolist(), fill=colour)
    pixels = np.asarray(image.reduce(3)) * rng.uniform(0.8, 1.1)
    pixels += rng.uniform(2, 12) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return as_jpeg(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def unseen(seed):
    """Classes that captioned training never shows: each shape in one colour, no colour twice."""
    colours = np.random.default_rng([seed, 1]).permutation(len(COLOURS))[: len(SHAPES)].tolist()
    return sorted(colour * len(SHAPES) + shape for shape, colour in enumerate(colours))


def drawn(kind, numbers, seed):
    """Yields the samples of a kind, such as train or objects-test, with these numbers."""
    name = kind.split("-")[0]
    hidden = unseen(seed)
    classes = [each for n, each in enumerate(CLASSES) if n not in hidden]
    for number in numbers:
        rng = np.random.default_rng([seed, *kind.encode(), number])
        if name in SETS:
            label = number % len(SETS[name])
        else:
            label = int(rng.integers(4))
        objects, quarters, text = scene(rng, name, label, classes)
        fields = {"jpg": render(rng, objects, quarters)}
        if name in SETS:
            fields["cls"] = str(label)
        else:
            fields["txt"] = text
        yield f"{kind}-{number:06d}", fields


def draw(folder, scenes=40_000, seed=0):
    """Draws the built-in data, the same for a seed, into a new folder.

    These are captioned shards train-* and dev-*, labelled sets in CLIP_benchmark's layout, and
    objects/unseen.txt, the classes that training never shows.

    folder       new folder
    --scenes     captioned scenes for training
    --seed       of all that is drawn
    """
    if scenes < 1:
        raise DataError(f"--scenes {scenes}: must be at least 1")
    few = scenes // 4
    size = min(2500, math.ceil(scenes / 4))
    jobs = []
    for first in range(0, scenes, size):
        numbers = range(scenes)[first : first + size]
        jobs.append((f"train-{first // size:05d}.tar", drawn, "train", numbers, seed))
    jobs.append(("dev-00000.tar", drawn, "dev", range(few)[:1000], seed))
    texts = {"objects/unseen.txt": [str(label) for label in unseen(seed)]}
    for name, classes in SETS.items():
        numbers = range(few)[: 2000 if name == "objects" else 600]
        for split in ("train", "test"):
            jobs.append((f"{name}/{split}/0.tar", drawn, f"{name}-{split}", numbers, seed))
        shards = {"train": 1, "test": 1}
        texts |= described(classes, TEMPLATES[name].split("::"), shards, f"{name}/")
    build(folder, texts, jobs)


def builtin(scenes, seed):
    """The path of the built-in data's folder in the cache, as text; drawn where it is missing."""
    folder = cache_folder() / f"scenes-2-{scenes}-{seed}"
    try:
        if not folder.exists():
            draw(folder, scenes, seed)
    except (DataError, OSError):  # another process was faster
        if not folder.exists():
            raise
    return str(folder)
