"""Evaluation whose numbers agree with CLIP_benchmark's and scikit-learn's: features in, numbers out.

    python eval.py zero-shot CHECKPOINT --data SET                 also retrieval, linear-probe, knn
    python eval.py zero-shot CHECKPOINT photo.jpg --labels "a dog,a cat"
    python eval.py reconstruct CHECKPOINT --data SET --out picture.png
    python eval.py suite CHECKPOINT... --data SET... --untrained   all that applies, side by side

A SET is a folder in CLIP_benchmark's webdataset layout (test/0.tar ..., test/nshards.txt, classnames.txt),
captioned shards, or the folder of the built-in data. Images are encoded whole, in eval mode, with the model's
own pooling; rates lie in 0..1. Shapes: n images, m texts, D width, E embedding, C classes.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import mae_clip

TASKS = "zero_shot", "retrieval", "linear_probe", "knn", "reconstruction"
BLOCK = 2**27  # entries of a score matrix held at once, so that memory does not grow with the test set
SMALL = 2**28  # features x classes up to which logistic regression is computed in float64
INCIDENTAL = "seed out resume device compile log_every save_every stop_after workers".split()

# --- Pure functions of features; with `each` they give every test item's hit in place of the rate ---------
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
    if classes < 2:
        raise ValueError(f"{name}: one class, so there is nothing to tell apart; needs at least 2")
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
    for rows in blocks(len(x), len(c)):
        logits, label = 100.0 * x[rows] @ c.T, y[rows, None]
        # Accuracies from topk, recall from argmax, as in CLIP_benchmark: they may break ties differently.
        parts.append(torch.cat([logits.topk(k).indices, logits.argmax(dim=1, keepdim=True)], dim=1) == label)
    hit = torch.cat(parts)
    hits = {"acc1": hit[:, 0], "acc5": hit[:, :k].any(dim=1), "mean_per_class_recall": hit[:, k]}
    if each:
        return hits
    count, right = (torch.bincount(labels, minlength=len(c)) for labels in (y, y[hit[:, k]]))
    acc1, acc5 = (hits[name].sum().item() / len(x) for name in ("acc1", "acc5"))
    recall = (right / count.double())[count > 0].mean().item()
    return {"acc1": acc1, "acc5": acc5 if k == 5 else math.nan, "mean_per_class_recall": recall}

def retrieval(image_features, text_features, image_of_text, each=False):
    """Recall@1, 5, 10 in CLIP_benchmark's meaning: image_retrieval, for each text, is its image among the
    first k; text_retrieval, for each image, is any of its texts among the first k.
    image_features (n,E), text_features (m,E), image_of_text (m,) -> {image_retrieval_recall@k, ...}."""
    images, texts = as_features(image_features, "images"), as_features(text_features, "texts")
    n, m, hits = len(images), len(texts), {}
    if min(n, m) < 10:
        raise ValueError(f"retrieval: recall@10 needs as many images and texts, found {n} and {m}")
    owner, number = as_labels(image_of_text, m, n, "image of text"), torch.arange(n, device=images.device)
    for side, rows in [*(("image", b) for b in blocks(m, n)), *(("text", b) for b in blocks(n, m))]:
        scores = texts[rows] @ images.T if side == "image" else (texts @ images[rows].T).T
        for k in (1, 5, 10):  # a topk for each: ties at its edge fall as in CLIP_benchmark
            top = scores.topk(k, dim=1).indices
            hit = top == owner[rows, None] if side == "image" else owner[top] == number[rows, None]
            hits.setdefault(f"{side}_retrieval_recall@{k}", []).append(hit.any(dim=1))
    hits = {name: torch.cat(parts) for name, parts in hits.items()}
    return hits if each else {name: hit.float().mean().item() for name, hit in hits.items()}

@torch.enable_grad()
def fit_linear(x, y, classes, l2, start=None, tolerance=1e-7, evaluations=math.inf):
    """Multinomial logistic regression: minimises mean cross-entropy + l2/2 |W|^2, the intercept free, until
    five steps of L-BFGS gain less than `tolerance` of the value, or `evaluations` are spent.
    x (n,D), y (n,) -> weight (C,D), bias (C,); start: a pair to begin from; scikit-learn's C is 1 / (n l2).
    Nothing is standardised, but the solver works in coordinates where the Hessian at W = 0 (the features'
    covariance times 1/C - 1/C^2, plus l2) is the identity, which saves it hundreds of iterations."""
    given = as_features(x, "features")
    y = as_labels(y, len(given), classes, "labels").to(given.device)
    if not l2 >= 0:
        raise ValueError(f"fit_linear: l2 must be 0 or more, found {l2}")
    x = given.double() if given.numel() * classes < SMALL else given  # float32 would end too early
    (n, D), mean = x.shape, x.mean(dim=0)
    x = x - mean  # changes the intercept only
    hessian = sum((rows.T @ rows).double() for rows in x.split(8192)) * (1 - 1 / classes) / classes / n
    hessian.diagonal().mul_(1 + 100 * torch.finfo(x.dtype).eps).add_(l2 + 1e-30)  # full rank, at any scale
    lower, to_bias = torch.linalg.cholesky(hessian), (classes / (1 - 1 / classes)) ** 0.5
    to_weight = torch.linalg.solve_triangular(lower, torch.eye(D).to(lower), upper=False).to(x)
    v = x.new_zeros(classes, D + 1)  # weight = v[:, :D] @ to_weight, bias = v[:, D] * to_bias
    if start is not None:
        weight, bias = (part.to(hessian) for part in start)
        v = torch.cat([weight @ lower, ((bias + weight @ mean.to(hessian)) / to_bias)[:, None]], dim=1).to(x)
    def objective():
        weight, bias, v.grad, value = v[:, :D] @ to_weight, v[:, D] * to_bias, None, 0.0
        for rows, label in zip(x.split(8192), y.split(8192), strict=True):  # so that memory stays small
            loss = F.cross_entropy(torch.addmm(bias, rows, weight.T), label, reduction="sum")
            loss = loss / n + l2 / 2 * len(rows) / n * weight.square().sum()
            loss.backward(retain_graph=True)
            value += loss.item()
        values.append(value)
        return value
    values, last = [], math.inf
    solver = torch.optim.LBFGS([v.requires_grad_()], history_size=20, tolerance_grad=0, tolerance_change=0,
                               line_search_fn="strong_wolfe")
    objective()
    solver.param_groups[0].update(lr=max(1.0, v.grad.abs().sum().item()), max_iter=1)  # begins with 1
    while 1e-9 < min(values) < last * (1 - tolerance) and len(values) < evaluations:  # l2 may be 0
        last = min(values)
        solver.step(objective)
        solver.param_groups[0].update(lr=1.0, max_iter=5)
    v = v.detach()
    weight = v[:, :D] @ to_weight
    return weight.to(given), (v[:, D] * to_bias - weight @ mean).to(given)

def check_split(train_x, train_y, test_x, test_y):
    """Two labelled sets of features -> their four tensors and the number of classes, or ValueError."""
    x, test_x = as_features(train_x, "train features"), as_features(test_x, "test features")
    y = as_labels(train_y, len(x), 2**31, "train labels")
    classes = int(y.max()) + 1
    if y.min() == y.max() or x.shape[1] != test_x.shape[1]:
        raise ValueError(f"probe: needs 2 classes and one width, found {x.shape[1]} and {test_x.shape[1]}")
    return x, y, test_x, as_labels(test_y, len(test_x), classes, "test labels"), classes

def linear_probe(train_x, train_y, test_x, test_y, seed=0, each=False):
    """Logistic regression on frozen features. Its l2 is chosen on a held-out fifth of train (at most 10,000
    images), to a decade with 20,000 images to fit on, then to half of one with 40,000; then all of train is
    refitted. x (n,D), y (n,) -> {acc1, l2, held_out_acc1}; ValueError for labels that don't fit."""
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
    size, variance = min(max(1, len(x) // 5), 10_000), max(x.var(dim=0).sum().item(), 1e-12)
    held, rest = order[:size], order[size:]
    l2, fit = variance, None
    for count, steps in ((20_000, range(-1, -10, -1)), (40_000, (0.5, 0, -0.5))):
        tried, part, middle = [], rest[:count], l2
        for step in steps:  # each fit starts from the last
            fit = fit_linear(x[part], y[part], classes, middle * 10.0**step, fit, 1e-3, evaluations=25)
            hits = (x[held] @ fit[0].T + fit[1]).argmax(dim=1) == y[held]
            tried.append((hits.double().mean().item(), middle * 10.0**step, fit))
        accuracy, l2, fit = max(tried, key=lambda trial: trial[0])  # among equals the largest l2
    weight, bias = fit_linear(x, y, classes, l2, fit, tolerance=2e-5)
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

# --- Data sets and features -------------------------------------------------------------------------------
class EvalSet(NamedTuple):
    """A folder in CLIP_benchmark's layout or shards; labelled where there are names of classes."""
    name: str
    source: str
    classes: list = []
    templates: list = []
    unseen: list = []  # built-in data: the classes never seen in captioned training

def open_sets(source, structured=False):
    """A SET -> list of EvalSets; the built-in data are objects, scenes and, if `structured`, three more.
    ValueError for class names or templates that won't do."""
    folder = Path(source)
    if (folder / "objects").is_dir():
        names = ("objects", "count", "position", "relation") if structured else ("objects",)
        return [*(open_sets(folder / name)[0] for name in names), EvalSet("scenes", f"{folder}/dev-*.tar")]
    if not folder.is_dir():
        data.expand(source)  # which raises where there is no such shard
        return [EvalSet("/".join(folder.parts[-2:]), source)]
    def lines(name, default=""):
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else default
        return [line.strip() for line in text.rstrip().splitlines()]
    classes, unseen = lines("classnames.txt"), [int(line) for line in lines("unseen.txt")]
    templates = lines("zeroshot_classification_templates.txt", "a photo of a {c}.")
    if len(classes) == 1 or not (classes or (folder / "test" / "nshards.txt").exists()):
        raise ValueError(f"{folder}: needs two lines in classnames.txt, or test/nshards.txt and captions; "
                         "python data.py pack turns class folders into a set, loose shards go by their paths")
    if not templates or not all("{c}" in template for template in templates):
        raise ValueError(f"{folder}: every line of its templates needs {{c}}, where the class name goes")
    return [EvalSet(folder.name, str(folder), classes, templates, unseen)]

def shards_of(dataset, split):
    """The shards of a split; of a folder all that nshards.txt announces. ValueError where one is missing."""
    if not Path(dataset.source).is_dir():
        return data.expand(dataset.source)
    count = Path(dataset.source, split, "nshards.txt")
    if not count.is_file() or not re.fullmatch(r"\s*[1-9]\d*\s*", count.read_text()):
        raise ValueError(f"{count}: must hold the number of shards, lest a test set shrink unseen")
    return data.expand("::".join(str(count.with_name(f"{n}.tar")) for n in range(int(count.read_text()))))

def samples_of(dataset, split):
    """Yields (name, image bytes, label or captions) of every sample; ValueError for one that lacks any and
    for a shard that breaks off: a test set is never made smaller."""
    for shard in shards_of(dataset, split):
        with open(shard, "rb") as file:
            if bad := [sample["__bad__"] for sample in data.grouped(file) if "__bad__" in sample]:
                raise ValueError(f"{shard}: {bad[0]}; all of a test set is needed")
        for sample in data.read_samples(shard):
            label, target = sample.get("cls", b"").decode("latin-1").strip(), data.captions(sample)
            if not (label.isdecimal() if dataset.classes else target):
                lacks = "class index (.cls)" if dataset.classes else "caption (.txt, .json)"
                raise ValueError(f"{shard}: {sample['__key__']} has no {lacks}; every image needs one")
            target = int(label) if dataset.classes else target
            yield f"{shard}: {sample['__key__']}", data.image_of(sample), target

def read_image(name, content, size):
    """Image bytes -> uint8 (3,S,S); ValueError, beginning with the name, where they are no image."""
    try:
        return torch.as_tensor(data.preprocess(data.decode(content), size))
    except Exception as error:  # whatever a damaged image raises
        raise ValueError(f"{name}: {error if content else 'there is no image'}") from error

def image_batches(dataset, split, size, limit=None, batch=256):
    """Decodes in threads, ahead of the model but by a bounded number of batches
    -> iterator of (uint8 (B,3,S,S), B labels or lists of captions); ValueError naming a bad sample."""
    samples, ahead = itertools.islice(samples_of(dataset, split), limit), []
    samples = iter(tqdm(samples, f"{dataset.name} {split}", unit=" images", leave=False, disable=None))
    with ThreadPoolExecutor() as pool:
        while (part := list(itertools.islice(samples, batch))) or ahead:
            if part:
                names, contents, targets = zip(*part, strict=True)
                ahead.append((pool.map(read_image, names, contents, itertools.repeat(size)), targets))
            if len(ahead) > 2 or not part:
                images, targets = ahead.pop(0)
                yield torch.stack(list(images)), targets

@torch.no_grad()
def encode_texts(model, tokenizer, texts):
    """Strings -> (m,E) unit-norm features on the CPU."""
    device, context = next(model.parameters()).device, model.config.context
    parts = [tokenizer.batch(texts[i : i + 1024], context) for i in range(0, len(texts), 1024)]
    return torch.cat([model.encode_text(part.to(device)).cpu() for part in parts])

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
    found = {"pooled": torch.cat(pooled), "embedded": torch.cat(embedded)}
    if dataset.classes:
        name = f"{dataset.source}: by classnames.txt, labels"
        found["labels"] = as_labels(targets, len(targets), len(dataset.classes), name)
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
    these programs, whose transform it is. None for data that are not in files."""
    device = next(model.parameters()).device.type
    setting = split, dataset.classes, device, torch.__version__, Image.__version__
    key = hashlib.blake2b(repr(setting).encode(), digest_size=16)
    for path in [checkpoint, data.__file__, mae_clip.__file__, __file__, *shards_of(dataset, split)]:
        if not os.path.isfile(path):
            return None
        key.update(f"\0{os.path.basename(path)}\0{os.path.getsize(path)}\0".encode())
        key.update(np.memmap(path, mode="r"))
    return data.cache_folder() / "features" / f"{key.hexdigest()}.pt"

# --- Scores of a model on a set ---------------------------------------------------------------------------
class Score(NamedTuple):
    """A measure: a sum of `top` over test images by one of `bottom`, so that images can be resampled."""
    top: torch.Tensor  # (n,)
    chance: float
    bottom: torch.Tensor | int = 1  # (n,), or the same for every image

    def value(self, counts=None):
        """The measure, NaN where no image counts; counts (n,): how often each image does."""
        counts = torch.ones(len(self.top), dtype=torch.float64) if counts is None else counts
        return (counts @ self.top.double() / (counts * self.bottom).sum()).item()

def interval(runs, others=()):
    """Scores of a column, one for each seed, and maybe of another -> its mean, or mean lead over the other,
    and the ends of the 95 % interval: over seeds by Student's t, or for one run by bootstrap over images."""
    def lead(counts=None):
        values = np.array([score.value(counts) for score in runs])
        return values - [score.value(counts) for score in others] if others else values
    values, n, random = lead(), len(runs[0].top), np.random.default_rng(0)
    mean, draws = float(values.mean()), (random.integers(0, n, n) for _ in range(1000))
    if len(runs) > 1:
        quantiles = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # by degrees of freedom
        half = quantiles[min(len(runs) - 1, 9) - 1] * float(values.std(ddof=1)) / len(runs) ** 0.5
        return mean, mean - half, mean + half
    leads = [lead(torch.from_numpy(np.bincount(draw, minlength=n)).double()) for draw in draws]
    return mean, *np.nanpercentile(leads, [2.5, 97.5]).tolist()

def score_zero_shot(model, tokenizer, dataset, test):
    """-> {acc1, acc5, mean_per_class_recall; seen, unseen: acc1 by whether training held the class}."""
    chance, y = 1 / len(dataset.classes), test["labels"]
    classes = class_features(model, tokenizer, dataset.classes, dataset.templates)
    hits, share = zero_shot(test["embedded"], classes, y, each=True), 1 / torch.bincount(y)[y]
    scores = {"acc1": Score(hits["acc1"], chance)}
    if len(classes) >= 5:
        scores["acc5"] = Score(hits["acc5"], 5 * chance)
    scores["mean_per_class_recall"] = Score(hits["mean_per_class_recall"] * share, chance, share)
    unseen = torch.isin(y, torch.tensor(dataset.unseen))
    for name, part in (("seen", ~unseen), ("unseen", unseen)) if dataset.unseen else ():
        scores[name] = Score(hits["acc1"] & part, chance, part)
    return scores

def score_retrieval(test):
    """-> {image_retrieval_recall@k, text_retrieval_recall@k}; an image's texts are resampled with it."""
    owner, scores = test["image_of_text"], {}
    own = torch.bincount(owner)
    for name, hit in retrieval(test["embedded"], test["texts"], owner, each=True).items():
        k = int(name.split("@")[1])
        if name.startswith("image"):
            scores[name] = Score(torch.bincount(owner, weights=hit.double()), k / len(own), own)
        else:  # chance: not all of k texts are another image's
            scores[name] = Score(hit, 1 - ((1 - own / len(owner)) ** k).mean().item())
    return scores

@torch.no_grad()
def reconstructions(model, tokenizer, dataset, count=512):
    """The first `count` images (B,3,S,S), tokens (B,T) and what the model makes of them, masks from a fixed
    seed; a labelled image's caption is its class in the first prompt."""
    c, generator, device = model.config, torch.Generator().manual_seed(0), next(model.parameters()).device
    images, targets = next(image_batches(dataset, "test", c.image_size, count, count))
    tokens = torch.zeros(len(images), c.context, dtype=torch.long)
    if tokenizer is not None:
        prompts = [dataset.templates[0].replace("{c}", name) for name in dataset.classes]
        tokens = tokenizer.batch([prompts[x] if prompts else x[0] for x in targets], c.context)
    sizes = (len(images), (c.image_size // c.patch_size) ** 2), tokens.shape
    noise = [torch.rand(size, generator=generator).to(device) for size in sizes]
    out = model.reconstruct(images.to(device), tokens.to(device), *noise)
    return images, tokens, {name: value.cpu() for name, value in out.items()}

def score_reconstruction(model, tokenizer, dataset):
    """-> {image_loss (chance: predicting zero), text_accuracy of removed tokens (chance: always the most
    frequent one)}, where the model is trained for it."""
    (images, tokens, out), c, scores = reconstructions(model, tokenizer, dataset), model.config, {}
    target = mae_clip.patch_targets(mae_clip.patchify(mae_clip.normalise(images), c.patch_size), c.norm_pix)
    patches, words, right = out["image_mask"], out["text_mask"], out["text"] == tokens
    if patches.any():
        errors = out["image"] - target, target
        loss, zero = (x.square().mean(dim=2)[patches].view(len(x), -1) for x in errors)
        scores["image_loss"] = Score(loss.mean(dim=1), zero.mean().item())
    if words.any():
        often = (torch.bincount(tokens[words]).max() / words.sum()).item()
        scores["text_accuracy"] = Score((right & words).sum(dim=1), often, words.sum(dim=1))
    return scores

def measure(model, tokenizer, dataset, tasks, checkpoint=None):
    """-> {task: {measure: Score}} for those of `tasks` that apply to the model and the set."""
    found = {}
    probes = {"linear_probe": linear_probe, "knn": knn} if Path(dataset.source, "train").is_dir() else {}
    probes = {task: probe for task, probe in probes.items() if task in tasks and dataset.classes}
    match = hasattr(model, "text_proj") and ("zero_shot" if dataset.classes else "retrieval") in tasks
    if probes or match:
        test = features(model, tokenizer, dataset, "test", checkpoint)
    if match and dataset.classes:
        found["zero_shot"] = score_zero_shot(model, tokenizer, dataset, test)
    elif match:
        found["retrieval"] = score_retrieval(test)
    if probes:
        train = features(model, tokenizer, dataset, "train", checkpoint)
    for task, probe in probes.items():
        hits = probe(train["pooled"], train["labels"], test["pooled"], test["labels"], each=True)
        found[task] = {"acc1": Score(hits, 1 / len(dataset.classes))}
    if hasattr(model, "decoder") and "reconstruction" in tasks and not (dataset.classes and len(tasks) > 1):
        found["reconstruction"] = score_reconstruction(model, tokenizer, dataset)
    return found

def evaluate(model, tokenizer, eval_data, out=None):
    """What a training run reports on SETs joined by commas: all tasks but k-NN, with out/reconstructions.png
    -> {task, from its second set on with the set's name: {measure: value or None, "chance": {...}, "n"}}."""
    results, training = {}, model.training
    model.eval()
    for dataset in [dataset for source in eval_data.split(",") for dataset in open_sets(source)]:
        for task, scores in measure(model, tokenizer, dataset, set(TASKS) - {"knn"}).items():
            entry = {"chance": {name: score.chance for name, score in scores.items()}}
            results[f"{task} {dataset.name}" if task in results else task] = entry
            for name, score in scores.items():
                entry[name] = None if math.isnan(score.value()) else score.value()
                entry["n"] = len(score.top)
            if task == "zero_shot":
                print(f"prompts of {dataset.name}: {'; '.join(dataset.templates)}")
            if out and task == "reconstruction":
                draw_reconstructions(model, tokenizer, dataset, Path(out) / "reconstructions.png")
    model.train(training)
    return results

def show(value, name=""):
    """A rate in per cent, a loss as it is."""
    text = f"{value:.3f}" if "loss" in name else f"{100 * (value or 0):.1f} %"
    return "-" if value is None or math.isnan(value) else text

def format_results(results):
    """What evaluate returns, as a table for the terminal."""
    rows = [["task", "images", "measure", "value", "chance"]]
    for task, values in results.items():
        for name, chance in values["chance"].items():
            rows.append([task, f"{values['n']:,}", name, show(values[name], name), show(chance, name)])
    return format_table(rows)

def format_table(rows, style="text"):
    """Rows of strings, the first one the header -> aligned text or a Markdown table."""
    if style == "markdown":
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

def score_runs(checkpoints, datasets, tasks, device):
    """Every task that applies, for each checkpoint; None is a new model of the first one's configuration, and
    runs that differ in the seed alone share a column -> {(set, task, measure): {column: Scores}}, columns."""
    found, columns = {}, {}
    for path in checkpoints:
        model, tokenizer, config = mae_clip.load(path or checkpoints[0], device)
        if path is None:
            torch.manual_seed(config.seed)
            model, column = mae_clip.MAECLIP(config).to(device).eval(), "untrained"
        else:
            setting = {name: x for name, x in asdict(config).items() if name not in INCIDENTAL}
            name = Path(path).resolve().parent.name  # of the run
            key = Path(path).name, repr(setting)
            column = columns.setdefault(key, path if name in columns.values() else name)
        for dataset in datasets:
            results = measure(model, tokenizer, dataset, tasks, path)
            if not results and 1 in (len(tasks), len(datasets)):
                raise ValueError(f"{path}: {', '.join(tasks)} do not fit {config.method} on {dataset.name}: "
                                 "zero-shot and retrieval need a text tower, probes a train folder")
            if "zero_shot" in results and (dataset.name, "zero_shot", "acc1") not in found:
                print(f"prompts of {dataset.name}: {'; '.join(dataset.templates)}", file=sys.stderr)
            for task, measured in [(task, name) for task, scores in results.items() for name in scores]:
                cells = found.setdefault((dataset.name, task, measured), {})
                cells.setdefault(column, []).append(results[task][measured])
    return found, list(columns.values())

def suite(checkpoints, datasets, tasks, style="text", device="cpu", untrained=False):
    """All scores of all checkpoints with 95 % intervals and chance; of two columns the lead too, image by
    image or seed by seed -> text, markdown or json. ValueError where nothing that was asked for applies."""
    found, columns = score_runs([*checkpoints, *[None] * untrained], datasets, tasks, device)
    lead = " less ".join(columns)
    head, rows, entries = ["set", "task", "measure", "images", "chance"], [], []
    names = columns + ["untrained"] * untrained + [lead] * (len(columns) == 2)
    for key, scores in found.items():
        (one, *_), *_ = scores.values()
        values = {name: interval(runs) for name, runs in scores.items()}
        pair = [scores.get(name, []) for name in columns]
        if len(pair) == 2 and len(pair[0]) == len(pair[1]):
            values[lead] = interval(*pair)
        seeds = {name: f" of {len(runs)} seeds" for name, runs in scores.items() if len(runs) > 1}
        cells = {name: [show(x, key[2]) for x in three] for name, three in values.items()}
        cells = {name: f"{a} [{b}, {c}]{seeds.get(name, '')}" for name, (a, b, c) in cells.items()}
        rows.append([*key, f"{len(one.top):,}", show(one.chance, key[2])])
        rows[-1] += [cells.get(name, "-") for name in names]
        entries.append(dict(zip(head, (*key, len(one.top), one.chance), strict=True), values=values))
    return json.dumps(entries, indent=1) if style == "json" else format_table([head + names, *rows], style)

# --- Pictures ---------------------------------------------------------------------------------------------
def draw_reconstructions(model, tokenizer, dataset, path, count=8):
    """Writes a picture of the first `count` pairs: original, masked, reconstructed, with captions."""
    c, size = model.config, model.config.image_size
    images, tokens, out = reconstructions(model, tokenizer, dataset, count)
    patches = mae_clip.patchify(mae_clip.normalise(images), c.patch_size)
    hidden, rebuilt, note = out["image_mask"][..., None], out["image"], "[ ]: words predicted"
    if c.norm_pix:  # each patch is predicted less its mean, over its deviation
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        rebuilt = rebuilt * (variance + 1e-6).sqrt() + mean
        note += "\nRemoved patches are shown with their own true mean and contrast, which are not predicted."
    std, mean = (torch.tensor(x).view(3, 1, 1) for x in (mae_clip.IMAGE_STD, mae_clip.IMAGE_MEAN))
    panels, grey = [], ((0.8 - mean) / std).view(3).repeat(c.patch_size**2)
    for x in (patches, grey.where(hidden, patches), rebuilt.where(hidden, patches)):
        panels.append(mae_clip.unpatchify(x, c.patch_size, size, size) * std + mean)
    panels = (torch.stack(panels, dim=1).flatten(0, 1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    side, font = size * max(1, round(160 / size)), ImageFont.load_default(13)
    rows = zip(tokens, out["text"], out["text_mask"], strict=True)
    words = [textwrap.fill(text, side // 7) for row in rows for text in caption_columns(tokenizer, *row)]
    height = side + 34 + 17 * max(text.count("\n") for text in words)
    sheet = Image.new("RGB", (6 * side + 88, 90 + height * ((len(images) + 1) // 2)), "white")
    draw, titles = ImageDraw.Draw(sheet), ("original", "masked", "reconstruction")
    for i, (panel, text) in enumerate(zip(panels.numpy(), words, strict=True)):  # two samples a row
        x, y = 14 + i % 6 * (side + 8) + i % 6 // 3 * 20, 36 + i // 6 * height
        if i < 6:
            draw.text((x + side // 2, 20), titles[i % 3], "black", ImageFont.load_default(16), anchor="mm")
        sheet.paste(Image.fromarray(panel).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side + 4), text, "black", font, spacing=3)
    draw.text((14, sheet.height - 44), f"Visible patches are the original's. {note}", "dimgrey", font)
    sheet.save(path)

def caption_columns(tokenizer, tokens, guess, removed):
    """A caption as it is, with gaps for removed words, the predicted ones in brackets -> three strings."""
    columns = ["", "", ""]
    for token, new, gone in zip(tokens.tolist(), guess.tolist(), removed.tolist(), strict=True):
        if token > data.EOT:
            piece, other = (tokenizer.decode([i]).decode("utf-8", "replace") for i in (token, new))
            gap, mark = re.sub(r"\S", "_", piece), re.sub(r"(\S+)", r"[\1]", other)
            parts = (piece, gap, mark) if gone else (piece,) * 3
            columns = [text + part for text, part in zip(columns, parts, strict=True)]
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
    image = read_image(paths[1], Path(paths[1]).read_bytes(), config.image_size)
    classifier = class_features(model, tokenizer, classes, ["{c}"])
    logits = model.logit_scale.exp().cpu() * model.encode_image(image[None].to(device)).cpu() @ classifier.T
    ranked = sorted(zip(logits.softmax(dim=1)[0].tolist(), classes, strict=True), reverse=True)
    return format_table([["label", "probability"], *([name, show(p)] for p, name in ranked)])

def fail(message):
    """Ends the program with one line that says what was wrong with its input."""
    print(f"eval.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)

def run(argv):
    """Arguments -> what the command prints; ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser("eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    commands = [task.replace("_", "-").removesuffix("ion") for task in TASKS]
    parser.add_argument("command", choices=[*commands, "suite"])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="zero-shot: or one, and a photo")
    parser.add_argument("--data", nargs="+", default=[], metavar="SET", help="sets to score on")
    parser.add_argument("--labels", help="for one photo: what it may show, joined by commas")
    parser.add_argument("--untrained", action="store_true", help="score a new model beside the checkpoints")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="of the table")
    parser.add_argument("--out", default="reconstructions.png", help="picture that reconstruct writes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    device, _ = mae_clip.pick_device(mae_clip.Config(**mae_clip.SCALES["base"], device=args.device))
    if args.labels is not None and args.command == "zero-shot":
        return classify_photo(args.checkpoints, args.labels, device)
    whole, name = args.command == "suite", args.command.replace("-", "_")
    tasks = [task for task in TASKS if whole or task.startswith(name)]
    datasets = [dataset for source in args.data for dataset in open_sets(source, whole)]
    if not datasets:
        raise ValueError("--data: name at least one set")
    if len({dataset.name for dataset in datasets}) < len(datasets):
        datasets = [dataset._replace(name=dataset.source) for dataset in datasets]
    table = suite(args.checkpoints, datasets, tasks, args.format, device, args.untrained)
    if args.command == "reconstruct":
        model, tokenizer, _ = mae_clip.load(args.checkpoints[0], device)
        draw_reconstructions(model, tokenizer, datasets[-1], args.out)
        print(f"picture of {datasets[-1].name}: {args.out}", file=sys.stderr)
    return table

def main(argv=None):
    """The command line: exit code 0 when done, 2 for bad input, 130 when interrupted."""
    try:
        print(run(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
