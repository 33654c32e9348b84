"""Scores a model while it trains (mae_clip.py --eval-every)."""

import textwrap

import mae_clip  # before torch, as it tells torch's threads how to wait

# isort: split
import torch
from tqdm import tqdm

import data
from eval import first_captions, image_batches, open_sets, results_of, say_once


@torch.no_grad()
def losses_on(dataset, run, device, autocast):
    """The terms of the loss and their sum on captioned shards, in whole batches of the training's
    size, or of all pairs that the ranks can share evenly if these are fewer, by masks that are
    always the same -> {term: value}, empty of too few. To be called on all ranks: each takes its
    part of a batch."""
    config = run.config
    rank, world = mae_clip.ranks()
    count = sum(1 for _ in dataset.samples("test"))
    part = min(config.batch_size, count) // world
    if not part:
        return {}
    rows = part * world
    own = slice(rank * part, (rank + 1) * part)
    limit = count // rows * rows
    found = []
    batches = image_batches(dataset, "test", config.image_size, limit, rows)
    for number, (images, captions) in enumerate(batches):
        tokens = first_captions(run.loader.tokenizer, captions[own], config.context)
        batch = data.Batch(images[own], tokens, ())
        with autocast:
            terms = run.model(*mae_clip.training_batch(config, number, batch, device))
        found.append(torch.stack([*terms.values()]))
    means = torch.stack(found).mean(dim=0).tolist()
    return dict(zip([*config.weights(), "loss"], means, strict=True))


@torch.compiler.set_stance("force_eager")  # other shapes than training's are not worth compiling
def validation(run, device, autocast):
    """Scores the model of a run that goes on, on --eval-data: the losses on the first captioned
    set; on rank 0 also zero-shot accuracy and recall@10 -> {name: value}, which is shown, too. It
    draws no random number of torch's and changes nothing."""
    found = {}
    datasets = open_sets(run.config.eval_data)
    captioned = [dataset for dataset in datasets if not dataset.classes]
    if captioned:
        found = losses_on(captioned[0], run, device, autocast)
    if mae_clip.ranks()[0] == 0:
        results = results_of(run.model, run.loader.tokenizer, datasets, ["zero_shot", "retrieval"])
        for task, entry in results.items():
            for name in ("acc1", "image_retrieval_recall@10", "text_retrieval_recall@10"):
                if name in entry["chance"]:
                    found[f"{task} {name}"] = entry[name]
        if not found:
            say_once("--eval-every: no set of --eval-data has scores for this method")
        shown = "; ".join(f"{name} {value:.3f}" for name, value in found.items())
        tqdm.write(textwrap.fill(f"validation {shown}", 80, subsequent_indent=" " * 11))
    return found
