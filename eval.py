"""Evaluation: features in, numbers out, counted as CLIP_benchmark and scikit-learn count them.

    python eval.py zero-shot CHECKPOINT --data SET        also retrieval, linear-probe, knn
    python eval.py zero-shot CHECKPOINT photo.jpg --labels "a dog,a cat"
    python eval.py reconstruct CHECKPOINT --data SET      a picture of what is predicted
    python eval.py suite CHECKPOINT... --data SET::SET    all that applies, side by side
    python eval.py embed CHECKPOINT --data SET --out FILE.npz     features, with their keys
    python eval.py search CHECKPOINT "a dog on a beach" --data SET     images for a sentence
    python eval.py export CHECKPOINT FILE.pt              the image tower, for timm
    python eval.py curves RUN...                          the course of training, as a chart
    python eval.py benchmark --scale base --batch-size 256    speed; takes mae_clip.py's flags
    python eval.py experiment                             does MAE help, at what amount of data?

A CHECKPOINT is a file or a run's folder, whose newest one counts. A SET is a folder in
CLIP_benchmark's layout (test/0.tar ..., test/nshards.txt, classnames.txt), captioned shards, or the
built-in data's folder; for search and embed also a plain folder of photos. Features are of unmasked
images, in eval mode, with the model's own pooling.
Rates lie in 0..1. Letters: n images, m texts, D width, E embedding, C classes, S pixels a side.
"""

import argparse
import glob
import json
import math
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import mae_clip  # before torch, as it tells torch's threads how to wait

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import pictures
from data import DataError
from machine import write_whole

BLOCK = 2**26  # entries of a score matrix that are held at once, however large the test set is


# --- Functions of features ------------------------------------------------------------------------
def as_features(values, name):
    """Array or tensor (n,D) -> float32 or float64 tensor; ValueError where it is not of that shape
    or not finite."""
    features = mae_clip.at_least_float32(torch.as_tensor(values))
    if features.ndim != 2 or len(features) == 0 or not features.isfinite().all():
        raise ValueError(
            f"{name}: must be finite numbers of shape (n, D) with n > 0, "
            f"found {tuple(features.shape)}"
        )
    return features


def as_labels(values, count, classes, name):
    """Array or tensor (n,) of indices 0 ... classes-1 -> int64; ValueError where they don't fit."""
    labels = torch.as_tensor(values)
    whole = labels.shape == (count,) and not labels.is_floating_point()
    if classes < 2 or not whole or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name}: must be {count} integers in 0 ... {classes - 1}, of two classes or more, "
            f"found {str(labels.tolist())[:60]}"
        )
    return labels.long()


def rate(hits):
    """bool (n,) -> the share that is True."""
    return hits.double().mean().item()


