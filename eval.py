"""Evaluation whose numbers agree with CLIP_benchmark's and scikit-learn's: features in, numbers out.

    python eval.py zero-shot CHECKPOINT --data SET                      also retrieval, linear-probe, knn
    python eval.py zero-shot CHECKPOINT photo.jpg --labels "a dog,a cat"
    python eval.py reconstruct CHECKPOINT --data SET --out picture.png
    python eval.py suite CHECKPOINT... --data SET... --format markdown  all that applies, side by side

A SET is a folder in CLIP_benchmark's webdataset layout (test/0.tar ..., test/nshards.txt, classnames.txt),
captioned shards, or the folder of the built-in data. Images are encoded whole, in eval mode, with the model's
own pooling; rates lie in 0..1. Shapes: n images, m texts, D width, E embedding, C classes.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import textwrap
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import mae_clip

KS = (1, 5, 10)  # of recall@k
TASKS = "zero_shot", "retrieval", "linear_probe", "knn", "reconstruction"
BLOCK = 2**26  # entries of a score matrix held at once, so that memory does not grow with the test set

# --- Pure functions of features; with `each` they give every test item's hit in place of the rate --------
def as_features(x, name):
    """Array or tensor (n,D) -> float32 or float64 tensor; ValueError where it is not finite."""
    x = torch.as_tensor(x)
    x = x if x.dtype == torch.float64 else x.float()
    if x.ndim != 2 or not len(x) or not x.isfinite().all():
        raise ValueError(f"{name}: must be finite numbers (n, D) with n > 0, found shape {tuple(x.shape)}")
    return x

def as_labels(y, n, classes, name):
    """Array or tensor (n,) of indices 0 ... classes-1 -> int64 tensor; ValueError where they don't fit."""
    y = torch.as_tensor(y)
    if y.is_floating_point() or y.shape != (n,):
        raise ValueError(f"{name}: must be {n} integers, one for each row, not {list(y.shape)} {y.dtype}")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name}: must lie in 0 ... {classes - 1}, found {int(y.min())} ... {int(y.max())}")
    return y.long()

def blocks(rows, columns):
    """Slices of `rows` such that a block of rows x columns stays within BLOCK entries."""
    step = max(1, BLOCK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]

def zero_shot(image_features, class_features, labels, each=False):
    """Classification by the nearest class feature, counted as CLIP_benchmark does, ties included.
    image_features (n,E) and class_features (C,E) of unit norm, labels (n,) -> {acc1, acc5 (NaN below five
    classes), mean_per_class_recall (over the classes that occur)}; ValueError for labels that don't fit."""
    x, c = as_features(image_features, "image features"), as_features(class_features, "class features")
    y, k, parts = as_labels(labels, len(x), len(c), "labels"), 5 if len(c) >= 5 else 1, []
    if len(c) < 2:
        raise ValueError("zero-shot: one class, so there is nothing to tell apart; needs at least 2")
    for rows in blocks(len(x), len(c)):
        logits, label = 100.0 * x[rows] @ c.T, y[rows]
        # Accuracies from topk, recall from argmax, as in CLIP_benchmark: they may break ties differently.
        parts.append((logits.topk(k, dim=1).indices == label[:, None], logits.argmax(dim=1) == label))
    top, best = (torch.cat(part) for part in zip(*parts, strict=True))
    hits = {"acc1": top[:, 0], "acc5": top.any(dim=1) if k == 5 else None, "mean_per_class_recall": best}
    if each:
        return hits
    rates = {name: math.nan if hit is None else hit.sum().item() / len(x) for name, hit in hits.items()}
    count = torch.bincount(y).numpy(force=True)
    right = torch.bincount(y[best], minlength=len(count)).numpy(force=True)
    return rates | {"mean_per_class_recall": float(np.mean(right[count > 0] / count[count > 0]))}

