"""Evaluation whose numbers agree with CLIP_benchmark's and scikit-learn's: features in, numbers out.

    python eval.py zero-shot CHECKPOINT --data SET                   also retrieval, linear-probe, knn
    python eval.py zero-shot CHECKPOINT photo.jpg --labels "a dog,a cat"
    python eval.py reconstruct CHECKPOINT --data SET --out picture.png
    python eval.py suite CHECKPOINT... --data SET... --untrained     all that applies, side by side
    python eval.py benchmark --scale base --method clip       speed; takes the flags of mae_clip.py

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
import sys
import textwrap
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import mae_clip

TASKS = "zero_shot", "retrieval", "linear_probe", "knn", "reconstruction"
BLOCK = 2**26  # entries of a score matrix held at once, so that memory does not grow with the test set
STUDENT = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26  # 97.5 % quantiles of t, 1 to 9 degrees

# --- Pure functions of features; with `each` they give every test item's hit in place of the rate ---------
def as_features(x, name):
    """Array or tensor (n,D) -> float32 or float64 tensor; ValueError where it is not finite."""
    x = mae_clip.wide(torch.as_tensor(x))
    if x.ndim != 2 or not len(x) or not x.isfinite().all():
        raise ValueError(f"{name}: must be finite numbers (n, D) with n > 0, found shape {tuple(x.shape)}")
    return x

def as_labels(y, n, classes, name):
    """Array or tensor (n,) of indices 0 ... classes-1 -> int64 tensor; ValueError where they don't fit."""
    y = torch.as_tensor(y)
    if classes < 2:
        raise ValueError(f"{name}: one class, so there is nothing to tell apart; needs at least 2")
    if y.is_floating_point() or y.shape != (n,) or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name}: must be {n} integers in 0 ... {classes - 1}, found {y}")
    return y.long()