def zero_shot_hits(image_features, class_features, labels):
    """What zero_shot counts, for each image -> {measure: bool (n,)}."""
    images = as_features(image_features, "image features")
    classes = as_features(class_features, "class features")
    labels = as_labels(labels, len(images), len(classes), "labels")
    k = 5 if len(classes) >= 5 else 1
    hits = defaultdict(list)
    for rows in torch.arange(len(images)).split(BLOCK // len(classes) + 1):
        logits = 100.0 * images[rows] @ classes.T
        found = logits.topk(k).indices == labels[rows, None]
        # Accuracies by topk, recall by argmax, as in CLIP_benchmark: ties may fall differently.
        hits["acc1"].append(found[:, 0])
        hits["acc5"].append(found.any(dim=1))
        hits["mean_per_class_recall"].append(logits.argmax(dim=1) == labels[rows])
    return {name: torch.cat(parts) for name, parts in hits.items()}


def zero_shot(image_features, class_features, labels):
    """Classification by the nearest class feature, counted as CLIP_benchmark does, ties included.

    image_features (n,E), class_features (C,E) of unit norm, labels (n,) -> {acc1, acc5 (NaN below
    five classes), mean_per_class_recall (of the classes that occur)}; ValueError for labels that
    don't fit.
    """
    hits = zero_shot_hits(image_features, class_features, labels)
    labels = torch.as_tensor(labels)
    recalls = [rate(hits["mean_per_class_recall"][labels == label]) for label in labels.unique()]
    return {
        "acc1": rate(hits["acc1"]),
        "acc5": rate(hits["acc5"]) if len(class_features) >= 5 else math.nan,
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }


def retrieval_hits(image_features, text_features, image_of_text):
    """What retrieval counts -> {measure: bool, (m,) of image_retrieval, (n,) of text_retrieval}."""
    images = as_features(image_features, "image features")
    texts = as_features(text_features, "text features")
    n = len(images)
    m = len(texts)
    if min(n, m) < 10:
        raise ValueError(f"recall@10 needs 10 images and 10 texts, found {n} and {m}")
    owner = as_labels(image_of_text, m, n, "image of text")
    hits = defaultdict(list)
    for rows in torch.arange(m).split(BLOCK // n + 1):
        scores = texts[rows] @ images.T
        for k in (1, 5, 10):  # a topk for each: ties at its edge fall as in CLIP_benchmark
            found = scores.topk(k, dim=1).indices == owner[rows, None]
            hits[f"image_retrieval_recall@{k}"].append(found.any(dim=1))
    for rows in torch.arange(n).split(BLOCK // m + 1):
        scores = (texts @ images[rows].T).T  # the product that CLIP_benchmark makes: same rounding
        for k in (1, 5, 10):
            found = owner[scores.topk(k, dim=1).indices].cpu() == rows[:, None]
            hits[f"text_retrieval_recall@{k}"].append(found.any(dim=1))
    return {name: torch.cat(parts) for name, parts in hits.items()}


def retrieval(image_features, text_features, image_of_text):
    """Recall@k for k = 1, 5, 10 in CLIP_benchmark's meaning: image_retrieval, for each text, is its
    image among the first k; text_retrieval, for each image, is any of its texts among the first k.

    image_features (n,E), text_features (m,E), image_of_text (m,) -> {image_retrieval_recall@k,
    text_retrieval_recall@k}; ValueError below ten images or texts.
    """
    hits = retrieval_hits(image_features, text_features, image_of_text)
    return {name: rate(hit) for name, hit in hits.items()}


def descend(features, labels, weight, l2, tolerance):
    """Up to 40 steps of L-BFGS on fit_linear's objective -> the new weight and the objective there.
    features (n,D+1), a column of ones last; weight (C,D+1), the intercept last.

    Features of different scales, or correlated ones, would take many steps. So the variables are
    changed: let L L^T be the Hessian at the start (the mean of its classes' blocks). What is sought
    is U = weight @ L, over the features features @ L^-T. Their product is that of weight and
    features, and U's Hessian is near the identity.
    """
    probability = (features @ weight.T).softmax(dim=1)
    doubt = (probability * (1 - probability)).mean(dim=1, keepdim=True)
    hessian = (features.T @ (doubt * features)).double() / len(features)
    diagonal = hessian.diagonal()  # a view: hessian changes with it
    diagonal[:-1] += l2
    # Rounded, or with a feature that is constant, it may lack full rank, which Cholesky needs.
    diagonal *= 1 + 100 * torch.finfo(features.dtype).eps
    diagonal += 1e-30
    root = torch.linalg.cholesky(hessian)
    back = torch.linalg.inv(root).to(features)
    features = features @ back.T
    unknown = (weight.double() @ root).to(features).requires_grad_()  # weight = unknown @ back

    def objective():
        unknown.grad = None
        penalty = (unknown @ back)[:, :-1].square().sum()
        value = F.cross_entropy(features @ unknown.T, labels) + l2 / 2 * penalty
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(
        [unknown],
        max_iter=40,
        tolerance_grad=0,
        tolerance_change=0.1 * tolerance * objective().item(),
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)
    return unknown.detach() @ back, objective().item()


def fit_linear(x, y, classes, l2, tolerance=1e-8, enough=1e-12):
    """Multinomial logistic regression: minimises mean cross-entropy + l2/2 |W|^2, the intercept
    free, nothing standardised.

    It ends where 40 more steps of L-BFGS gain less than `tolerance` of the objective, or where the
    objective is at most `enough`: where planes separate the classes and l2 is small, it would go on
    falling towards 0.

    x (n,D), y (n,) -> weight (C,D), bias (C,). scikit-learn's C is 1/(n l2); for two classes it is
    2/(n l2), since there scikit-learn fits the difference of the two alone.
    """
    given = as_features(x, "features")
    labels = as_labels(y, len(given), classes, "labels").to(given.device)
    features = given
    if given.numel() * classes < 2**28:  # where float64 costs little
        features = given.double()
    mean = features.mean(dim=0)
    features = F.pad(features - mean, (0, 1), value=1.0)  # centred: changes the intercept alone
    weight = features.new_zeros(classes, features.shape[1])
    value = math.inf
    while value > enough:
        better, better_value = descend(features, labels, weight, l2, tolerance)
        if not better_value < (1 - tolerance) * value:
            break
        weight = better
        value = better_value
    bias = weight[:, -1] - weight[:, :-1] @ mean
    return weight[:, :-1].to(given), bias.to(given)


def check_split(train_x, train_y, test_x, test_y):
    """Two labelled sets of features -> their four tensors, and the number of classes."""
    x = as_features(train_x, "train features")
    y = as_labels(train_y, len(x), 2**31, "train labels")
    classes = int(y.max()) + 1
    test_x = as_features(test_x, "test features").to(x)
    test_y = as_labels(test_y, len(test_x), classes, "test labels, of classes that train has")
    return x, y, test_x, test_y, classes


def choose_l2(x, y, classes, seed):
    """The penalty whose fit is best on a fifth of train that is held out (10,000 images at most),
    fitted on the rest (20,000 at most): sought in steps of a factor 100, then of 10, then of the
    root of 10."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
    held_out, rest = order.tensor_split([min(max(1, len(x) // 5), 10_000)])
    part = rest[:20_000]

    def trial_of(l2):
        weight, bias = fit_linear(x[part], y[part], classes, l2, tolerance=1e-3, enough=0.01)
        logits = x[held_out] @ weight.T + bias
        accuracy = rate(logits.argmax(dim=1) == y[held_out])
        return accuracy, F.cross_entropy(logits, y[held_out]).item(), l2

    # Above the features' whole variance a penalty only shrinks the weights: the trials begin there
    # and go downwards. There are four at least, and more as long as the last one has a lower loss
    # than the one before, or an accuracy half a point above all before.
    best = trial_of(max(x.var(dim=0).sum().item(), 1e-12))
    trials = [best]
    better = True
    while better or len(trials) < 4:
        trial = trial_of(trials[-1][2] / 100)
        better = trial[0] > best[0] + 0.005 or trial[1] < trials[-1][1]
        trials.append(trial)
        best = max(trials, key=lambda trial: trial[0])  # among equals the largest penalty
    for factor in (10, 10**0.5):
        best = max(
            [trial_of(best[2] * factor), best, trial_of(best[2] / factor)],
            key=lambda trial: trial[0],
        )
    return best[2]


def linear_probe(train_x, train_y, test_x, test_y, seed=0):
    """Logistic regression on frozen features. Its penalty is chosen on a part of train that is held
    out by the seed; then all of train is fitted.

    x (n,D), y (n,) -> {acc1, l2, hits: bool, one a test image}; ValueError for labels that don't
    fit.
    """
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    l2 = choose_l2(x, y, classes, seed)
    weight, bias = fit_linear(x, y, classes, l2, tolerance=1e-4, enough=0.01)
    hits = (test_x @ weight.T + bias).argmax(dim=1) == test_y
    return {"acc1": rate(hits), "l2": l2, "hits": hits}


def knn(train_x, train_y, test_x, test_y, k=20, temperature=0.07):
    """Vote of the k training images of largest cosine, weighted by exp(cosine / temperature), as in
    DINO.

    x (n,D), y (n,) -> {acc1, hits: bool, one a test image}; ValueError for labels that don't fit
    and for fewer training images than k.
    """
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(x):
        raise ValueError(f"k = {k}: must lie from 1 to the number of training images, {len(x)}")
    x = F.normalize(x, dim=1)
    test_x = F.normalize(test_x, dim=1)
    hits = []
    for rows in torch.arange(len(test_x)).split(BLOCK // (len(x) + classes) + 1):
        cosine, index = (test_x[rows] @ x.T).topk(k, dim=1)
        # All weights of an image over its largest one: the same vote, and no overflow.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), classes).scatter_add_(1, y[index], weight)
        hits.append(votes.argmax(dim=1) == test_y[rows])
    hits = torch.cat(hits)
    return {"acc1": rate(hits), "hits": hits}


# --- Data sets ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EvalSet:
    """Captioned shards; or a labelled folder, with classes, templates with {c} for their names, and
    which classes captioned training never showed (unseen), where that is known."""

    source: str  # its folder, or its shards
    classes: tuple = ()
    templates: tuple = ()
    unseen: tuple = ()

    @property
    def name(self):
        """The source without what may be secret in a command."""
        return data.public(self.source)

    def splits(self):
        """The names of its splits: test and, of a labelled folder that has it, train."""
        trains = self.classes and Path(self.source, "train").is_dir()
        return ["test", "train"] if trains else ["test"]

    def samples(self, split):
        """Yields (key, image bytes, class or list of captions); DataError where a class has no
        name."""
        source = data.split_shards(self.source, split) if self.classes else self.source
        for key, content, target in data.whole_samples(source, labelled=bool(self.classes)):
            if self.classes and target >= len(self.classes):
                raise DataError(
                    f"{self.name}: {key}: its class is {target}, but there are 0 to "
                    f"{len(self.classes) - 1}"
                )
            yield key, content, target


def open_folder(folder):
    """A folder in CLIP_benchmark's layout, labelled or captioned, or of captioned shards none of
    which is for training -> EvalSet; else DataError."""

    def lines(name):
        path = folder / name
        text = path.read_text(encoding="utf-8-sig").strip() if path.exists() else ""
        return tuple(line.strip() for line in text.split("\n") if text)

    classes = lines("classnames.txt")
    shards = []
    if (folder / "test" / "nshards.txt").exists():
        shards = data.split_shards(folder, "test")  # which raises where it says no number
    if shards and not classes:
        return EvalSet(f"{folder}/test/{{0..{len(shards) - 1}}}.tar")
    if not classes and any(folder.glob("*.tar")) and not any(folder.glob("train*")):
        return EvalSet(f"{glob.escape(str(folder))}/*.tar")
    if len(classes) < 2:
        raise DataError(
            f"{folder}: is no test set, which needs 2 lines in classnames.txt, or captions and "
            "test/nshards.txt; or name its shards"
        )
    templates = lines("zeroshot_classification_templates.txt") or ("a photo of a {c}.",)
    for template in templates:
        if "{c}" not in template:
            raise DataError(f"{folder}: template {template!r} lacks {{c}}, the class name's place")
    unseen = tuple(int(line) for line in lines("unseen.txt"))
    return EvalSet(str(folder), classes, templates, unseen)


def open_sets(sources, structured=False):
    """SETs joined by `::` -> list of EvalSets; the built-in data are 2, or 5 if `structured`."""
    sets = []
    for source in filter(None, data.parts_of(sources)):
        folder = Path(source)
        if (folder / "objects").is_dir():  # the built-in data
            names = ["objects", "count", "position", "relation"] if structured else ["objects"]
            sets += [open_folder(folder / name) for name in names]
            sets.append(EvalSet(f"{folder}/dev-00000.tar"))
        elif folder.is_dir():
            sets.append(open_folder(folder))
        else:
            data.expand(source)  # which raises where there is no such shard
            sets.append(EvalSet(source))
    return sets


def named(function, name, content):
    """function(content), the bytes of an image; a DataError says its name too."""
    try:
        return function(content)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def check_samples(dataset, split, read):
    """What check_sets does, for a split, of which it reads each image -> number of samples, and how
    many of them have no caption."""
    count = 0
    bare = 0
    for key, content, target in dataset.samples(split):
        named(read, f"{dataset.name}: {key}", content)
        count += 1
        bare += target == []
    return count, bare


def check_sets(sources, method, whole=False):
    """DataError where a set is missing, or a header (whole: an image), class or caption of it does
    not fit; says how many images recall will leave out."""
    read = data.decode if whole else data.open_image
    for dataset in open_sets(sources):
        name = dataset.name
        for split in dataset.splits():
            count, bare = check_samples(dataset, split, read)
        if bare == count and method != "mae":
            raise DataError(
                f"{name}: no image has a caption; --method {method} is scored with captions, or "
                "with labels: these need classnames.txt beside the folders test and train"
            )
        if 0 < bare < count:
            say(f"{name}: {bare} of {count} images have no caption; recall leaves them out")
        captioned = not dataset.classes and "contrastive" in mae_clip.METHODS[method]
        if captioned and count - bare < 10:
            say(f"{name}: {count - bare} images; there will be no recall, which needs 10")


# --- Features -------------------------------------------------------------------------------------
def image_batches(dataset, split, size, limit=None, rows=256):
    """Yields (uint8 (B,3,S,S), list of B targets), B up to `rows`, decoded in threads."""
    title = f"{dataset.name[-30:]} {split}"  # the end of a long name
    samples = tqdm(dataset.samples(split), title, leave=False, disable=None)
    samples = islice(samples, limit)

    def read(sample):
        key, content, _ = sample
        return data.preprocess(named(data.decode, f"{dataset.name}: {key}", content), size)

    with ThreadPoolExecutor() as pool:
        while batch := list(islice(samples, rows)):
            images = list(pool.map(read, batch))
            yield torch.stack(images), [target for _, _, target in batch]


@torch.no_grad()
def encode_texts(model, tokenizer, texts):
    """Strings -> (m,E) unit-norm features on the CPU."""
    device = next(model.parameters()).device
    tokens = (tokenizer or data.Tokenizer([])).batch(texts, model.config.context)
    return torch.cat([model.encode_text(part.to(device)).cpu() for part in tokens.split(1024)])


def first_captions(tokenizer, captions, context):
    """Lists of captions, a list an image -> (B,T) tokens of the first of each, none where there is
    no caption."""
    texts = [(each or [""])[0] for each in captions]
    return (tokenizer or data.Tokenizer([])).batch(texts, context)


def encode_classes(model, tokenizer, classes, templates):
    """(C,E): for each class the mean of its prompts' features, normalised again (as in CLIP)."""
    texts = [template.replace("{c}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, texts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=1)


class Encoded(NamedTuple):
    """A split as a model sees it: pooled (n,D), for probes; embedded, what encode_image gives,
    (n,E), for matching texts; both float32 on the CPU; targets, n classes or lists of captions."""

    pooled: torch.Tensor
    embedded: torch.Tensor
    targets: list


@torch.no_grad()
def encode_split(model, dataset, split):
    """One pass over a split -> Encoded."""
    device = next(model.parameters()).device
    pooled = []
    embedded = []
    targets = []
    for images, part in image_batches(dataset, split, model.config.image_size):
        encoded = model.image_encoder(images.to(device))
        pooled.append(mae_clip.pool(encoded, model.config.pool))
        embedded.append(model.image_feature(encoded))
        targets += part
    return Encoded(torch.cat(pooled).cpu(), torch.cat(embedded).cpu(), targets)


def reconstructions(model, tokenizer, dataset, limit):
    """Of the first `limit` images of captioned shards their `patches` and `tokens`, and what
    MAECLIP.reconstruct makes of them, by masks of a fixed seed -> dict of tensors."""
    config = model.config
    device = next(model.parameters()).device
    parts = defaultdict(list)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for images, captions in image_batches(dataset, "test", config.image_size, limit):
            tokens = first_captions(tokenizer, captions, config.context)
            found = model.reconstruct(images.to(device), tokens.to(device))
            found["tokens"] = tokens
            found["patches"] = mae_clip.patchify(
                mae_clip.normalise_images(images), config.patch_size
            )
            for name, part in found.items():
                parts[name].append(part.cpu())
    return {name: torch.cat(part) for name, part in parts.items()}


def picture(model, tokenizer, dataset, path, count=8):
    """Draws the reconstructions of a captioned set's first images -> True."""
    found = reconstructions(model, tokenizer, dataset, count)
    pictures.draw_reconstructions(model.config, tokenizer or data.Tokenizer([]), found, path)
    say(f"the picture is {path}")
    return True


# --- Scores of a model on a set -------------------------------------------------------------------
class Score(NamedTuple):
    """A measure: the weighted mean of a value of each test image, so that images can be resampled.
    values, weights: n numbers each; chance: the measure of guessing."""

    values: np.ndarray
    weights: np.ndarray
    chance: float

    def mean(self, counts=1):
        """The measure, each image taken so often as counts (n,) says; NaN where no weight is
        left."""
        weights = counts * np.asarray(self.weights, float)
        if weights.sum() == 0:
            return math.nan
        return float(np.average(np.asarray(self.values, float), weights=weights))

    def images(self):
        """How many images it counts."""
        return int(np.count_nonzero(self.weights))

    def less(self, other):
        """The lead over another model's Score on the same images, as a Score."""
        lead = np.asarray(self.values, float) - np.asarray(other.values, float)
        return Score(lead, self.weights, 0.0)


def spread(score):
    """A Score -> (value, low, high) with the ends of its 95 % interval when test images are drawn
    anew (bootstrap)."""
    rng = np.random.default_rng(0)
    n = len(score.values)
    draws = [score.mean(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(1000)]
    return score.mean(), *np.nanpercentile(draws, [2.5, 97.5])


def score_zero_shot(model, tokenizer, dataset, encoded):
    """-> {acc1, acc5, mean_per_class_recall; seen, unseen: acc1 by whether training held the
    class}."""
    say_once(f"prompts of {dataset.name}: {'; '.join(dataset.templates)}")
    classes = encode_classes(model, tokenizer, dataset.classes, dataset.templates)
    labels = np.array(encoded("test").targets)
    hits = zero_shot_hits(encoded("test").embedded, classes, labels)
    guess = 1 / len(classes)
    everywhere = np.ones(len(labels))
    balanced = 1 / np.bincount(labels)[labels]
    unseen = np.isin(labels, dataset.unseen)
    scores = {"acc1": Score(hits["acc1"], everywhere, guess)}
    if len(classes) >= 5:
        scores["acc5"] = Score(hits["acc5"], everywhere, 5 * guess)
    scores["mean_per_class_recall"] = Score(hits["mean_per_class_recall"], balanced, guess)
    if unseen.any():
        scores["seen"] = Score(hits["acc1"], ~unseen, guess)
        scores["unseen"] = Score(hits["acc1"], unseen, guess)
    return scores


def score_retrieval(model, tokenizer, dataset, encoded):
    """-> {image_retrieval_recall@k, text_retrieval_recall@k}; an image's texts are resampled
    with it."""
    test = encoded("test")
    texts = [text for captions in test.targets for text in captions]
    if not texts:
        raise DataError("its images have no captions (labels need classnames.txt)")
    own = np.array([len(captions) for captions in test.targets])  # texts of each image
    images = test.embedded[own > 0]  # those with a caption
    if len(images) < len(own):
        say(f"{dataset.name}: {len(own) - len(images)} images have no caption, and are left out")
    own = own[own > 0]
    owner = np.repeat(np.arange(len(own)), own)
    features = encode_texts(model, tokenizer, texts)
    scores = {}
    for name, hits in retrieval_hits(images, features, owner).items():
        k = int(name.split("@")[1])
        if name.startswith("image"):
            share = np.bincount(owner, weights=hits.numpy()) / own
            scores[name] = Score(share, own, k / len(own))
        else:
            # By chance k texts are drawn without replacement: `none` is how likely each draw misses
            # the image's own, which are `own` of the texts that are left.
            left = len(texts) - np.arange(k)[:, None]  # (k,1)
            none = (1 - own / left).clip(0).prod(axis=0)  # (n,)
            scores[name] = Score(hits, np.ones(len(own)), 1 - none.mean())
    return scores


def score_probe(probe, model, tokenizer, dataset, encoded):
    """-> {acc1} of linear_probe or knn on the pooled features."""
    test = encoded("test")
    train = encoded("train")
    missing = sorted(set(test.targets) - set(train.targets))
    if missing:
        raise DataError(f"its train split has no image of {dataset.classes[missing[0]]!r}")
    hits = probe(train.pooled, train.targets, test.pooled, test.targets)["hits"]
    return {"acc1": Score(hits, np.ones(len(hits)), 1 / len(dataset.classes))}


def score_reconstruction(model, tokenizer, dataset, encoded):
    """-> {image_loss (chance: of zeros), text_accuracy of removed tokens (chance: of the most
    frequent)}."""
    found = reconstructions(model, tokenizer, dataset, limit=512)
    scores = {}
    mask = found["image_mask"]
    if mask.any():
        normalised = model.config.norm_pix
        error = mae_clip.image_error(found["image"], found["patches"], normalised)
        zeros = mae_clip.image_error(torch.zeros(1), found["patches"], normalised)
        count = mask.sum(dim=1)
        loss = (error * mask).sum(dim=1) / count
        scores["image_loss"] = Score(loss, count, zeros[mask].mean().item())
    mask = found["text_mask"]
    if mask.any():
        right = (found["text"] == found["tokens"]) & mask
        count = mask.sum(dim=1)
        accuracy = right.sum(dim=1) / count.clamp(min=1)
        frequent = torch.bincount(found["tokens"][mask]).max() / count.sum()
        scores["text_accuracy"] = Score(accuracy, count, frequent.item())
    return scores


TASKS = {  # each: model, tokenizer, dataset, function of a split -> {measure: Score}
    "zero_shot": score_zero_shot,
    "retrieval": score_retrieval,
    "linear_probe": partial(score_probe, linear_probe),
    "knn": partial(score_probe, knn),
    "reconstruction": score_reconstruction,
}


MAYBE = ("acc5", "seen", "unseen")  # measures of zero_shot that some sets leave undefined


def scoring_device(name):
    """--device -> the device. All that this file scores is in float32: no precision to measure."""
    device, _ = mae_clip.pick_device(mae_clip.Config(device=name, precision="fp32"))
    return device


def say(message):
    """One line to the user, beside the table on stdout."""
    print(f"eval.py: {data.printable(' '.join(str(message).split()))}", file=sys.stderr)


say_once = cache(say)


def attempt(what, function, *arguments):
    """What the function gives; where it fails, None and a line that says why: all else goes on."""
    try:
        return function(*arguments)
    except (ValueError, OSError, RuntimeError) as error:
        say(f"{what}: {error}")


def misfit(task, model, dataset):
    """Why a task cannot be done with a model on a set, in a sentence; empty where it can."""
    method = model.config.method
    if task in ("zero_shot", "retrieval") and "contrastive" not in model.terms:
        return f"this {method} has no contrastive loss; use linear-probe, knn or reconstruct"
    if task == "reconstruction" and not model.has_decoder:
        return f"this {method} has no reconstruction loss, so no decoder to reconstruct"
    if task in ("retrieval", "reconstruction"):
        if dataset.classes:
            return f"{dataset.name} is a labelled folder; {task} needs captioned shards"
    elif not dataset.classes:
        return f"{dataset.name} is no labelled folder, with classnames.txt, which {task} needs"
    elif task != "zero_shot" and "train" not in dataset.splits():
        return f"{dataset.name} has no train split, train/0.tar ... and train/nshards.txt"
    return ""


def measure(model, tokenizer, datasets, tasks):
    """-> {(set, task, measure): Score} of what fits and succeeds. What fails costs itself alone
    and a line; what does not fit is said where one task alone was asked for."""
    found = {}
    for dataset in datasets:
        encoded = cache(partial(encode_split, model, dataset))  # each split once
        for task in tasks:
            reason = misfit(task, model, dataset)
            if reason:
                if len(tasks) == 1:
                    say(reason)
                continue
            scores = attempt(
                f"{task} on {dataset.name}", TASKS[task], model, tokenizer, dataset, encoded
            )
            for name, score in (scores or {}).items():
                found[dataset.source, task, name] = score
    return found


def first_fitting(model, datasets, tasks):
    """-> {task: the source of the first set that fits it}, of tasks that any set fits."""
    firsts = {}
    for dataset in datasets:
        for task in tasks:
            if not misfit(task, model, dataset):
                firsts.setdefault(task, dataset.source)
    return firsts


def results_of(model, tokenizer, datasets, tasks):
    """-> {task: {measure: its value, or None where it is undefined; chance: {measure: its value};
    images: {measure: how many it counts}; n: images scored}}. Of the sets that fit a
    task, the second and all others have the title `task name-of-the-set`."""
    results = {}
    firsts = first_fitting(model, datasets, tasks)
    for (dataset, task, name), score in measure(model, tokenizer, datasets, tasks).items():
        title = task if firsts[task] == dataset else f"{task} {data.public(dataset)}"
        entry = results.setdefault(title, dict.fromkeys(MAYBE if task == "zero_shot" else ()))
        entry[name] = score.mean()
        entry.setdefault("chance", {})[name] = score.chance
        entry.setdefault("images", {})[name] = score.images()
        entry["n"] = len(score.values)
    return results


def evaluate(model, tokenizer, eval_data, out=None):
    """Scores a trained model, in eval mode from now on, on SETs joined by `::`, by all tasks that
    fit but k-NN -> what results_of gives. With a decoder it also draws reconstructions of the first
    captioned set whose images can be read, to out/reconstructions.png. What fails costs itself
    alone and a line."""
    model.eval()
    datasets = open_sets(eval_data)
    tasks = [task for task in TASKS if task != "knn"]
    results = results_of(model, tokenizer, datasets, tasks)
    for dataset in datasets:
        if out and model.has_decoder and not dataset.classes:
            path = Path(out) / "reconstructions.png"
            if attempt(str(path), picture, model, tokenizer, dataset, path):
                break
    return results


def score_run(model, tokenizer, eval_data, out, record):
    """The end of a training: scores the model, shows the table and writes it, with the entries of
    `record`, to out/results.json. Where there is nothing to score, a file that is there stays.
    DataError where there is, and all of it fails."""
    path = Path(out) / "results.json"
    results = evaluate(model, tokenizer, eval_data, out)
    if results or not path.exists():
        write_whole(path, json.dumps(results | record, indent=1))
    if results:
        print(format_results(results))
    elif first_fitting(model, open_sets(eval_data), TASKS):
        raise DataError(f"{out}: is trained and saved, but none of --eval-data could be scored")
    else:
        print(f"nothing is scored: --eval-data names no set for {model.config.method}")


# --- Tables ---------------------------------------------------------------------------------------
def show(value, measure):
    """A rate in per cent, a loss as it is; 0 without a minus, None as -."""
    if value is None:
        return "-"
    if "loss" in measure:
        return f"{round(value, 3) + 0.0:.3f}"
    return f"{round(100 * value, 1) + 0.0:.1f} %"


def format_table(rows, style="text"):
    """Rows of strings, the first one the header -> aligned text or a Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    between = " | " if style == "markdown" else "  "
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(between.join(cells).rstrip())
    return "\n".join(lines)


def format_results(results):
    """What evaluate returns, as a table for the terminal."""
    rows = [["task", "images", "measure", "value", "chance"]]
    for task, entry in results.items():
        for name, chance in entry["chance"].items():
            value = show(entry[name], name)
            images = f"{entry['images'][name]:,}"
            rows.append([task, images, name, value, show(chance, name)])
    return format_table(rows)


# --- Suite: checkpoints side by side --------------------------------------------------------------
def run_folder(checkpoint):
    """The folder of the run that a checkpoint (its file, or the folder itself) is of."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def suite(checkpoints, datasets, tasks, device="cpu", untrained=False):
    """Scores checkpoints (paths), and maybe a new model like the first one -> rows: dicts with
    set, task, measure, images, chance and values {title: what spread gives}. Of two checkpoints
    there is the lead too, image by image."""
    columns = {}  # {title: {(set, task, measure): Score}}
    loaded = [mae_clip.load(path, device) for path in checkpoints]  # first, lest a late one fail
    for path, (model, tokenizer, _) in zip(checkpoints, loaded, strict=True):
        columns[str(path)] = measure(model, tokenizer, datasets, tasks)
    compared = list(columns)
    if untrained:
        _, tokenizer, config = loaded[0]
        torch.manual_seed(config.seed)
        model = mae_clip.MAECLIP(config).to(device).eval()
        columns["untrained"] = measure(model, tokenizer, datasets, tasks)
    rows = []
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        scores = {title: column[key] for title, column in columns.items() if key in column}
        example = next(iter(scores.values()))
        # By another chance (of another image size, or tokenizer) a measure is another one.
        same = len({score.chance for score in scores.values()}) == 1
        chance = example.chance if same else None
        if same and len(compared) == 2 and scores.keys() >= set(compared):
            first, second = compared
            scores[f"{first} less {second}"] = scores[first].less(scores[second])
        row = dict(zip(("set", "task", "measure"), key, strict=True))
        row["set"] = data.public(row["set"])
        row |= {"images": example.images(), "chance": chance}
        row["values"] = {title: spread(score) for title, score in scores.items()}
        rows.append(row)
    return rows


def format_rows(rows, style):
    """Rows of suite -> json, an aligned table or a Markdown table."""
    if style == "json":
        return json.dumps(rows, indent=1)
    titles = {}
    for row in rows:
        titles |= row["values"]
    table = [["set", "task", "measure", "images", "chance", *titles]]
    for row in rows:
        name = row["measure"]
        cells = [row["set"], row["task"], name, f"{row['images']:,}", show(row["chance"], name)]
        for title in titles:
            numbers = [show(number, name) for number in row["values"].get(title, ())]
            cells.append("{} [{}, {}]".format(*numbers) if numbers else "-")
        table.append(cells)
    return format_table(table, style)


# --- Benchmark ------------------------------------------------------------------------------------
@torch.no_grad()
def forward_flops(model, batch):
    """Floating-point operations of a forward pass: 2 a multiply-add of a matrix product, nothing
    else, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        model(*batch)
    return counter.get_total_flops()


def timed(function, repeats, device):
    """Seconds a call, over so many calls."""
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - began) / repeats


def benchmark(config, steps=10):
    """Times training steps on one synthetic batch and, with config.data, the Loader alone and
    the steps that it feeds -> {figure: value}. TFLOP/s: of a step, as three forward passes;
    share: of a large matrix product's; compile s: what the first step takes longer than later
    ones."""
    device, autocast = mae_clip.pick_device(config)
    if config.data:
        loader, config = mae_clip.open_data(config, None)
    model = mae_clip.MAECLIP(config).to(device)
    mae_clip.compile_blocks(model, config, device)
    optimizers = mae_clip.make_optimizers(model, config)
    B = config.batch_size
    images = torch.randint(256, (B, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tokens = data.Tokenizer([]).batch(["a photo of a dog"] * B, config.context)
    synthetic = data.Batch(images, tokens, ())

    def step(batch=synthetic):
        inputs = mae_clip.training_batch(config, 0, batch, device)
        mae_clip.train_step(model, optimizers, autocast, inputs)

    first = timed(step, 1, device)
    timed(step, 2, device)
    groups = sorted(timed(step, steps // 5, device) for _ in range(5))
    seconds = groups[2]  # the median
    flops = forward_flops(model, mae_clip.training_batch(config, 0, synthetic, device))
    side = 2048 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if autocast._enabled else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    product = min(timed(lambda: matrix @ matrix, 1, device) for _ in range(9))
    rate_of_step = 3 * flops / seconds  # a backward pass has twice the FLOPs of the forward pass
    rate_of_product = 2 * side**3 / product
    found = {
        "method": config.method,
        "device": f"{device}, {dtype}",
        "torch": torch.__version__,
        "batch": B,
        "pairs/s": B / seconds,
        "slowest": B / groups[-1],
        "fastest": B / groups[0],
        "TFLOP/s": rate_of_step / 1e12,
        "share": rate_of_step / rate_of_product,
        "GPU memory GiB": torch.cuda.max_memory_allocated() / 2**30,
        "compile s": first - seconds,
    }
    if config.data:
        batches = loader.batches(0)
        timed(lambda: next(batches), steps, device)  # the workers' start is not timed
        found["loader pairs/s"] = B / timed(lambda: next(batches), 3 * steps, device)
        found["fed pairs/s"] = B / timed(lambda: step(next(batches)), 3 * steps, device)
    return found


# --- Command line ---------------------------------------------------------------------------------
COMMANDS = {  # its tasks, and what it does
    "zero-shot": (["zero_shot"], "classify a labelled set's images, or one photo, by their texts"),
    "retrieval": (["retrieval"], "find the images of texts and the texts of images"),
    "linear-probe": (["linear_probe"], "fit a linear classifier on frozen features"),
    "knn": (["knn"], "classify by the nearest training images"),
    "reconstruct": (["reconstruction"], "predict what is masked, and draw it"),
    "suite": (list(TASKS), "all that applies, with checkpoints side by side"),
}


ELSEWHERE = {  # the file and function of the command, and what it does
    "embed": ("tools", "embed", "write the features of images and texts"),
    "search": ("tools", "search", "show the images that match a sentence best"),
    "export": ("tools", "export", "write the image tower for timm"),
    "curves": ("tools", "curves", "draw the course of training of runs"),
    "benchmark": ("tools", "benchmark", "time training steps; takes mae_clip.py's flags"),
    "experiment": ("experiment", "run", "does masked autoencoding help, at what amount of data?"),
}


def new_parser(name, text):
    """A parser whose help shows the text as it stands."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        name, description=text, formatter_class=layout, allow_abbrev=False
    )


def make_parser():
    """The parser of the whole command line."""
    parser = new_parser("eval.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument(
            "paths", nargs="+", metavar="CHECKPOINT", help="a file or a run's folder"
        )
        command.add_argument("--data", default="", help="SETs joined by ::, see eval.py --help")
        if name == "zero-shot":
            command.add_argument("--labels", help="of a photo (CHECKPOINT PHOTO), joined by commas")
        if name == "reconstruct":
            command.add_argument("--out", help="picture (default: reconstruct.png of the run)")
        command.add_argument(
            "--untrained", action="store_true", help="score a new model, too, like the first"
        )
        command.add_argument(
            "--format",
            default="text",
            choices=("text", "markdown", "json"),
            help="of the table (default: text)",
        )
        command.add_argument(
            "--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps"
        )
    for name, (_, _, text) in ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


@torch.no_grad()
def classify_photo(paths, labels, style, device):
    """Paths of a checkpoint and a photo, labels joined by commas -> probabilities: table or
    json."""
    classes = list(filter(None, dict.fromkeys(label.strip() for label in labels.split(","))))
    if len(paths) != 2:
        raise DataError(f"--labels: is for one CHECKPOINT and one PHOTO, found {paths}")
    if len(classes) < 2:
        raise DataError(f"--labels {labels!r}: two labels or more are needed, joined by commas")
    model, tokenizer, config = mae_clip.load(paths[0], device)
    texts = encode_classes(model, tokenizer, classes, ["{c}"]).to(device)
    photo = data.preprocess(
        named(data.decode, paths[1], Path(paths[1]).read_bytes()), config.image_size
    )
    logits = model.logit_scale.exp() * model.encode_image(photo[None].to(device)) @ texts.T
    shares = dict(zip(classes, logits.softmax(dim=1)[0].tolist(), strict=True))
    if style == "json":
        return json.dumps(shares, indent=1)
    rows = [[label, show(share, "")] for label, share in shares.items()]
    return format_table([["label", "probability"], *rows], style)


def run(argv):
    """Runs a command line -> what it prints; ValueError or OSError for bad input."""
    args, flags = make_parser().parse_known_args(argv)
    if args.command in ELSEWHERE:  # imported here, since those files build on this one
        file, function, _ = ELSEWHERE[args.command]
        return getattr(import_module(file), function)(flags)
    if flags:
        raise DataError(f"{args.command} has no flag {flags[0]}; see --help")
    device = scoring_device(args.device)
    if args.command == "zero-shot" and args.labels is not None:
        if args.data:
            raise DataError("--labels are of a photo; --data has labels of its own: give one")
        return classify_photo(args.paths, args.labels, args.format, device)
    if not args.data:
        raise DataError(f"{args.command} needs --data; for one photo: zero-shot with --labels")
    datasets = open_sets(args.data, structured=args.command == "suite")
    if vars(args).get("out"):  # reconstruct alone has it
        pictures.check_folder(args.out)
        pictures.check_name(args.out)
    tasks, _ = COMMANDS[args.command]
    rows = suite(args.paths, datasets, tasks, device, args.untrained)
    if not rows:
        if args.command == "suite":
            raise DataError("no task of the suite fits these checkpoints and sets, or all failed")
        sys.exit(2)  # why has been said
    if args.command == "reconstruct":
        path = Path(args.out or run_folder(args.paths[0]) / "reconstruct.png")
        model, tokenizer, _ = mae_clip.load(args.paths[0], device)
        captioned = next(dataset for dataset in datasets if not dataset.classes)
        picture(model, tokenizer, captioned, path)
    return format_rows(rows, args.format)


def main(argv=None):
    """The command line: exit code 0 when done, 1 where a run of an experiment failed, 2 where what
    was given (or the machine) does not do, 130 when interrupted."""
    try:
        print(run(argv))
    except (ValueError, OSError, RuntimeError) as error:
        say(f"error: {data.one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