def retrieval(image_features, text_features, image_of_text, each=False):
    """Recall@1, 5, 10 in CLIP_benchmark's meaning: image_retrieval, for each text, is its image among the
    first k; text_retrieval, for each image, is any of its texts among the first k.
    image_features (n,E), text_features (m,E), image_of_text (m,) -> {image_retrieval_recall@k, ...}."""
    images, texts = as_features(image_features, "images"), as_features(text_features, "texts")
    n, m, hits = len(images), len(texts), {}
    owner = as_labels(image_of_text, m, n, "image of text")
    if min(n, m) < max(KS):
        raise ValueError(f"retrieval: recall@{max(KS)} needs as many images and texts, found {n} and {m}")
    for side, rows in [*(("image", b) for b in blocks(m, n)), *(("text", b) for b in blocks(n, m))]:
        scores = texts[rows] @ images.T if side == "image" else (texts @ images[rows].T).T
        for k in KS:  # a topk for each k: ties at its edge fall as in CLIP_benchmark
            top = scores.topk(k, dim=1).indices
            found, own = (top, owner) if side == "image" else (owner[top], torch.arange(n).to(top))
            hit = found == own[rows, None]
            hits.setdefault(f"{side}_retrieval_recall@{k}", []).append(hit.any(dim=1))
    hits = {name: torch.cat(parts) for name, parts in hits.items()}
    return hits if each else {name: hit.float().mean().item() for name, hit in hits.items()}

def fit_linear(x, y, classes, l2, start=None, tolerance=5e-6):
    """Multinomial logistic regression: minimises mean cross-entropy + l2/2 |W|^2, the intercept free, until
    five steps of L-BFGS gain less than `tolerance` of the value.
    x (n,D), y (n,) -> weight (C,D), bias (C,); start: a pair to begin from; scikit-learn's C is 1 / (n l2).
    Nothing is standardised, but the solver works in coordinates where the Hessian at W = 0 (the features'
    covariance times 1/C - 1/C^2, plus l2) is the identity, which saves it hundreds of iterations."""
    x = as_features(x, "features")
    y = as_labels(y, len(x), classes, "labels").to(x.device)
    if classes < 2 or l2 < 0:
        raise ValueError(f"fit_linear: needs 2 classes and l2 of 0 or more, found {classes} classes, l2 {l2}")
    (n, D), mean = x.shape, x.mean(dim=0)
    x = x - mean  # changes the intercept only
    hessian = sum((rows.T @ rows).double() for rows in x.split(8192)) * (1 - 1 / classes) / classes / n
    hessian.diagonal().add_(l2 + 1e-9 * hessian.diagonal().mean() + 1e-30)
    lower = torch.linalg.cholesky(hessian)
    to_weight = torch.linalg.solve_triangular(lower, torch.eye(D).to(lower), upper=False).to(x.dtype)
    to_bias = (classes / (1 - 1 / classes)) ** 0.5
    v = x.new_zeros(classes, D + 1)  # weight = v[:, :D] @ to_weight, bias = v[:, D] * to_bias
    if start is not None:
        bias = (start[1] + start[0] @ mean) / to_bias
        v = torch.cat([(start[0].double() @ lower).to(x.dtype), bias[:, None]], dim=1)
    def objective():
        weight, bias = v[:, :D] @ to_weight, v[:, D] * to_bias
        loss, slope, bias_slope = 0.0, torch.zeros_like(weight), torch.zeros_like(bias)
        for rows, label in zip(x.split(8192), y.split(8192), strict=True):
            p = torch.addmm(bias, rows, weight.T).log_softmax(dim=1)
            loss -= p.gather(1, label[:, None]).double().sum()
            p.exp_().scatter_add_(1, label[:, None], p.new_full((len(p), 1), -1.0))
            slope.addmm_(p.T, rows)
            bias_slope += p.sum(dim=0)
        value = loss / n + l2 / 2 * weight.double().square().sum()
        slope = (slope / n + l2 * weight) @ to_weight.T
        v.grad = torch.cat([slope, (bias_slope / n * to_bias)[:, None]], dim=1)
        values.append(value.item())
        return value
    values, last = [], math.inf
    solver = torch.optim.LBFGS([v], history_size=20, tolerance_grad=0, tolerance_change=0,
                               line_search_fn="strong_wolfe")
    objective()
    solver.param_groups[0].update(lr=max(1.0, v.grad.abs().sum().item()), max_iter=1)  # begins with 1
    while min(values) < last * (1 - tolerance):
        last = min(values)
        solver.step(objective)
        solver.param_groups[0].update(lr=1.0, max_iter=5)
    weight = v[:, :D] @ to_weight
    return weight, v[:, D] * to_bias - weight @ mean