def zero_shot(image_features, class_features, labels, each=False):
    """Classification by the nearest class feature, counted as CLIP_benchmark does, ties included.
    image_features (n,E) and class_features (C,E) of unit norm, labels (n,) -> {acc1, acc5 (NaN below five
    classes), mean_per_class_recall (over the classes that occur)}; ValueError for labels that don't fit."""
    x, c = as_features(image_features, "image features"), as_features(class_features, "class features")
    y, k, parts = as_labels(labels, len(x), len(c), "labels"), 5 if len(c) >= 5 else 1, []
    for rows in torch.arange(len(x)).split(BLOCK // len(c) + 1):
        logits, label = 100.0 * x[rows] @ c.T, y[rows][:, None]
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
    sides = ("image", torch.arange(m).split(BLOCK // n + 1)), ("text", torch.arange(n).split(BLOCK // m + 1))
    for side, rows in [(side, rows) for side, parts in sides for rows in parts]:
        scores = texts[rows] @ images.T if side == "image" else (texts @ images[rows].T).T
        for k in (1, 5, 10):  # a topk for each: ties at its edge fall as in CLIP_benchmark
            top = scores.topk(k, dim=1).indices
            hit = top == owner[rows][:, None] if side == "image" else owner[top] == number[rows][:, None]
            hits.setdefault(f"{side}_retrieval_recall@{k}", []).append(hit.any(dim=1))
    hits = {name: torch.cat(parts) for name, parts in hits.items()}
    return hits if each else {name: hit.float().mean().item() for name, hit in hits.items()}

@torch.no_grad()
def fit_linear(x, y, classes, l2, start=None, tolerance=1e-8):
    """Multinomial logistic regression: minimises mean cross-entropy + l2/2 |W|^2, the intercept free and
    nothing standardised, by Newton steps until one has promised to gain less than `tolerance` of the value.
    x (n,D), y (n,) -> weight (C,D), bias (C,); start: a pair to begin from; scikit-learn's C is 1/(n l2)."""
    given = as_features(x, "features")
    y = as_labels(y, len(given), classes, "labels").to(given.device)
    x = given.double() if given.numel() * classes < 2**28 else given  # where float64 costs little
    (n, D), mean, hot = x.shape, x.mean(dim=0), F.one_hot(y, classes).to(x)
    x = x - mean  # changes the intercept only
    hessian = (x.T @ x).double() / n * (classes - 1) / classes**2
    hessian.diagonal().mul_(1 + 100 * torch.finfo(x.dtype).eps).add_(l2 + 1e-30)  # full rank, at any scale
    # W is sought in a basis in which the Hessian at W = 0 is the identity: W = v[:, :D] @ to_weight.
    lower, to_bias = torch.linalg.cholesky(hessian), classes / (classes - 1) ** 0.5
    to_weight = torch.linalg.solve_triangular(lower, torch.eye(D).to(lower), upper=False)
    penalty = F.pad(l2 * to_weight @ to_weight.T, (0, 1, 0, 1)).to(x)
    to_weight, v = to_weight.to(x), x.new_zeros(classes, D + 1)
    x = F.pad(x @ to_weight.T, (0, 1), value=to_bias)
    if start is not None:
        bias = (start[1] + start[0] @ mean.to(start[0])) / to_bias
        v = torch.cat([start[0].to(lower) @ lower, bias[:, None]], dim=1).to(x)
    def evaluate(v):  # -> objective, gradient (C,D+1), probabilities (n,C)
        logits = x @ v.T
        value, p = F.cross_entropy(logits, y) + (v @ penalty * v).sum() / 2, logits.softmax(dim=1)
        return value.item(), (p - hot).T @ x / n + v @ penalty, p
    def curvature(p, d):  # the Hessian, where the probabilities are p, times d (C,D+1)
        change = p * (x @ d.T)
        return (change - p * change.sum(dim=1, keepdim=True)).T @ x / n + d @ penalty
    (value, slope, p), gain = evaluate(v), math.inf
    while value > 1e-9 and gain > tolerance * value:  # with l2 = 0 the value may go on towards 0
        step, rest, square = torch.zeros_like(v), -slope, slope.square().sum()
        d, enough = rest, 0.1 * square
        for _ in range(250):  # Newton's step, roughly, by conjugate gradients
            bent = curvature(p, d)
            length = square / (d * bent).sum().clamp(min=1e-30)
            step, rest, before = step + length * d, rest - length * bent, square
            square = rest.square().sum()
            if not square > enough:
                break
            d = rest + square / before * d
        gain, size = -(slope * step).sum().item(), 1.0
        while (new := evaluate(v + size * step))[0] > value - 1e-4 * size * gain and size > 1e-3:
            size /= 2
        if not new[0] < value:  # it is as good as its precision allows
            break
        v, (value, slope, p) = v + size * step, new
    weight = v[:, :D] @ to_weight
    return weight.to(given), (v[:, D] * to_bias - weight @ mean).to(given)

def check_split(train_x, train_y, test_x, test_y):
    """Two labelled sets of features -> their four tensors and the number of classes, or ValueError."""
    x, test_x = as_features(train_x, "train features"), as_features(test_x, "test features")
    y = as_labels(train_y, len(x), 2**31, "train labels")
    classes = int(y.max()) + 1
    if y.min() == y.max() or x.shape[1] != test_x.shape[1]:
        raise ValueError(f"probe: needs 2 classes and one width, found {x.shape[1]} and {test_x.shape[1]}")
    return x, y, test_x.to(x), as_labels(test_y, len(test_x), classes, "test labels"), classes

def linear_probe(train_x, train_y, test_x, test_y, seed=0, each=False):
    """Logistic regression on frozen features. Its l2 is chosen on a held-out fifth of train (at most 10,000
    images), to a decade with 20,000 images to fit on, then to half of one with 40,000; then all of train is
    refitted. x (n,D), y (n,) -> {acc1, l2, held_out_acc1}; ValueError for labels that don't fit."""
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
    held, rest = order.tensor_split([min(max(1, len(x) // 5), 10_000)])
    l2, fit = max(x.var(dim=0).sum().item(), 1e-12), None  # the grid follows the scale of x
    for count, steps in ((20_000, range(-1, -8, -1)), (40_000, (0.5, 0, -0.5))):
        tried, part, middle = [], rest[:count], l2
        for step in steps:  # each fit starts from the last
            fit = fit_linear(x[part], y[part], classes, middle * 10.0**step, fit, tolerance=1e-3)
            hits = (x[held] @ fit[0].T + fit[1]).argmax(dim=1) == y[held]
            tried.append((hits.double().mean().item(), middle * 10.0**step, fit))
        accuracy, l2, fit = max(tried, key=lambda trial: trial[0])  # among equals the largest l2
    weight, bias = fit_linear(x, y, classes, l2, fit, tolerance=1e-4)
    hits = (test_x @ weight.T + bias).argmax(dim=1) == test_y
    return hits if each else {"acc1": hits.double().mean().item(), "l2": l2, "held_out_acc1": accuracy}

def knn(train_x, train_y, test_x, test_y, k=20, temperature=0.07, each=False):
    """Vote of the k training images of largest cosine, weighted by exp(cosine / temperature) (as in DINO).
    x (n,D), y (n,) -> {acc1}; ValueError for labels that don't fit and for fewer training images than k."""
    x, y, test_x, test_y, classes = check_split(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(x):
        raise ValueError(f"k-NN: k must lie in 1 ... {len(x)}, the number of training images, found {k}")
    x, test_x, hits = F.normalize(x, dim=1), F.normalize(test_x, dim=1), []
    for rows in torch.arange(len(test_x)).split(BLOCK // (len(x) + classes) + 1):
        cosine, index = (test_x[rows] @ x.T).topk(k, dim=1)
        vote = ((cosine - cosine[:, :1]) / temperature).exp()  # less the nearest's, so that none overflows
        votes = vote.new_zeros(len(vote), classes).scatter_add_(1, y[index], vote)
        hits.append(votes.argmax(dim=1) == test_y[rows])
    return torch.cat(hits) if each else {"acc1": torch.cat(hits).double().mean().item()}

# --- Data sets and features -------------------------------------------------------------------------------
# Captioned shards, or a labelled folder; unseen: the classes that captioned training never showed, if known.
EvalSet = namedtuple("EvalSet", "name source classes templates unseen", defaults=([], [], []))

def open_sets(source, structured=False):
    """A SET -> EvalSets: 2, or 5 if `structured`, of the built-in data; ValueError for unfit names."""
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
    count = "".join(lines("test/nshards.txt"))
    if not classes and count.isdecimal():
        return [EvalSet(folder.name, f"{folder}/test/{{0..{int(count) - 1}}}.tar")]
    if len(classes) < 2:
        raise ValueError(f"{folder}: needs 2 lines in classnames.txt, or test/nshards.txt and captions")
    if not all("{c}" in template for template in templates or [""]):
        raise ValueError(f"{folder}: every line of its templates needs {{c}}, where the class name goes")
    return [EvalSet(folder.name, str(folder), classes, templates, unseen)]

def read_image(where, size, sample):
    """sample: key, image bytes, ... -> uint8 (3,S,S); ValueError, that names it, where there is no image."""
    name, content = where + sample[0], sample[1]
    try:
        return torch.as_tensor(data.preprocess(data.decode(content), size))
    except Exception as error:  # whatever a damaged image raises
        raise ValueError(f"{name}: {error if content else 'there is no image'}") from error

def image_batches(dataset, split, size, limit=None, batch=256):
    """Decodes, in threads, a batch ahead -> iterator of (uint8 (B,3,S,S), B labels or lists of captions)."""
    source = data.labelled(dataset.source, split) if dataset.classes else data.captioned(dataset.source)
    source = tqdm(itertools.islice(source, limit), f"{dataset.name} {split}", leave=False, disable=None)
    with ThreadPoolExecutor() as pool, source:
        samples, ahead, read = iter(source), None, partial(read_image, f"{dataset.source}: ", size)
        while (part := list(itertools.islice(samples, batch))) or ahead:
            ready, ahead = ahead, part and (pool.map(read, part), [target for *_, target in part])
            if ready:
                yield torch.stack([*ready[0]]), ready[1]

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
    if not targets:
        raise ValueError(f"{dataset.source}: no image with a {'label' if dataset.classes else 'caption'}")
    found = {"pooled": torch.cat(pooled), "embedded": torch.cat(embedded)}
    if dataset.classes:
        found["labels"] = as_labels(targets, len(targets), len(dataset.classes), f"{dataset.source}: labels")
    elif hasattr(model, "text_proj"):
        found["texts"] = encode_texts(model, tokenizer, list(itertools.chain(*targets)))
        found["image_of_text"] = torch.tensor([i for i, texts in enumerate(targets) for _ in texts])
    with suppress(Exception):  # nowhere to write to
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path.with_suffix(f".{os.getpid()}"))
        path.with_suffix(f".{os.getpid()}").replace(path)  # whole or not at all
    return found

def cache_file(model, dataset, split, checkpoint):
    """Where features lie, by the content of all they come from: checkpoint, split, and these programs."""
    files = Path(dataset.source, split).iterdir() if dataset.classes else data.expand(dataset.source)
    files = [path for path in sorted(map(Path, files)) if path.is_file()]
    setting = split, dataset.classes, next(model.parameters()).device, torch.__version__, Image.__version__
    key = hashlib.blake2b(repr(setting).encode(), digest_size=16)
    for path in map(Path, [checkpoint, data.__file__, mae_clip.__file__, __file__, *files]):
        key.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        key.update(np.memmap(path, mode="r") if path.stat().st_size else b"")
    return data.cache_folder() / "features" / f"{key.hexdigest()}.pt"

# --- Scores of a model on a set ---------------------------------------------------------------------------
class Score(namedtuple("Score", "values weights chance")):
    """A measure: the weighted mean of a value for each test image (n,), so that images can be resampled."""
    def mean(self, counts=1):
        """counts (n,): how often each image is there -> the measure, NaN where no weight is left."""
        values, weights = np.asarray(self.values, float), counts * np.asarray(self.weights, float)
        return float(weights @ values / weights.sum()) if weights.any() else math.nan
    def interval(self, other=None):
        """The ends of the 95 % bootstrap interval, of the measure or its lead over another's."""
        random, n = np.random.default_rng(0), len(self.values)
        draws = (np.bincount(random.integers(0, n, n), minlength=n) for _ in range(1000))
        leads = [self.mean(counts) - (other.mean(counts) if other else 0) for counts in draws]
        return np.nanpercentile(leads, [2.5, 97.5]).tolist()

def spread(runs, others=()):
    """Scores of a run, or of seeds -> [value, low, high]: 95 %, over images or seeds (t); or of a lead."""
    x = np.subtract([run.mean() for run in runs], [run.mean() for run in others] or 0)
    if len(runs) == 1:
        return [x[0], *runs[0].interval(*others)]
    half = STUDENT[min(len(x), 10) - 2] * x.std(ddof=1) / len(x) ** 0.5
    return [x.mean(), x.mean() - half, x.mean() + half]

def score_zero_shot(model, tokenizer, dataset, test):
    """-> {acc1, acc5, mean_per_class_recall; seen, unseen: acc1 by whether training held the class}."""
    print(f"prompts of {dataset.name}: {'; '.join(dataset.templates)}", file=sys.stderr)
    classes = class_features(model, tokenizer, dataset.classes, dataset.templates)
    y, C = test["labels"], len(classes)
    hits, unseen = zero_shot(test["embedded"], classes, y, each=True), np.isin(y, dataset.unseen)
    hits |= {"seen": hits["acc1"], "unseen": hits["acc1"]}
    weights = {"acc1": y >= 0, "acc5": (y >= 0) & (C >= 5), "mean_per_class_recall": 1 / torch.bincount(y)[y],
               "seen": ~unseen & bool(dataset.unseen), "unseen": unseen}
    return {name: Score(hits[name], weights[name], (5 if name == "acc5" else 1) / C) for name in weights}

def score_retrieval(test):
    """-> {image_retrieval_recall@k, text_retrieval_recall@k}; an image's texts are resampled with it."""
    owner, scores = test["image_of_text"], {}
    own = torch.bincount(owner)
    for name, hit in retrieval(test["embedded"], test["texts"], owner, each=True).items():
        k = int(name.split("@")[1])
        if name.startswith("image"):
            scores[name] = Score(torch.bincount(owner, weights=hit.double()) / own, own, k / len(own))
        else:  # chance: not all of k texts are another image's
            scores[name] = Score(hit, own > 0, 1 - ((1 - own / len(owner)) ** k).mean().item())
    return scores

def reconstructions(model, tokenizer, dataset, limit=512):
    """The first `limit` `images` and their `tokens`, and what MAECLIP.reconstruct makes of them, masks from a
    fixed seed -> dict of tensors; a labelled image's caption is its class in the first prompt."""
    c, generator, device = model.config, torch.Generator().manual_seed(0), next(model.parameters()).device
    prompts, parts = [dataset.templates[0].replace("{c}", name) for name in dataset.classes], []
    for images, targets in image_batches(dataset, "test", c.image_size, limit, batch=64):
        texts = [prompts[x] if prompts else x[0] for x in targets]
        tokens = (tokenizer or data.Tokenizer([])).batch(texts, c.context)
        sizes = (len(images), (c.image_size // c.patch_size) ** 2), tokens.shape
        noise = [torch.rand(size, generator=generator).to(device) for size in sizes]
        out = model.reconstruct(images.to(device), tokens.to(device), *noise)
        parts.append({"images": images, "tokens": tokens} | out)
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

def score_reconstruction(model, tokenizer, dataset):
    """-> {image_loss (chance: of zeros), text_accuracy of removed tokens (chance: of the most frequent)}."""
    out, c = reconstructions(model, tokenizer, dataset), model.config
    patches = mae_clip.patchify(mae_clip.normalise(out["images"]), c.patch_size)
    target, mask = mae_clip.patch_targets(patches, c.norm_pix), out["image_mask"]
    loss, zero = (((guess - target).square().mean(dim=2) * mask).sum(dim=1) for guess in (out["image"], 0))
    count, words = mask.sum(dim=1), out["text_mask"].sum(dim=1)
    right = ((out["text"] == out["tokens"]) & out["text_mask"]).sum(dim=1)
    often = torch.bincount(out["tokens"][out["text_mask"]], minlength=1).max() / words.sum()
    return {"image_loss": Score(loss / count.clamp(min=1), count, (zero.sum() / count.sum()).item()),
            "text_accuracy": Score(right / words.clamp(min=1), words, often.item())}

def measure(model, tokenizer, dataset, tasks, checkpoint=None):
    """-> {task: {measure: Score}} for those of `tasks` that apply to the model and the set."""
    found, classes, trainable = {}, dataset.classes, Path(dataset.source, "train").is_dir()
    match = hasattr(model, "text_proj") and ("zero_shot" if classes else "retrieval")
    probes = [probe for probe in (linear_probe, knn) if classes and trainable and probe.__name__ in tasks]
    if probes or match in tasks:
        test = features(model, tokenizer, dataset, "test", checkpoint)
    if match in tasks:
        found[match] = score_zero_shot(model, tokenizer, dataset, test) if classes else score_retrieval(test)
    for probe in probes:
        train = features(model, tokenizer, dataset, "train", checkpoint)
        hits = probe(train["pooled"], train["labels"], test["pooled"], test["labels"], each=True)
        found[probe.__name__] = {"acc1": Score(hits, np.ones(len(hits)), 1 / len(classes))}
    if hasattr(model, "decoder") and "reconstruction" in tasks and not (classes and len(tasks) > 1):
        found["reconstruction"] = score_reconstruction(model, tokenizer, dataset)
    return {task: {name: score for name, score in scores.items() if not math.isnan(score.mean())}
            for task, scores in found.items()}

def evaluate(model, tokenizer, eval_data, out=None):
    """All tasks but k-NN on SETs joined by commas, and out/reconstructions.png -> {task, from its second set
    on with the set's name: {measure: value, "chance": {measure: value}, "n": test images}}."""
    results, training = {}, model.training
    model.eval()
    for dataset in [dataset for source in eval_data.split(",") for dataset in open_sets(source)]:
        for task, scores in measure(model, tokenizer, dataset, set(TASKS) - {"knn"}).items():
            entry = {name: score.mean() for name, score in scores.items()}
            entry["chance"] = {name: score.chance for name, score in scores.items()}
            entry["n"] = max([len(score.values) for score in scores.values()], default=0)
            results[f"{task} {dataset.name}" if task in results else task] = entry
            if out and results.get("reconstruction") is entry:
                draw_reconstructions(model, tokenizer, dataset, Path(out) / "reconstructions.png")
    model.train(training)
    return results

def show(value, name=""):
    """A rate in per cent, a loss as it is."""
    return f"{value:.3f}" if "loss" in name else f"{100 * value:.1f} %"

def format_results(results):
    """What evaluate returns, as a table for the terminal."""
    rows = [[task, f"{x['n']:,}", name, show(x[name], name), show(chance, name)]
            for task, x in results.items() for name, chance in x["chance"].items()]
    return format_table([["task", "images", "measure", "value", "chance"], *rows])

def format_table(rows, style="text"):
    """Rows of strings, the first one the header -> aligned text or a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    left, between, right = ("| ", " | ", " |") if style == "markdown" else ("", "  ", "")
    return "\n".join((left + between.join(map(str.ljust, row, widths)) + right).rstrip() for row in rows)

def suite(checkpoints, datasets, tasks, style="text", device="cpu", untrained=False):
    """Every task that applies, for each checkpoint and maybe a new model, with chance and 95 % intervals ->
    table. Runs that differ in their seed alone share a column; of two with equal seeds there is the lead."""
    found, columns, folders = {}, {}, [Path(path).resolve().parent.name for path in checkpoints]
    for path, folder in [*zip(checkpoints, folders, strict=True), *[(None, "untrained")] * untrained]:
        model, tokenizer, config = mae_clip.load(path or checkpoints[0], device)
        if path is None:
            torch.manual_seed(config.seed)
            model = mae_clip.MAECLIP(config).to(device).eval()
        fixed = vars(config) | dict.fromkeys("out resume seed eval_data workers stop_after".split())
        column = f"{Path(path or '').name} {fixed}"
        column = path if config.seed in columns.get(column, {}) else column
        columns.setdefault(column, {})[config.seed] = folder if folders.count(folder) < 2 else path
        for dataset in datasets:
            for task, scores in measure(model, tokenizer, dataset, tasks, path).items():
                for name, score in scores.items():
                    found.setdefault((dataset.name, task, name), {}).setdefault(column, []).append(score)
        if path and not any(column in scores for scores in found.values()):
            raise ValueError(f"{path}: no --data for {tasks[0]}: needs a text tower, train split or decoder")
    names = {column: " + ".join(runs.values()) for column, runs in columns.items()}
    pair, head = [*columns][: len(columns) - untrained], ["set", "task", "measure", "images", "chance"]
    even = len(pair) == 2 and [*columns[pair[0]]] == [*columns[pair[1]]]  # the same seeds in the same order
    leads = [" less ".join(names[column] for column in pair)] if even else []
    rows, entries = [head + [*names.values()] + leads], []
    for key, scores in found.items():
        values = {names[column]: spread(runs) for column, runs in scores.items()}
        if leads and scores.keys() >= set(pair):
            values[leads[0]] = spread(*(scores[column] for column in pair))
        cells = {name: "{} [{}, {}]".format(*(show(x, key[2]) for x in values[name])) for name in values}
        one, cells = next(iter(scores.values()))[0], [cells.get(name, "-") for name in rows[0][5:]]
        rows.append([*key, f"{len(one.values):,}", show(one.chance, key[2]), *cells])
        entries.append(dict(zip(head, (*key, len(one.values), one.chance), strict=True), values=values))
    return json.dumps(entries, indent=1) if style == "json" else format_table(rows, style)

# --- Pictures ---------------------------------------------------------------------------------------------
def draw_reconstructions(model, tokenizer, dataset, path, count=8):
    """Writes a picture of the first `count` pairs: original, masked (cream), reconstruction and caption."""
    c, size, out = model.config, model.config.image_size, reconstructions(model, tokenizer, dataset, count)
    patches = mae_clip.patchify(mae_clip.normalise(out["images"]), c.patch_size)
    hidden, (variance, mean) = out["image_mask"][..., None], torch.var_mean(patches, dim=-1, keepdim=True)
    rebuilt = out["image"] * (variance + 1e-6).sqrt() + mean if c.norm_pix else out["image"]
    note = "removed patches are shown with their true mean and contrast, which are not predicted"
    std, mean = (torch.tensor(x).view(3, 1, 1) for x in (mae_clip.IMAGE_STD, mae_clip.IMAGE_MEAN))
    panels = torch.stack([patches, patches.where(~hidden, 2), rebuilt.where(hidden, patches)], dim=1)
    panels = mae_clip.unpatchify(panels.flatten(0, 1), c.patch_size, size, size) * std + mean
    panels = (panels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # three a sample
    side, font = size * max(1, round(160 / size)), ImageFont.load_default(14)
    sheet = Image.new("RGB", (4 * side + 260, 66 + (side + 8) * len(hidden)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("original", "masked", "reconstruction", "caption, [removed: predicted]")):
        draw.text((14 + column * (side + 8), 10), title, "black", ImageFont.load_default(16))
    for i, panel in enumerate(panels):
        x, y = 14 + i % 3 * (side + 8), 36 + i // 3 * (side + 8)
        sheet.paste(Image.fromarray(panel).resize((side, side), Image.Resampling.NEAREST), (x, y))
    for i in range(len(hidden) if tokenizer else 0):
        old, new = ([tokenizer.decode([n]).decode("utf-8", "replace") for n in out[name][i].tolist()]
                    for name in ("tokens", "text"))
        words = [f"{a[: len(a) - len(a.lstrip())]}[{a.strip()}: {b.strip()}]" if gone else a
                 for a, b, gone in zip(old, new, out["text_mask"][i], strict=True)]
        text = textwrap.fill("".join(words).strip(), (side + 220) // 8)
        draw.text((14 + 3 * (side + 8), 36 + i * (side + 8)), text, "black", font, spacing=6)
    draw.text((14, sheet.height - 26), note * c.norm_pix, "dimgrey", font)
    sheet.save(path)

# --- Benchmark --------------------------------------------------------------------------------------------
def flops(config):
    """Floating-point operations of a pair's forward pass: 2 a multiply-add of a matrix product, nothing else
    (as torch.utils.flop_counter); a training step has 3 times as many. A block of width D over T tokens, of
    which Q rows attend, has 4 T D^2 (keys, values) + 20 Q D^2 (its other layers) + 4 Q T D (attention)."""
    c, terms, trunk = config, config.weights(), config.method == "m3ae"
    N, T, P, D = (c.image_size // c.patch_size) ** 2, c.context, 3 * c.patch_size**2, c.width
    d, W, L = c.decoder_width, D if trunk else c.text_width, 0 if trunk else c.text_depth
    def blocks(T, D, *queries):  # over T tokens, for each the number of rows that attend
        return sum(4 * (T + 5 * Q) * D**2 + 4 * Q * T * D for Q in queries)
    def image(patches, words=0):
        return 2 * patches * P * D + blocks(1 + patches + words, D, *[1 + patches + words] * c.depth)
    keep = max(1, mae_clip.kept(N, c.mask_ratio)) if "image" in terms else 0
    words = 2 + mae_clip.kept(T - 2, c.text_mask_ratio) if "text" in terms else 0
    seen, gone, lost = keep + (keep > 0), (N - keep) * (keep > 0), (T - words) * (words > 0)
    total = (image(keep, words * trunk) if trunk or keep else 0) + blocks(words, W, *[words] * L)
    total += 2 * d * (seen * D + words * W + gone * P + lost * c.vocab_size)  # into and out of the decoder
    seen, gone, before = seen + words, gone + lost, c.decoder_depth - 1
    joint = blocks(seen + gone, d, *[seen + gone] * before, gone)
    total += blocks(seen, d, *[gone] * c.decoder_depth) if c.decoder == "cross" else joint
    if "contrastive" in terms:  # two towers, projections, a row of the scores in both directions
        shared = keep and 0 < c.contrastive_mask_ratio == c.mask_ratio  # one masked pass serves both losses
        total += 0 if shared else image(max(1, mae_clip.kept(N, c.contrastive_mask_ratio)))
        total += blocks(T, W, *[T] * (L - 1), 1) + 2 * c.embed * (D + W + 2 * c.batch_size)
    if "simclr" in terms:  # for both views: tower, head, a row of the scores
        total += 2 * (image(N) + 40 * D**2 + 8 * D * 256 + 4 * c.batch_size * 256)
    return total

def benchmark(config, steps=10):
    """Times training steps on a synthetic batch, after 3 of warm-up, and with config.data the Loader alone
    and the steps that it feeds -> dict of figures. TFLOP/s are 3 flops(config) a pair; their share is of a
    large matrix product's. On a CPU memory is the process's peak. Parts: run it under torch.profiler."""
    (device, autocast), B, numbers = mae_clip.pick_device(config), config.batch_size, itertools.count()
    loader, cuda = mae_clip.open_data(config, None) if config.data else None, device.type == "cuda"
    model = mae_clip.MAECLIP(config).to(device)
    net, optimizer = model, mae_clip.make_optimizer(model, config)
    if config.compile or (config.compile is None and cuda):  # as in training
        net = torch.compile(model, mode="reduce-overhead" if config.width <= 256 else None)
    images = torch.randint(256, (B, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tokens = data.Tokenizer([]).batch(["a photo of a dog"] * B, config.context)
    synthetic = data.Batch(images, tokens, ())
    def timed(function, repeats):
        clock = [time.perf_counter()]
        for _ in range(repeats):
            function()
            getattr(torch, device.type).synchronize()
            clock.append(time.perf_counter())
        return np.diff(clock)
    def step(batch):
        mae_clip.train_step(net, optimizer, autocast, mae_clip.inputs(config, next(numbers), batch, device))
    first, *_ = timed(lambda: step(synthetic), 3)
    seconds = timed(lambda: step(synthetic), steps)
    median, used = float(np.median(seconds)), torch.cuda.max_memory_allocated(device) if cuda else None
    if not cuda and sys.platform == "linux":
        import resource  # which Windows lacks
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    side, dtype = 8192 if cuda else 2048, torch.bfloat16 if autocast._enabled else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    rates = 3e-12 * flops(config) * B / median, 2e-12 * side**3 / min(timed(lambda: matrix @ matrix, 9))
    found = {"scale": config.scale, "method": config.method, "device": str(device), "dtype": str(dtype)[6:],
             "torch": torch.__version__, "threads": torch.get_num_threads(), "steps": steps,
             "batch": B, "pairs/s": B / median, "slowest": B / seconds.max(), "fastest": B / seconds.min(),
             "GFLOP a pair": flops(config) / 1e9, "TFLOP/s": rates[0], "matrix TFLOP/s": rates[1],
             "share": rates[0] / rates[1], "memory GiB": used and used / 2**30, "compile s": first - median}
    if loader:
        batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))
        for name, function in (("loader", lambda: next(batches)), ("fed", lambda: step(next(batches)))):
            timed(function, steps)  # so that queues, which were filled before, are empty
            found[f"{name} pairs/s"] = 3 * steps * B / timed(function, 3 * steps).sum()
    return found

# --- Command line -----------------------------------------------------------------------------------------
@torch.no_grad()
def classify_photo(paths, labels, device):
    """Paths of a checkpoint and a photo, labels joined by commas -> table of their probabilities."""
    classes = [label.strip() for label in labels.split(",") if label.strip()]
    if len(classes) < 2 or len(paths) != 2:
        raise ValueError("--labels: takes two labels or more, and goes with zero-shot CHECKPOINT PHOTO")
    model, tokenizer, config = mae_clip.load(paths[0], device)
    texts = class_features(model, tokenizer, classes, ["{c}"]).to(device)
    image = read_image("", config.image_size, (paths[1], Path(paths[1]).read_bytes()))[None].to(device)
    chances = (model.logit_scale.exp() * model.encode_image(image) @ texts.T).softmax(dim=1)[0].tolist()
    ranked = sorted(zip(chances, classes, strict=True), reverse=True)
    return format_table([["label", "probability"], *([name, show(p)] for p, name in ranked)])

def run(argv):
    """What a command prints; ValueError or OSError for bad input."""
    if argv[:1] == ["benchmark"]:
        config = mae_clip.parse(argv[1:])
        found = benchmark(config)
        Path(config.out or "benchmark.json").write_text(json.dumps(found, indent=1))
        shown = [[name, f"{x:,.4g}" if isinstance(x, float) else str(x)] for name, x in found.items()]
        return format_table([["figure", "value"], *shown])
    parser = argparse.ArgumentParser("eval.py", argparse.SUPPRESS, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = [task.replace("_", "-").removesuffix("ion") for task in TASKS]
    parser.add_argument("command", choices=[*commands, "suite", "benchmark"])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="zero-shot: or one, and a photo")
    parser.add_argument("--data", nargs="+", default=[], metavar="SET", help="sets to score on")
    parser.add_argument("--labels", help="for one photo: what it may show, joined by commas")
    parser.add_argument("--untrained", action="store_true", help="score a new model beside the checkpoints")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="of the table")
    parser.add_argument("--out", default="reconstructions.png", help="picture that reconstruct writes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    device, _ = mae_clip.pick_device(mae_clip.Config(device=args.device))
    if args.labels is not None and args.command == "zero-shot":
        return classify_photo(args.checkpoints, args.labels, device)
    whole, name = args.command == "suite", args.command.replace("-", "_")
    tasks = [task for task in TASKS if whole or task.startswith(name)]
    datasets = [dataset for source in args.data for dataset in open_sets(source, whole)]
    if len({dataset.name for dataset in datasets}) < len(datasets):
        datasets = [dataset._replace(name=dataset.source) for dataset in datasets]
    table = suite(args.checkpoints, datasets, tasks, args.format, device, args.untrained)
    if args.command == "reconstruct":
        draw_reconstructions(*mae_clip.load(args.checkpoints[0], device)[:2], datasets[-1], args.out)
    return table

def main(argv=None):
    """The command line: exit code 0 when done, 2 for bad input, 130 when interrupted."""
    try:
        print(run(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