def check_split(train_x, train_y, test_x, test_y):
    """Two labelled sets of features -> their four tensors and the number of classes, or ValueError."""
    x, test_x = as_features(train_x, "train features"), as_features(test_x, "test features")
    y = as_labels(train_y, len(x), 2**31, "train labels")
    if y.min() == y.max() or x.shape[1] != test_x.shape[1]:
        raise ValueError(f"probe: needs 2 classes and one width, found {x.shape[1]} and {test_x.shape[1]}")
    return x, y, test_x, as_labels(test_y, len(test_x), int(y.max()) + 1, "test labels"), int(y.max()) + 1

def linear_probe(train_x, train_y, test_x, test_y, seed=0, each=False):
    """Logistic regression on frozen features. Its l2 is chosen on a held-out fifth of train (at most 10,000
    images), to a decade with 20,000 images to fit on, then to half of one with all others; then all of train
    is refitted, each fit started from the one before.
    x (n,D), y (n,) -> {acc1, l2, held_out_acc1}; ValueError for labels that don't fit."""
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    if len(x) < 5:
        raise ValueError(f"linear probe: needs at least 5 training images, to hold one out, found {len(x)}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
    size = min(len(x) // 5, 10_000)
    held, rest = order[:size], order[size:]
    def sweep(part, values, fit, patience):
        """Ends when `patience` values in a row are no better than the best -> (accuracy, l2, fit)."""
        best, worse = (-1.0, None, None), 0
        for l2 in values:
            fit = fit_linear(x[part], y[part], classes, l2, fit, tolerance=1e-3)
            accuracy = ((x[held] @ fit[0].T + fit[1]).argmax(dim=1) == y[held]).double().mean().item()
            best, worse = ((accuracy, l2, fit), 0) if accuracy > best[0] else (best, worse + 1)
            if worse == patience:
                break
        return best
    variance = max(x.var(dim=0).sum().item(), 1e-12)  # the grid follows the scale of x
    _, l2, fit = sweep(rest[:20_000], [variance * 10.0**-k for k in range(1, 10)], None, patience=2)
    accuracy, l2, fit = sweep(rest, [l2 * 10**0.5, l2, l2 / 10**0.5], fit, patience=1)
    weight, bias = fit_linear(x, y, classes, l2, fit)
    hits = (test_x @ weight.T + bias).argmax(dim=1) == test_y
    return hits if each else {"acc1": hits.double().mean().item(), "l2": l2, "held_out_acc1": accuracy}

def knn(train_x, train_y, test_x, test_y, k=20, temperature=0.07, each=False):
    """Vote of the k training images of largest cosine, weighted by exp(cosine / temperature) (as in DINO).
    x (n,D), y (n,) -> {acc1}; ValueError for labels that don't fit and for fewer training images than k."""
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(x):
        raise ValueError(f"k-NN: k must lie in 1 ... {len(x)}, the number of training images, found {k}")
    x, test_x, hits = F.normalize(x, dim=1), F.normalize(test_x, dim=1), []
    for rows in blocks(len(test_x), len(x) + classes):
        cosine, index = (test_x[rows] @ x.T).topk(k, dim=1)
        vote = ((cosine - cosine[:, :1]) / temperature).exp()  # less the nearest's, so that none overflows
        votes = vote.new_zeros(len(vote), classes).scatter_add_(1, y[index], vote)
        hits.append(votes.argmax(dim=1) == test_y[rows])
    return torch.cat(hits) if each else {"acc1": torch.cat(hits).double().mean().item()}

# --- Data sets and features -----------------------------------------------------------------------------
class EvalSet(NamedTuple):
    """A labelled folder with the names of its classes, or captioned shards (`classes` empty)."""
    name: str
    source: str
    classes: list = []
    templates: list = []
    unseen: list = []  # built-in data: the classes never seen in captioned training

def read_lines(path):
    """Lines of a text file, without empty ones."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

def labelled_set(folder):
    """A folder in CLIP_benchmark's layout -> EvalSet; ValueError for names or templates that won't do."""
    templates, unseen = folder / "zeroshot_classification_templates.txt", folder / "unseen.txt"
    prompts = read_lines(templates) if templates.exists() else ["a photo of a {c}."]
    classes = (folder / "classnames.txt").read_text(encoding="utf-8").strip().splitlines()
    if len(classes) < 2:
        raise ValueError(f"{folder}/classnames.txt: needs 2 classes to tell apart, found {len(classes)}")
    if not all("{c}" in prompt for prompt in prompts):
        raise ValueError(f"{templates}: every line needs {{c}}, where the class name goes")
    kept = [int(line) for line in read_lines(unseen)] if unseen.exists() else []
    return EvalSet(folder.name, str(folder), classes, prompts, kept)

def open_sets(source, structured=False):
    """A SET -> list of EvalSets; the built-in data are objects, scenes and, if `structured`, three more."""
    folder = Path(source)
    if (folder / "objects").is_dir():
        names = ("objects", "count", "position", "relation") if structured else ("objects",)
        return [*(labelled_set(folder / name) for name in names), EvalSet("scenes", f"{folder}/dev-*.tar")]
    if (folder / "classnames.txt").exists():
        return [labelled_set(folder)]
    if not folder.is_dir() and data.expand(source):  # which raises where there is no such shard
        return [EvalSet("/".join(folder.parts[-2:]), source)]
    count = folder / "test" / "nshards.txt"
    if not count.exists():
        raise ValueError(f"{folder}: has no classnames.txt or test/nshards.txt; name shards by their paths")
    return [EvalSet(folder.name, f"{folder}/test/{{0..{int(count.read_text()) - 1}}}.tar")]

def image_batches(dataset, split, size, limit=None, batch=256):
    """Decodes in threads, ahead of the model but by a bounded number of batches
    -> iterator of (uint8 (B,3,S,S), B labels or lists of captions); ValueError naming a bad sample."""
    def decode(part):
        images = []
        for key, content, target in part:
            if target == []:
                raise ValueError(f"{dataset.source}: {key} has no caption; every image needs one here")
            try:
                images.append(torch.as_tensor(data.preprocess(data.decode(content), size)))
            except Exception as error:  # whatever a damaged image raises: a test set is never made smaller
                raise ValueError(f"{dataset.source}: {key} does not decode ({error})") from error
        return torch.stack(images), [target for _, _, target in part]
    source = data.labelled(dataset.source, split) if dataset.classes else data.captioned(dataset.source)
    samples = tqdm(itertools.islice(source, limit), f"{dataset.name} {split}", leave=False, disable=None)
    ahead, workers = deque(), os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool, samples:
        samples = iter(samples)
        while part := list(itertools.islice(samples, batch)):
            ahead.append(pool.submit(decode, part))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

@torch.no_grad()
def encode_texts(model, tokenizer, texts):
    """Strings -> (m,E) unit-norm features on the CPU."""
    parts, device = [], next(model.parameters()).device
    for start in range(0, len(texts), 1024):
        tokens = tokenizer.batch(texts[start : start + 1024], model.config.context)
        parts.append(model.encode_text(torch.as_tensor(tokens).to(device)).cpu())
    return torch.cat(parts)

def class_features(model, tokenizer, classes, templates):
    """(C,E): for each class the mean of its prompts' unit-norm features, normalised again (as in CLIP)."""
    texts = [template.replace("{c}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, texts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=1)

@torch.no_grad()
def features(model, tokenizer, dataset, split="test", checkpoint=None):
    """One pass over a split -> {pooled (n,D), for probes; embedded (n,E), for matching texts; labels (n,), or
    texts (m,E) and image_of_text (m,)} on the CPU; kept in a cache, if the model's checkpoint is named."""
    path = checkpoint and cache_file(model, dataset, split, checkpoint)
    with suppress(Exception):  # no file, or a damaged one, which is written anew
        return torch.load(path, weights_only=True)
    pooled, embedded, targets, device = [], [], [], next(model.parameters()).device
    for images, target in image_batches(dataset, split, model.config.image_size):
        tokens = model.image_encoder(images.to(device))
        pooled.append(mae_clip.pool(tokens, model.config.pool).float().cpu())
        embedded.append(model.project_image(tokens).float().cpu())
        targets += target
    if not targets:
        raise ValueError(f"{dataset.source}: found no image in {split}")
    found = {"pooled": torch.cat(pooled), "embedded": torch.cat(embedded)}
    if dataset.classes:
        found["labels"] = as_labels(targets, len(targets), len(dataset.classes), f"{dataset.source}: labels")
    elif hasattr(model, "text_proj"):
        found["texts"] = encode_texts(model, tokenizer, list(itertools.chain(*targets)))
        found["image_of_text"] = torch.tensor([i for i, texts in enumerate(targets) for _ in texts])
    with suppress(OSError, RuntimeError):  # a cache that cannot be written is no error
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, path.with_suffix(f".{os.getpid()}"))
            path.with_suffix(f".{os.getpid()}").replace(path)  # whole or not at all
    return found

def cache_file(model, dataset, split, checkpoint):
    """Where features lie: named by the content of all they come from: checkpoint, files of the split and
    this program, whose transform it is. None for data that are not in files."""
    files = sorted(Path(dataset.source, split).iterdir()) if dataset.classes else data.expand(dataset.source)
    setting = split, dataset.classes, next(model.parameters()).device.type, torch.__version__
    key = hashlib.blake2b(repr(setting).encode(), digest_size=16)
    for path in map(Path, [checkpoint, data.__file__, mae_clip.__file__, __file__, *files]):
        if not path.is_file():
            return None
        key.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                key.update(chunk)
    return data.cache_folder() / "features" / f"{key.hexdigest()}.pt"

# --- Scores of a model on a set -------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def resamples(n, count=1000):
    """(count,n): how often each of n images is in each bootstrap resample, the same for every score."""
    random = np.random.default_rng(0)
    return np.stack([np.bincount(random.integers(0, n, n), minlength=n).astype("f4") for _ in range(count)])

class Score:
    """A rate or loss: the weighted mean of a value for each test image, so that images can be resampled."""
    def __init__(self, values, chance, weights=None):
        self.values, self.chance = np.asarray(values, dtype="f4"), float(chance)
        self.weights = np.ones_like(self.values) if weights is None else np.asarray(weights, dtype="f4")
    def mean(self):
        """The score itself, NaN where no image counts."""
        weights = self.weights.astype("f8")
        return float(weights @ self.values / weights.sum()) if weights.any() else math.nan
    def interval(self, other=None):
        """95 % bootstrap interval over images, of the score or its lead over another on the same images."""
        counts, lead = resamples(len(self.values)), 0.0
        for score, sign in [(self, 1), (other, -1)][: 2 if other else 1]:
            lead = lead + sign * (counts @ (score.values * score.weights)) / (counts @ score.weights)
        return tuple(np.nanpercentile(lead, [2.5, 97.5]).tolist())

def score_zero_shot(model, tokenizer, dataset, test):
    """-> {acc1, acc5, mean_per_class_recall; seen, unseen: acc1 by whether training held the class}."""
    chance, y = 1 / len(dataset.classes), test["labels"]
    classes = class_features(model, tokenizer, dataset.classes, dataset.templates)
    hits = zero_shot(test["embedded"], classes, y, each=True)
    scores = {"acc1": Score(hits["acc1"], chance)}
    if hits["acc5"] is not None:
        scores["acc5"] = Score(hits["acc5"], 5 * chance)
    scores["mean_per_class_recall"] = Score(hits["mean_per_class_recall"], chance, 1 / torch.bincount(y)[y])
    if dataset.unseen:
        unseen = torch.isin(y, torch.tensor(dataset.unseen))
        scores["seen"] = Score(hits["acc1"], chance, ~unseen)
        scores["unseen"] = Score(hits["acc1"], chance, unseen)
    return scores

def score_retrieval(test):
    """-> {image_retrieval_recall@k, text_retrieval_recall@k}; an image's texts are resampled with it."""
    owner, scores = test["image_of_text"], {}
    own = torch.bincount(owner).numpy()
    for name, hit in retrieval(test["embedded"], test["texts"], owner, each=True).items():
        k = int(name.split("@")[1])
        if name.startswith("image"):
            hit = torch.bincount(owner, weights=hit.double()).numpy() / own
            scores[name] = Score(hit, k / len(own), own)
        else:  # chance: not all of k texts are another image's
            scores[name] = Score(hit, 1 - np.mean((1 - own / len(owner)) ** k))
    return scores

@torch.no_grad()
def reconstructions(model, tokenizer, dataset, limit):
    """Yields the first `limit` images (B,3,S,S), tokens (B,T) and what the model makes of them, masks from a
    fixed seed; a labelled image's caption is its class in the first prompt."""
    c, generator, device = model.config, torch.Generator().manual_seed(0), next(model.parameters()).device
    for images, targets in image_batches(dataset, "test", c.image_size, limit):
        tokens = torch.zeros(len(images), c.context, dtype=torch.long)
        if tokenizer is not None:
            prompts = [dataset.templates[0].replace("{c}", name) for name in dataset.classes]
            texts = [prompts[target] if prompts else target[0] for target in targets]
            tokens = torch.as_tensor(tokenizer.batch(texts, c.context))
        sizes = (len(images), (c.image_size // c.patch_size) ** 2), tokens.shape
        noise = [torch.rand(size, generator=generator).to(device) for size in sizes]
        out = model.reconstruct(images.to(device), tokens.to(device), *noise)
        yield images, tokens, {name: value.cpu() for name, value in out.items()}

def score_reconstruction(model, tokenizer, dataset, limit=1000):
    """-> {image_loss (chance: predicting zero), text_accuracy of removed tokens (chance: always the most
    frequent one)}, where the model is trained for it."""
    error, zero, right, removed, truth, c = [], [], [], [], [], model.config
    for images, tokens, out in reconstructions(model, tokenizer, dataset, limit):
        patches = mae_clip.patchify(mae_clip.normalise(images), c.patch_size)
        target, mask = mae_clip.patch_targets(patches, c.norm_pix), out["image_mask"]
        for parts, guess in ((error, out["image"]), (zero, 0)):
            square = ((guess - target) ** 2).mean(dim=2) * mask
            parts.append(square.sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        right.append(((out["text"] == tokens) & out["text_mask"]).sum(dim=1))
        removed.append(out["text_mask"].sum(dim=1))
        truth.append(tokens[out["text_mask"]])
    error, zero, right, removed, truth = map(torch.cat, (error, zero, right, removed, truth))
    scores = {"image_loss": Score(error, zero.mean())} if error.any() else {}
    if len(truth):
        often = torch.bincount(truth).max() / len(truth)
        scores["text_accuracy"] = Score(right / removed.clamp(min=1), often, removed)
    return scores

def measure(model, tokenizer, dataset, tasks, checkpoint=None):
    """-> {task: {measure: Score}} for those of `tasks` that apply to the model and the set."""
    text, labelled, found = hasattr(model, "text_proj"), bool(dataset.classes), {}
    probe = labelled and Path(dataset.source, "train").is_dir() and {"linear_probe", "knn"} & set(tasks)
    match = text and ("zero_shot" if labelled else "retrieval") in tasks
    if probe or match:
        test = features(model, tokenizer, dataset, "test", checkpoint)
    if match and labelled:
        found["zero_shot"] = score_zero_shot(model, tokenizer, dataset, test)
    elif match:
        found["retrieval"] = score_retrieval(test)
    if probe:
        train = features(model, tokenizer, dataset, "train", checkpoint)
        split = train["pooled"], train["labels"], test["pooled"], test["labels"]
        if "linear_probe" in tasks:
            found["linear_probe"] = {"acc1": Score(linear_probe(*split, each=True), 1 / len(dataset.classes))}
        if "knn" in tasks:
            found["knn"] = {"acc1": Score(knn(*split, each=True), 1 / len(dataset.classes))}
    if hasattr(model, "decoder") and "reconstruction" in tasks and not (labelled and len(tasks) > 1):
        found["reconstruction"] = score_reconstruction(model, tokenizer, dataset)
    return {task: scores for task, scores in found.items() if scores}

def evaluate(model, tokenizer, eval_data, out=None, quick=False):
    """What a training run reports on SETs joined by commas: zero-shot, retrieval and, unless `quick`, linear
    probe and reconstruction, with out/reconstructions.png. Model's mode and global random state stay.
    -> {task: {measure: value or None, "chance": {measure: value}, "n": test images}}; from a task's second
    set on, the set's name follows the task's."""
    tasks = TASKS[:2] if quick else [task for task in TASKS if task != "knn"]
    results, training = {}, model.training
    model.eval()
    for dataset in [dataset for source in eval_data.split(",") for dataset in open_sets(source)]:
        for task, scores in measure(model, tokenizer, dataset, tasks).items():
            means = {name: score.mean() for name, score in scores.items()}
            entry = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
            entry["chance"] = {name: score.chance for name, score in scores.items()}
            entry["n"] = max(len(score.values) for score in scores.values())
            results[f"{task} {dataset.name}" if task in results else task] = entry
            if out and task == "reconstruction":
                draw_reconstructions(model, tokenizer, dataset, Path(out) / "reconstructions.png")
    model.train(training)
    return results

def show(value, name):
    """A rate in per cent, a loss as it is."""
    return "-" if value is None else f"{value:.3f}" if "loss" in name else f"{100 * value:.1f} %"

def format_results(results):
    """What evaluate returns, as a table for the terminal."""
    rows = [["task", "images", "measure", "value", "chance"]]
    for task, values in results.items():
        for name, chance in values["chance"].items():
            rows.append([task, f"{values['n']:,}", name, show(values[name], name), show(chance, name)])
    return format_table(rows)

def format_table(rows, markdown=False):
    """Rows of strings, the first one the header -> aligned text or a Markdown table."""
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

def suite(checkpoints, datasets, tasks, style="text", device="cpu"):
    """Every task that applies, on every set, with 95 % intervals and chance; of two checkpoints the
    difference too, image by image -> text, markdown or json. ValueError where the one task asked for does not
    apply."""
    names, found = [Path(path).parent.name for path in checkpoints], {}  # of the runs' folders
    names = names if len(set(names) - {""}) == len(names) else checkpoints
    for name, path in zip(names, checkpoints, strict=True):
        model, tokenizer, config = mae_clip.load(path, device)
        for dataset in datasets:
            results = measure(model, tokenizer, dataset, tasks, path)
            if not results and len(tasks) == 1:
                raise ValueError(f"{path}: {tasks[0]} does not apply to {config.method} on {dataset.name}: "
                                 "it needs a text tower (zero_shot, retrieval), a train folder or a decoder")
            if "zero_shot" in results:
                print(f"prompts of {dataset.name}: {'; '.join(dataset.templates)}", file=sys.stderr)
            for task, scores in results.items():
                for measured, score in scores.items():
                    found.setdefault((dataset.name, task, measured), {})[name] = score
    lead = f"{names[0]} less {names[-1]}" if len(names) == 2 else None
    rows, entries = [["set", "task", "measure", "images", "chance", *names, *([lead] if lead else [])]], []
    for key, scores in found.items():
        values = {name: (score.mean(), *score.interval()) for name, score in scores.items()}
        first, *other = scores.values()
        if lead and other:
            values[lead] = (first.mean() - other[0].mean(), *first.interval(other[0]))
        shown = {name: [show(x, key[2]) for x in value] for name, value in values.items()}
        rows.append([*key, f"{len(first.values):,}", show(first.chance, key[2])])
        rows[-1] += ["{} [{}, {}]".format(*shown[name]) if name in shown else "-" for name in rows[0][5:]]
        entries.append(dict(zip(rows[0][:3], key, strict=True), chance=first.chance, values=values))
    return json.dumps(entries, indent=1) if style == "json" else format_table(rows, style == "markdown")

# --- Pictures -------------------------------------------------------------------------------------------
def draw_reconstructions(model, tokenizer, dataset, path, count=8):
    """Writes a picture of the first `count` pairs: original, masked, reconstructed, with captions."""
    c, size = model.config, model.config.image_size
    images, tokens, out = next(reconstructions(model, tokenizer, dataset, count))
    patches = mae_clip.patchify(mae_clip.normalise(images), c.patch_size)
    hidden, rebuilt = out["image_mask"][..., None], out["image"]
    note = "[ ]: words predicted. Visible patches are the original's."
    if c.norm_pix:  # each patch is predicted less its mean, over its deviation
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        rebuilt = rebuilt * (variance + 1e-6).sqrt() + mean
        note += "\nRemoved patches are shown with their own true mean and contrast, which are not predicted."
    std, mean = (torch.tensor(x).view(3, 1, 1) for x in (mae_clip.IMAGE_STD, mae_clip.IMAGE_MEAN))
    grey = ((0.8 - mean) / std).view(3).repeat(c.patch_size**2)
    panels = []
    for x in (patches, torch.where(hidden, grey, patches), torch.where(hidden, rebuilt, patches)):
        x = mae_clip.unpatchify(x, c.patch_size, size, size) * std + mean
        panels.append((x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    side, font = size * max(1, round(160 / size)), ImageFont.load_default(13)
    rows = zip(tokens, out["text"], out["text_mask"], strict=True)
    words = [[textwrap.fill(text, side // 7) for text in caption_columns(tokenizer, *row)] for row in rows]
    height = side + 34 + 17 * max(text.count("\n") for texts in words for text in texts)
    sheet = Image.new("RGB", (6 * side + 88, 90 + height * ((len(images) + 1) // 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, column in itertools.product(range(len(images)), range(3)):
        x, y = 14 + (i % 2) * sheet.width // 2 + column * (side + 8), 36 + (i // 2) * height
        if i < 2:
            title = ("original", "masked", "reconstruction")[column]
            draw.text((x + side // 2, 20), title, "black", ImageFont.load_default(16), anchor="mm")
        panel = Image.fromarray(panels[column][i]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(panel, (x, y))
        draw.text((x, y + side + 4), words[i][column], "black", font, spacing=3)
    draw.text((14, sheet.height - 44), note, "dimgrey", font)
    sheet.save(path)

def caption_columns(tokenizer, tokens, guess, removed):
    """A caption as it is, with gaps for removed words, the predicted ones in brackets -> three strings."""
    columns = ["", "", ""]
    for token, new, gone in zip(tokens.tolist(), guess.tolist(), removed.tolist(), strict=True):
        if token > 2:  # not PAD, SOT or EOT
            piece, other = (tokenizer.decode([i]).decode("utf-8", "replace") for i in (token, new))
            gap, mark = re.sub(r"\S", "_", piece), re.sub(r"(\S+)", r"[\1]", other)
            for column, text in enumerate((piece, gap, mark) if gone else (piece,) * 3):
                columns[column] += text
    return [text.replace("][", "").strip() for text in columns]

# --- Command line ---------------------------------------------------------------------------------------
@torch.no_grad()
def classify_photo(paths, labels, device):
    """Paths of a checkpoint and a photo, labels joined by commas -> table of their probabilities."""
    classes = [label.strip() for label in labels.split(",") if label.strip()]
    if len(classes) < 2 or len(paths) != 2:
        raise ValueError("--labels: takes two labels or more, and goes with zero-shot CHECKPOINT PHOTO")
    model, tokenizer, config = mae_clip.load(paths[0], device)
    if not hasattr(model, "text_proj"):
        raise ValueError(f"{paths[0]}: method {config.method} has no text tower, which zero-shot needs")
    image = torch.as_tensor(data.preprocess(data.decode(Path(paths[1]).read_bytes()), config.image_size))
    classifier = class_features(model, tokenizer, classes, ["{c}"])
    logits = model.logit_scale.exp().cpu() * model.encode_image(image[None].to(device)).cpu() @ classifier.T
    ranked = sorted(zip(logits.softmax(dim=1)[0].tolist(), classes, strict=True), reverse=True)
    return format_table([["label", "probability"], *([name, show(p, "")] for p, name in ranked)])

def main(argv=None):
    parser = argparse.ArgumentParser("eval.py", description="Scores checkpoints of mae_clip.py.")
    names = [task.replace("_", "-").removesuffix("ion") for task in TASKS]
    parser.add_argument("command", choices=[*names, "suite"])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="zero-shot: or one, and a photo")
    parser.add_argument("--data", nargs="+", default=[], metavar="SET", help="sets to score on")
    parser.add_argument("--labels", help="for one photo: what it may show, joined by commas")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="of the table")
    parser.add_argument("--out", default="reconstructions.png", help="picture that reconstruct writes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if args.labels is not None and args.command == "zero-shot":
            print(classify_photo(args.checkpoints, args.labels, args.device))
            return 0
        whole, name = args.command == "suite", args.command.replace("-", "_")
        tasks = [task for task in TASKS if whole or task.startswith(name)]
        datasets = [dataset for source in args.data for dataset in open_sets(source, whole)]
        if not datasets:
            raise ValueError("--data: name at least one set")
        print(suite(args.checkpoints, datasets, tasks, args.format, args.device))
        if args.command == "reconstruct":
            model, tokenizer, _ = mae_clip.load(args.checkpoints[0], args.device)
            draw_reconstructions(model, tokenizer, datasets[0], args.out)
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
