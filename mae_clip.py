"""MAE-CLIP in one file: contrastive language-image training with masked autoencoding, and its neighbours.

The question is that of Weers et al., "Masked Autoencoding Does Not Help Natural Language Supervision at
Scale" (CVPR 2023). One set of parts gives clip (Radford et al. 2021), mae (He et al. 2021), m3ae (Geng et al.
2022), mae_clip and slip (Mu et al. 2021). The method ends with the class MAECLIP; what follows trains it.

    python mae_clip.py --scale small                                  built-in data, minutes on a laptop
    python mae_clip.py --method clip --data 'pairs-{000..123}.tar'    your own shards
    torchrun --nproc-per-node 8 mae_clip.py --scale base --data ...   every GPU of a machine

Shapes: B batch, N patches, K kept, R removed, T tokens, D width, E embedding, P patch side, V vocabulary, G
pairs of all ranks. In every mask True means removed.
"""

import argparse
import ctypes
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import Batch, DataError, Loader, Tokenizer, builtin, one_line, simclr_view

# --- Configuration: what is trained, and how --------------------------------------------------------------
# Each method's loss terms; the loss is their sum, weighted by the flags --contrastive-weight and so on.
METHODS = {"clip": ("contrastive",), "mae": ("image",), "m3ae": ("image", "text"),
           "mae_clip": ("contrastive", "image", "text"), "slip": ("contrastive", "simclr")}
SIZES = ("image_size patch_size width depth heads text_width text_depth text_heads context embed "
         "decoder_width decoder_depth decoder_heads").split()
SCALES = {
    "tiny": dict(zip(SIZES, (32, 8, 64, 2, 2, 64, 1, 2, 16, 64, 32, 1, 1), strict=True),
                 scenes=2000, batch_size=64, steps=60, warmup=10, log_every=10),
    "small": dict(zip(SIZES, (32, 8, 96, 3, 3, 96, 1, 3, 16, 64, 64, 1, 2), strict=True)),
    "base": dict(zip(SIZES, (224, 16, 768, 12, 12, 512, 12, 8, 77, 512, 512, 8, 16), strict=True),
                 batch_size=4096, steps=90_000, warmup=2000, optimizer="adamw", lr=1e-3, crop=0.5),
    "large": dict(zip(SIZES, (224, 16, 1024, 24, 16, 768, 12, 12, 77, 768, 512, 8, 16), strict=True),
                  batch_size=4096, steps=90_000, warmup=2000, optimizer="adamw", lr=5e-4, crop=0.5)}

def flag(default, help, low=None, high=math.inf, choices=None):
    """A field of Config, with what its flag on the command line says and accepts."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})

@dataclass
class Config:
    """Every setting of a run; each field is a flag (batch_size: --batch-size). The defaults are `small`'s."""
    method: str = flag("mae_clip", "what is trained", choices=tuple(METHODS))
    scale: str = flag("small", "preset of sizes and schedule that any flag overrides", choices=tuple(SCALES))
    out: str = flag("", "folder of the run; empty: runs/METHOD-SCALE")
    resume: bool = flag(False, "go on from the newest checkpoint in the run's folder")
    seed: int = flag(0, "of initial weights, order, crops, captions and masks", 0, 2**23)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1")
    precision: str = flag("auto", "of matrix products", choices=("auto", "fp32", "bf16"))
    compile: bool | None = flag(None, "torch.compile; by default on CUDA only")
    grad_checkpoint: bool = flag(False, "compute activations again in the backward pass: slower, less memory")
    log_every: int = flag(50, "steps between lines of the log", low=1)
    save_every: int = flag(500, "steps between checkpoints", low=1)
    data: str = flag("", "shards: paths, globs, {000..123}, joined by ::; empty: the built-in scenes")
    resample: bool = flag(False, "draw shards with replacement, without end, and read them in sequence")
    tokenizer: str = flag("", "file that data.py tokenizer wrote; empty: learned from the captions")
    eval_data: str = flag("", "sets to evaluate on, joined by commas: captioned shards or labelled folders")
    scenes: int = flag(40_000, "built-in data: training images", low=100)
    data_seed: int = flag(0, "built-in data: seed, which also fixes the pairs never trained on", low=0)
    workers: int = flag(-1, "processes that decode; -1: none on a CPU, 8 for a GPU", low=-1)
    crop: float = flag(1.0, "least area of a random resized crop; 1: centre crop", low=0.01, high=1)
    steps: int = flag(500, "optimiser steps", low=1)
    epochs: float = flag(0.0, "passes over the data; above 0 it sets --steps", low=0)
    stop_after: int = flag(0, "save and stop after this many steps in all, schedule unchanged", low=0)
    batch_size: int = flag(256, "pairs a step, over all processes", low=2)
    accumulate: int = flag(1, "pieces of a batch, in memory one at a time; losses stay the batch's", low=1)
    optimizer: str = flag("muon", "of linear layers' matrices; adamw of all else", choices=("adamw", "muon"))
    lr: float = flag(3e-3, "peak learning rate", low=0)
    warmup: int = flag(50, "steps of linear warm-up before the cosine to zero", low=0)
    weight_decay: float = flag(0.1, "AdamW's decay, on matrices only", low=0)
    image_size: int = flag(32, "pixels a side", low=1)
    patch_size: int = flag(8, "pixels a side", low=1)
    width: int = flag(96, "of the image tower", low=4)
    depth: int = flag(3, "blocks of the image tower", low=1)
    heads: int = flag(3, "attention heads of the image tower", low=1)
    pool: str = flag("gap", "feature: mean or maximum of patch tokens, or CLS", choices=("gap", "max", "cls"))
    text_width: int = flag(96, "of the text tower (in m3ae words have the image tower's width)", low=4)
    text_depth: int = flag(1, "blocks of the text tower", low=1)
    text_heads: int = flag(3, "attention heads of the text tower", low=1)
    context: int = flag(16, "tokens a caption, with SOT and EOT", low=3)
    vocab_size: int = flag(0, "asked of the tokenizer; 0: 512 for contexts of up to 32, else 32,768", low=0)
    embed: int = flag(64, "width of the joint embedding", low=1)
    decoder: str = flag("joint", "attends to all, or to visible ones alone", choices=("joint", "cross"))
    decoder_width: int = flag(64, "of the decoder", low=4)
    decoder_depth: int = flag(1, "blocks of the decoder", low=1)
    decoder_heads: int = flag(2, "attention heads of the decoder", low=1)
    mask_ratio: float = flag(0.75, "share of patches removed (MAE: 0.75)", low=0, high=1)
    text_mask_ratio: float = flag(0.75, "share of tokens removed (M3AE: 0.75)", low=0, high=1)
    contrastive_mask_ratio: float = flag(0.0, "patches removed for the contrastive loss (FLIP: 0.5)", 0, 1)
    norm_pix: bool = flag(True, "predict patches normalised by their own mean and variance (MAE)")
    contrastive_weight: float = flag(1.0, "weight of InfoNCE", low=0)
    image_weight: float = flag(0.1, "weight of the image reconstruction", low=0)
    text_weight: float = flag(0.05, "weight of the text reconstruction", low=0)
    simclr_weight: float = flag(1.0, "weight of SimCLR's loss (SLIP: 1)", low=0)
    def __post_init__(self):
        """ValueError, of one line, for a value that does not fit."""
        for f in fields(self):
            name, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            _, low, high, choices = f.metadata.values()
            if (value not in choices) if choices else (low is not None and not low <= value <= high):
                allowed = f"one of {', '.join(choices)}" if choices else f"from {low} to {high}"
                raise ValueError(f"{name} {value}: must be {allowed}")
        if self.image_size % self.patch_size:
            raise ValueError(f"--patch-size {self.patch_size}: must divide --image-size {self.image_size}")
        for tower in ("", "text-", "decoder-"):
            width, heads = (getattr(self, tower.replace("-", "_") + part) for part in ("width", "heads"))
            if width % heads or width % 4:
                raise ValueError(f"--{tower}width {width}: must be a multiple of 4 and of its {heads} heads")
        self.vocab_size = self.vocab_size or (512 if self.context <= 32 else 32_768)
        if not self.weights():
            raise ValueError(f"--method {self.method}: all weights of its loss are 0, so nothing would train")
    def weights(self):
        """The terms of the loss that are computed, with their weights: {term: weight above 0}."""
        return {term: w for term in METHODS[self.method] if (w := getattr(self, term + "_weight")) > 0}

# --- Patches, positions and masks -------------------------------------------------------------------------
EOT = 2  # data.py's Tokenizer makes of a caption SOT (1), its tokens, EOT (2), padding (0)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in MAE and SLIP

def normalise(images):
    """uint8 (B,3,H,W) -> float32 by ImageNet's mean and deviation; float images are taken as normalised."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std

def patchify(images, patch):
    """(B,3,H,W) -> (B,N,P*P*3): patches row by row; in each, rows, columns, channel fastest (as MAE)."""
    B, C, H, W = images.shape
    assert H % patch == 0 and W % patch == 0, f"patches of {patch} do not divide an image of {H} x {W}"
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)

def unpatchify(patches, patch, height, width):
    """(B,N,P*P*3) -> (B,3,H,W): the inverse of patchify."""
    x = patches.reshape(patches.shape[0], height // patch, width // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)

def sincos_2d(width, rows, cols):
    """Fixed positions (rows*cols, width): the first half codes the column, the second the row (MAE's order).
    Each half holds sines, then cosines, of position / 10000^(k / (width/4)), k = 0 ... width/4 - 1."""
    assert width % 4 == 0, f"sin-cos positions need a width divisible by 4, not {width}"
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (col, row)]  # each (rows*cols, width/4)
    return torch.cat([half for a in angles for half in (a.sin(), a.cos())], dim=1).float()

def kept(length, ratio):
    """How many of `length` stay when `ratio` is removed. Rounded: int(100 * (1 - 0.9)) alone would be 9."""
    return int(length * (1 - ratio) + 0.5)

def random_mask(noise, ratio):
    """Which patches stay: those of smallest noise in each sample (MAE's rule), at least one.
    noise (B,N) -> keep (B,K) their positions, mask (B,N) bool, True where removed."""
    keep = noise.argsort(dim=1)[:, : max(1, kept(noise.shape[1], ratio))]
    return keep, torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)

def random_text_mask(noise, tokens, ratio):
    """Which tokens stay, in K slots whatever a caption's length. noise, tokens (B,T) -> keep (B,K): positions
    of SOT, EOT, the kept tokens, then padding; mask (B,T) bool, True where removed, which these never are."""
    T = tokens.shape[1]
    position, end = torch.arange(T, device=tokens.device), caption_end(tokens)
    word = (position > 0) & (position < end)
    # Looked up by length in a table made on the host: float32 rounding plays no part in the count.
    count = torch.tensor([0] + [kept(length, ratio) for length in range(T - 1)], device=tokens.device)[end]
    rank = noise.masked_fill(~word, math.inf).argsort(dim=1).argsort(dim=1)  # of a word in its caption
    mask = word & (rank >= count)
    order = torch.where(mask, 3, torch.where(word, 1, 2)).masked_fill((position == 0) | (position == end), 0)
    return order.argsort(dim=1, stable=True)[:, : 2 + kept(T - 2, ratio)], mask

def caption_end(tokens):
    """tokens (B,T) -> (B,1): EOT's position. What follows it is padding, whatever ids stand there."""
    return (tokens == EOT).int().argmax(dim=1, keepdim=True)

def take(x, index):
    """x (B or 1,N,D), index (B,K) -> (B,K,D): the rows that index names in each sample."""
    return x.expand(index.shape[0], -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

# --- Transformer: block, image encoder, text encoder, decoder ---------------------------------------------
def attention(q, k, v, valid=None):
    """Softmax attention: q (B,h,Q,d), k, v (B,h,T,d), valid (B,T) what may be attended to -> (B,h,Q,d)."""
    mask = None if valid is None else valid[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # SDPA is finer, its backward pass 3 x slower
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

class Block(nn.Module):
    """Pre-norm transformer block with timm's parameter names, the same for images, text and decoder."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    def forward(self, x, valid=None, query=None):
        """x (B,T,D), or rows query (B,Q,D) that attend to x -> that shape; valid (B,T): no padding in x."""
        qkv, D, y = self.attn.qkv, x.shape[-1], self.norm1(x)
        if query is None:
            q, k, v = qkv(y).chunk(3, dim=-1)
        else:
            q = F.linear(self.norm1(query), qkv.weight[:D], qkv.bias[:D])
            k, v = F.linear(y, qkv.weight[D:], qkv.bias[D:]).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B,h,T,D/h)
        y = attention(q, k, v, valid).transpose(1, 2).flatten(2)
        x = (x if query is None else query) + self.attn.proj(y)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

class ImageEncoder(nn.Module):
    """Vision transformer with timm's parameter names; removed patches never enter it."""
    def __init__(self, config):
        super().__init__()
        side, width = config.image_size // config.patch_size, config.width
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", F.pad(sincos_2d(width, side, side), (0, 0, 1, 0)).unsqueeze(0))
        self.blocks = nn.ModuleList([Block(width, config.heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
    def forward(self, images, keep=None, words=None, valid=None):
        """images (B,3,H,W) uint8 or normalised float, keep (B,K) patches seen (None: all) -> (B,1+K,D) after
        the final norm, CLS first. m3ae adds words (B,T,D), embedded, `valid` or padding -> (B,1+K+T,D)."""
        proj, position = self.patch_embed.proj, self.pos_embed[:, 1:]
        x = patchify(normalise(images), proj.kernel_size[0])  # (B,N,P*P*3)
        if keep is not None:  # dropped before the projection, so that work follows the visible patches
            x, position = take(x, keep), take(position, keep)
        x = F.linear(x, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias) + position  # (B,K,D)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        if words is not None:
            x, valid = torch.cat([x, words], dim=1), F.pad(valid, (x.shape[1], 0), value=True)
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)

class TextEmbedding(nn.Module):
    """Tokens with learned positions."""
    def __init__(self, config, width):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, width)
        self.position = nn.Parameter(torch.zeros(1, config.context, width))
    def forward(self, tokens, keep=None):
        """tokens (B,T), keep (B,K) positions or None -> (B,T or K,D), and valid (B,T or K): no padding."""
        slots = torch.arange(tokens.shape[1], device=tokens.device) if keep is None else keep
        x = self.token(tokens if keep is None else tokens.gather(1, keep))
        return x + F.embedding(slots, self.position[0]), slots <= caption_end(tokens)

class TextEncoder(nn.Module):
    """Text transformer that looks both ways: a causal one could not use what follows a removed token."""
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.embed, self.norm = TextEmbedding(config, width), nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList([Block(width, config.text_heads) for _ in range(config.text_depth)])
    def forward(self, tokens, keep=None, only=None):
        """tokens (B,T), keep (B,K) positions or None -> (B,T or K,D) after the final norm.
        only (B,Q): slots that are wanted; the last block then computes just those -> (B,Q,D)."""
        x, valid = self.embed(tokens, keep)
        for block in self.blocks[:-1]:
            x = block(x, valid)
        return self.norm(self.blocks[-1](x, valid, None if only is None else take(x, only)))

class Masked:
    """One modality in the masked pass: positions kept and removed, and what becomes of both."""
    def __init__(self, keep, mask, seen):
        self.mask = mask  # (B, N or T), True where removed
        self.keep, self.seen = keep, seen  # (B,K) what the encoder sees, and whether that, with CLS, is real
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # the removed ones first
        self.gone = order[:, : mask.shape[1] - keep.shape[1]]
        self.asked = mask.gather(1, self.gone)  # (B,R) what the decoder predicts, and whether it was removed
        self.predicted = None  # (B,R,P*P*3) or (B,R,V), in the order of gone

class Decoder(nn.Module):
    """Predicts removed patches and tokens, by attention among all (joint) or to visible ones (cross)."""
    def __init__(self, config):
        super().__init__()
        side, width = config.image_size // config.patch_size, config.decoder_width
        self.cross = config.decoder == "cross"
        text_width = config.width if config.method == "m3ae" else config.text_width
        sizes = {"image": (config.width, config.patch_size**2 * 3), "text": (text_width, config.vocab_size)}
        for name in [name for name in sizes if name in config.weights()]:
            way = nn.Module()  # into the decoder and out of it
            way.embed, way.head = nn.Linear(sizes[name][0], width), nn.Linear(width, sizes[name][1])
            way.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            way.position = nn.Parameter(torch.zeros(1, config.context, width)) if name == "text" else None
            self.add_module(name, way)
        self.register_buffer("patch_position", sincos_2d(width, side, side).unsqueeze(0), persistent=False)
        self.blocks = nn.ModuleList([Block(width, config.decoder_heads) for _ in range(config.decoder_depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
    def forward(self, image, text, seen, read):
        """image, text: Masked or None; seen, read: (B,K,D) encoded. Sets what is predicted of each."""
        parts = [(image, "image", seen), (text, "text", read)]
        parts = [(part, getattr(self, name), x) for part, name, x in parts if part]
        visible, removed = [], []  # each (B,K,D) and (B,R,D)
        for part, way, x in parts:  # embed's bias and the mask token serve as type embeddings
            position = self.patch_position if way.position is None else way.position
            cls, kept_ones = way.embed(x).tensor_split([-part.keep.shape[1]], dim=1)  # words have no CLS
            visible += [cls, kept_ones + take(position, part.keep)]
            removed += [way.mask_token + take(position, part.gone)]
        x, rows = torch.cat(visible, dim=1), torch.cat(removed, dim=1)
        valid, start = [part.seen for part, *_ in parts], 0
        if not self.cross:  # as MAE and M3AE; the last block computes what is asked for alone
            x, start = torch.cat([x, rows], dim=1), len(self.blocks) - 1
            valid += [part.asked for part, *_ in parts]
        valid = torch.cat(valid, dim=1) if text else None  # patches are never padding
        for block in self.blocks[:start]:
            x = block(x, valid)
        rows = rows if self.cross else x[:, x.shape[1] - rows.shape[1]:]  # as these blocks made them
        for block in self.blocks[start:]:
            rows = block(x, valid, rows)
        rows = self.norm(rows)
        for part, way, _ in parts:
            mine, rows = rows.tensor_split([part.gone.shape[1]], dim=1)
            part.predicted = way.head(mine)

# --- Losses -----------------------------------------------------------------------------------------------
# Under torch.distributed each is the global batch's on every rank, and its gradient is the mean over ranks of
# the parameters' (what DDP computes). Without gradient nothing crosses ranks: one of them can evaluate alone.
def ranks():
    """(rank of this process, number of processes) for a loss."""
    if dist.is_available() and dist.is_initialized() and torch.is_grad_enabled():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def gather(x):
    """(B,...) -> (G,...), the rows of all ranks; the gradient of a row is the sum of what all ranks send."""
    if ranks()[1] == 1:
        return x
    all_gather = getattr(collectives, "all_gather_single_autograd", None)  # its name since torch 2.13
    return (all_gather or collectives.all_gather_tensor_autograd)(x.contiguous(), 0, dist.group.WORLD)

def masked_mean(error, mask):
    """Mean over all ranks of error where mask is True -> 0-d; 0 with zero gradient where it never is."""
    total, count = error.where(mask, 0).sum().view(1), mask.sum().view(1)
    return gather(total).sum() / gather(count.to(total.dtype)).sum().clamp(min=1)

def wide(x):
    """float32 at least: logits, softmax and pixel statistics are never taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()

def contrastive_loss(image_features, text_features, scale=1.0):
    """Symmetric InfoNCE (CLIP), mean of both directions: image_features, text_features (B,E) of unit norm,
    scale the factor on the cosine (float or 0-d) -> 0-d. A rank computes its own rows against all columns."""
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = wide(image_features), wide(text_features)
        pair = torch.arange(image.shape[0], device=image.device) + ranks()[0] * image.shape[0]
        of_images = F.cross_entropy(scale * image @ gather(text).T, pair)
        of_texts = F.cross_entropy(scale * text @ gather(image).T, pair)
    return gather((of_images + of_texts).view(1) / 2).mean()

def patch_targets(patches, normalise=True):
    """(...,P*P*3) -> each patch less its mean, over the root of its unbiased variance + 1e-6 (MAE)."""
    if not normalise:
        return wide(patches)
    variance, mean = torch.var_mean(wide(patches), dim=-1, keepdim=True)
    return (wide(patches) - mean) / (variance + 1e-6).sqrt()

def image_error(prediction, patches, normalise=True):
    """Mean squared error of each patch (MAE): prediction, patches (...,P*P*3) -> (...)."""
    return (wide(prediction) - patch_targets(patches, normalise)).square().mean(dim=-1)

def image_loss(prediction, patches, mask, normalise=True):
    """image_error's mean over removed patches: prediction, patches (...,P*P*3), mask (...) -> 0-d."""
    return masked_mean(image_error(prediction, patches, normalise), mask)

def text_error(logits, tokens):
    """Cross-entropy of each token: logits (...,V), tokens (...) -> (...)."""
    return F.cross_entropy(wide(logits).flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)

def text_loss(logits, tokens, mask):
    """text_error's mean over removed tokens: logits (...,V), tokens (...), mask (...) -> 0-d."""
    return masked_mean(text_error(logits, tokens), mask)

def simclr_loss(a, b, temperature=0.1):
    """NT-Xent (SimCLR): each of 2G views (a, b (B,E), normalised here) must find its other one -> 0-d."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(wide(a), dim=-1), F.normalize(wide(b), dim=-1)
        views = torch.cat([gather(a), gather(b)])  # (2G,E)
        mine = torch.arange(a.shape[0], device=a.device) + ranks()[0] * a.shape[0]
        mine = torch.cat([mine, mine + len(views) // 2])  # this rank's rows of `views`
        logits = torch.cat([a, b]) @ views.T / temperature  # (2B,2G)
        logits = logits.scatter(1, mine.unsqueeze(1), -math.inf)  # no view is its own other one
        loss = F.cross_entropy(logits, mine.roll(a.shape[0]))
    return gather(loss.view(1)).mean()

# --- The model --------------------------------------------------------------------------------------------
def pool(x, how):
    """Encoded tokens (B,1+K,D), CLS first -> image feature (B,D)."""
    if how == "cls":
        return x[:, 0]
    return x[:, 1:].mean(dim=1) if how == "gap" else x[:, 1:].amax(dim=1)

class MAECLIP(nn.Module):
    """The five methods over one set of parts; see METHODS and Config."""
    def __init__(self, config):
        super().__init__()
        if sys.platform == "linux":  # else glibc returns memory after each step, for the next to fault in
            ctypes.CDLL(None).mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its most
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        self.config, self.patches = config, (config.image_size // config.patch_size) ** 2
        D, m3ae, terms = config.width, config.method == "m3ae", config.weights()  # without weight: not built
        seed = int(torch.randint(2**31, (), device="cpu"))  # before the parts draw what initialise overwrites
        self.image_encoder = ImageEncoder(config)
        if "contrastive" in terms or ("text" in terms and not m3ae):
            self.text_encoder = TextEncoder(config)
        if "contrastive" in terms:
            self.image_proj = nn.Linear(D, config.embed, bias=False)
            self.text_proj = nn.Linear(config.text_width, config.embed, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's initial temperature
        if m3ae and "text" in terms:
            self.text_embed = TextEmbedding(config, D)  # its positions are learned: they hold the type, too
        if "image" in terms or "text" in terms:
            self.decoder = Decoder(config)
        if "simclr" in terms:  # SLIP's head, with LayerNorm for its SyncBatchNorm, which couples samples
            hidden = [x for i in (D, 4 * D) for x in (nn.Linear(i, 4 * D), nn.LayerNorm(4 * D), nn.GELU())]
            self.simclr_head = nn.Sequential(*hidden, nn.Linear(4 * D, 256))
        self.initialise(seed)
        for block in self.modules():
            if config.grad_checkpoint and isinstance(block, Block):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for name, parameter in self.image_encoder.named_parameters():  # for text alone nothing sees patches
            parameter.requires_grad_(list(terms) != ["text"] or (m3ae and not name.startswith("patch_embed")))
    @torch.no_grad()
    def initialise(self, seed):
        """Draws weights as MAE does, each by the seed and its own name: what methods share starts alike."""
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(seed + (zlib.crc32(name.encode()) << 31))
            if any(word in name for word in ("token", "position", "type")):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.ndim > 1:  # the patch convolution counts as a matrix
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    def drawn(self, images, tokens, *noise):
        """Its arguments, with noise (B,N) and (B,T) for the masks drawn from torch's generator where None."""
        sizes = (len(images), self.patches), tokens.shape
        return images, tokens, *(torch.rand(size, device=images.device) if x is None else x
                                 for x, size in zip(noise, sizes, strict=True))
    def project_image(self, x):
        """Encoded tokens (B,1+K,D) -> image features (B,E) float32 of unit norm."""
        x = pool(x, self.config.pool)
        return F.normalize(wide(self.image_proj(x) if hasattr(self, "image_proj") else x), dim=-1)
    def encode_image(self, images):
        """images (B,3,H,W), unmasked -> (B,E) of unit norm; (B,D) for mae and m3ae, without a projection."""
        return self.project_image(self.image_encoder(images))
    def encode_text(self, tokens):
        """tokens (B,T) -> (B,E) of unit norm, from EOT; ValueError for a method without text tower."""
        if not hasattr(self, "text_proj"):
            raise ValueError(f"method {self.config.method} has no text tower: use clip, mae_clip or slip")
        x = self.text_encoder(tokens, only=caption_end(tokens)).squeeze(1)
        return F.normalize(wide(self.text_proj(x)), dim=-1)
    def masked_pass(self, images, tokens, image_noise, text_noise):
        """Removes patches and tokens, encodes what is left and predicts the rest
        -> image, text: Masked, or None for a modality without weight, and the image encoder's output."""
        c, image, text = self.config, None, None
        if "image" in c.weights():
            keep, mask = random_mask(image_noise, c.mask_ratio)
            image = Masked(keep, mask, seen=mask.new_ones(mask.shape[0], 1 + keep.shape[1]))  # with CLS
        if "text" in c.weights():
            keep, mask = random_text_mask(text_noise, tokens, c.text_mask_ratio)
            text = Masked(keep, mask, seen=keep <= caption_end(tokens))
        if c.method == "m3ae":  # one trunk over [CLS, visible patches, visible tokens]
            words = self.text_embed(tokens, text.keep) if text else ()
            x = self.image_encoder(images, image.keep if image else tokens[:, :0], *words)
            seen, read = x.tensor_split([1 + image.keep.shape[1] if image else 1], dim=1)
        else:
            seen = self.image_encoder(images, image.keep) if image else None
            read = self.text_encoder(tokens, text.keep) if text else None
        if image or text:
            self.decoder(image, text, seen, read)
        return image, text, seen
    def parts(self, images, tokens, image_noise, text_noise, *views):
        """What forward's losses are computed from -> {term: a pair of tensors, a row for each sample}."""
        c, weights, found, images = self.config, self.config.weights(), {}, normalise(images)
        image, text, seen = self.masked_pass(images, tokens, image_noise, text_noise)
        if "contrastive" in weights:
            ratio = c.contrastive_mask_ratio
            shared = image and 0 < ratio == c.mask_ratio  # then one masked pass serves both losses
            keep = random_mask(image_noise, ratio)[0] if ratio > 0 else None
            x = self.project_image(seen if shared else self.image_encoder(images, keep))
            found["contrastive"] = self.logit_scale.exp() * x, self.encode_text(tokens)
        if image:
            target = take(patchify(images, c.patch_size), image.gone)
            found["image"] = image_error(image.predicted, target, c.norm_pix), image.asked
        if text:
            found["text"] = text_error(text.predicted, tokens.gather(1, text.gone)), text.asked
        if "simclr" in weights:
            found["simclr"] = self.simclr_head(pool(self.image_encoder(torch.cat(views)), c.pool)).chunk(2)
        return found
    def forward(self, images, tokens, image_noise=None, text_noise=None, views=None):
        """images (B,3,H,W) uint8 or normalised float, tokens (B,T), uniform noise (B,N) and (B,T) for the
        masks (None: drawn from torch's global generator), views: a pair of image batches, for slip ->
        dict of 0-d tensors: the unweighted terms that apply, and `loss`, their weighted sum."""
        batch = *self.drawn(images, tokens, image_noise, text_noise), *(views or ())
        pieces, parts = self.config.accumulate if torch.is_grad_enabled() else 1, self.parts
        if pieces > 1:  # each is computed again in the backward pass, when its turn comes (as GradCache)
            parts = partial(checkpoint, self.parts, use_reentrant=False)
        found = [parts(*piece) for piece in zip(*(x.chunk(pieces) for x in batch), strict=True)]
        losses = {"contrastive": contrastive_loss, "simclr": simclr_loss}
        whole = {term: map(torch.cat, zip(*(part[term] for part in found), strict=True)) for term in found[0]}
        terms = {term: losses.get(term, masked_mean)(*pair) for term, pair in whole.items()}
        return terms | {"loss": sum(w * terms[term] for term, w in self.config.weights().items())}
    @torch.no_grad()
    def reconstruct(self, images, tokens, image_noise=None, text_noise=None):
        """What the decoder makes of a masked pair -> dict: `image` (B,N,P*P*3) in the loss's space (each
        patch normalised if norm_pix), true where visible; `image_mask` (B,N); `text` (B,T) ids, predicted
        where removed, else the caption's own; `text_mask` (B,T). ValueError for a method without decoder."""
        if not hasattr(self, "decoder"):
            raise ValueError(f"method {self.config.method} has no decoder: use mae, m3ae or mae_clip")
        c, images = self.config, normalise(images)
        image, text, _ = self.masked_pass(*self.drawn(images, tokens, image_noise, text_noise))
        patches = patch_targets(patchify(images, c.patch_size), c.norm_pix)
        out = {"image": patches, "image_mask": torch.zeros_like(patches[..., 0], dtype=torch.bool),
               "text": tokens, "text_mask": torch.zeros_like(tokens, dtype=torch.bool)}
        if image:
            index = image.gone.unsqueeze(-1).expand_as(image.predicted)
            guess = patches.scatter(1, index, image.predicted.to(patches.dtype))
            out |= {"image": guess, "image_mask": image.mask}
        if text:
            guess = tokens.scatter(1, text.gone, text.predicted.argmax(dim=-1))
            out |= {"text": guess.where(text.mask, tokens), "text_mask": text.mask}
        return out

# === Training: optimiser, checkpoints, data, the loop, the command line ===================================
# What may differ between a run and its continuation with --resume; all else must be the same.
MAY_CHANGE = set("out resume device precision compile log_every save_every data eval_data workers stop_after "
                 "tokenizer vocab_size accumulate grad_checkpoint".split())

def learning_rate(step, config):
    """Linear warm-up to config.lr, then half a cosine down to 0 at config.steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2

class Muon(torch.optim.AdamW):  # Jordan et al. 2024
    """AdamW, but the first group's matrices move along their orthogonalised momentum, at 5 times the rate."""
    @torch.no_grad()
    def step(self):
        """One step; where found_inf is 1 none of it is taken."""
        group, going = self.param_groups[0], 1.0 - self.found_inf
        for p in group["params"]:
            gradient = p.grad.nan_to_num(0, 0, 0)
            p.grad = None  # AdamW passes over it
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            x = gradient.lerp(self.state[p]["momentum"].lerp_(gradient, 0.05 * going), 0.95)  # Nesterov's
            x = (x / x.norm().clamp(min=1e-7)).bfloat16()
            x = x.T if p.shape[0] > p.shape[1] else x
            for _ in range(5):  # a quintic Newton-Schulz iteration brings all singular values near 1
                square = x @ x.T
                x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
            x = x.T if p.shape[0] > p.shape[1] else x
            p.mul_(1 - group["lr"] * group["weight_decay"] * going)
            p.sub_(x.float() * (5 * group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5) * going)
        super().step()

def make_optimizer(model, config):
    """Muon or fused AdamW over what is trained; weights of linear, convolution and embedding layers decay."""
    groups = [{"params": []}, {"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        matrix = p.ndim > 1 and name.endswith("weight")
        if p.requires_grad:
            linear = matrix and p.ndim == 2 and "token" not in name  # neither patches' filters nor words
            groups[0 if linear else 1 if matrix else 2]["params"].append(p)
    kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, config.lr, (0.9, 0.98), 1e-6, config.weight_decay, fused=True)

def pick_device(config):
    """-> the device of this process, and the autocast for its forward passes."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = best if config.device == "auto" else config.device
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None
    # bfloat16 pays on a CPU that multiplies it in tiles (AMX): `small` takes 0.76 times float32's time there.
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    fast = device.type == "cuda" or (device.type == "cpu" and tiles)
    enabled = fast if config.precision == "auto" else config.precision == "bf16"
    return device, torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)

def checkpoints(out):
    """The checkpoints of a run's folder, newest first."""
    return sorted(Path(out).glob("checkpoint-*.pt"), key=lambda path: -int(path.stem.split("-")[1]))

def save_checkpoint(out, model, optimizer, step, config, loader, seconds):
    """Writes all that a run goes on from, whole or not at all, and keeps the last two."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
             "seconds": seconds, "config": asdict(config), "data": loader.identity,
             "position": loader.position, "tokenizer": loader.tokenizer and loader.tokenizer.merges}
    torch.save(state, out / "checkpoint.part")
    (out / "checkpoint.part").replace(out / f"checkpoint-{step}.pt")
    for old in checkpoints(out)[2:]:
        old.unlink()

def read_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote, its config as Config; DataError where that is missing or damaged."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return state | {"config": Config(**state["config"])}
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(f"{path}: not a whole checkpoint ({type(error).__name__})") from None

def load(path, device="cpu"):
    """A checkpoint's model in eval mode, its tokenizer (None where there were no captions) and its Config."""
    state = read_checkpoint(path, device)
    model = MAECLIP(state["config"]).to(device)
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError):
        raise DataError(f"{path}: its weights do not fit its configuration") from None
    tokenizer = None if state["tokenizer"] is None else Tokenizer(state["tokenizer"])
    return model.eval(), tokenizer, state["config"]

def open_run(out, config):
    """Makes the run's folder -> what --resume goes on from, or None; DataError where that mixes two runs."""
    if (out / "results.json").exists():
        raise DataError(f"{out}: holds a complete run; give another --out, or remove it to run it again")
    if not config.resume and ((out / "config.json").exists() or checkpoints(out)):
        raise DataError(f"{out}: holds a run that was started; add --resume to go on, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoints(out):
        try:
            state = read_checkpoint(path)
        except DataError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        then, now = asdict(state["config"]), asdict(config)
        names = sorted(set(now) - MAY_CHANGE - ({"steps"} if config.epochs else set()))
        other = [f"--{name.replace('_', '-')} {then[name]}" for name in names if then[name] != now[name]]
        if other:
            raise DataError(f"{path}: was trained with {' '.join(other)}; give that, or another --out")
        return state
    if checkpoints(out):
        raise DataError(f"{out}: none of its checkpoints is whole; remove it or give another --out")

def open_data(config, state):
    """The training Loader with its tokenizer; settles config's data, eval_data, vocab_size and steps."""
    rank, world = ranks()
    if config.batch_size % world:
        raise DataError(f"--batch-size {config.batch_size}: must be a multiple of the {world} processes")
    if not config.data:
        folder = builtin(config.scenes, config.data_seed)
        config.data, config.eval_data = f"{folder}/train-*.tar", config.eval_data or str(folder)
    workers = (8 if torch.cuda.is_available() else 0) if config.workers < 0 else config.workers
    loader = Loader(config.data, config.batch_size // world, config.image_size, None, config.context,
                    config.seed, rank, world, workers, config.crop, config.method != "mae", config.resample)
    if config.epochs:
        config.steps = max(1, round(config.epochs * len(loader)))
    if state and loader.identity != state["data"]:
        raise DataError(f"--data {config.data}: not the samples that the checkpoint was trained on")
    if state and loader.stream:
        loader.position = state["position"]
        print(f"resumed: the stream goes on at the next shard, number {loader.position:,} of its sequence")
    if config.method != "mae":
        known = Tokenizer(state["tokenizer"]) if state else Tokenizer.load(config.tokenizer)
        loader.tokenizer = known or Tokenizer.train(loader.texts(), config.vocab_size)
        config.vocab_size = loader.tokenizer.vocab_size
    return loader

def inputs(config, step, batch, device):
    """What the model takes at a step, on the device: images, tokens, the masks' noise, two views for slip.
    Noise is a pure function of seed and step, drawn on the host for the pairs of all ranks, then sliced."""
    (rank, world), (B, T) = ranks(), batch.tokens.shape
    generator = torch.Generator().manual_seed(config.seed << 40 | step)
    shapes = (((config.image_size // config.patch_size) ** 2,), (T,), (2, 12))
    noise = [torch.rand(world * B, *shape, generator=generator)[rank * B : rank * B + B] for shape in shapes]
    given = [x.pin_memory() if device.type == "cuda" else x for x in (batch.images, batch.tokens, *noise)]
    images, tokens, image_noise, text_noise, view_noise = (x.to(device, non_blocking=True) for x in given)
    views = [simclr_view(images, view_noise[:, i]) for i in range(2 if "simclr" in config.weights() else 0)]
    return images, tokens, image_noise, text_noise, views

def train_step(net, optimizer, autocast, batch):
    """One step -> the terms, the gradient's norm and a 1, stacked, and whether all of it is finite, both on
    the device. A step that is not finite changes nothing, and nothing here waits for the device."""
    with autocast:
        terms = net(*batch)
    terms["loss"].backward()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    row = torch.stack([*(term.detach() for term in terms.values()), norm, torch.ones_like(norm)])
    finite = row.isfinite().all()
    optimizer.grad_scale, optimizer.found_inf = None, 1.0 - finite.float()  # fused AdamW then skips the step
    optimizer.step()
    optimizer.zero_grad()
    return row.where(finite, 0), finite

def announce(config, model, net, loader, device, autocast, step):
    """Says, before training, what will happen; times a step on an empty batch, which changes nothing."""
    images = torch.zeros(loader.batch_size, 3, config.image_size, config.image_size).byte()
    tokens = Tokenizer([]).batch([""] * loader.batch_size, config.context)
    batch = inputs(config, 0, Batch(images, tokens, ()), device)
    for _ in range(4):  # the first compiles and warms up
        began = time.time()
        with autocast:
            loss = net(*batch)["loss"]
        loss.backward()
        loss.item()  # waits for the device
    minutes = (config.steps - step) * (time.time() - began) / 60
    net.zero_grad()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    if ranks()[0] == 0:
        print(f"method      {config.method}:", " + ".join(f"{w:g} {t}" for t, w in config.weights().items()))
        print("parameters  " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
              f"device      {device}, {'bf16' if autocast._enabled else 'fp32'}, {ranks()[1]} process(es)",
              f"data        {loader.about()}, {config.image_size} px",
              f"schedule    {config.steps:,} steps of {config.batch_size} pairs",
              f"expected    {minutes:.1f} minutes of training, by the time of one step here", sep="\n")

def log_line(config, model, loader, step, rows, seconds, waited):
    """The log's record of the last steps, whose rows from train_step these are: means, and figures beside."""
    *sums, count = torch.stack(rows).sum(dim=0).tolist()  # waits for the device
    record = {"step": step, "epoch": loader.epochs(step), "pairs": step * config.batch_size}
    record |= zip((*config.weights(), "loss", "grad_norm"), (x / (count or 1) for x in sums), strict=True)
    if "contrastive" in record:  # beside the loss of a model that knows nothing
        record |= {"chance": math.log(config.batch_size), "scale": model.logit_scale.exp().item()}
    record |= {"memory_gib": torch.cuda.max_memory_allocated() / 2**30} if rows[0].is_cuda else {}
    return record | {"lr": learning_rate(step - 1, config), "skipped": len(rows) - int(count),
                     "pairs_per_second": len(rows) * config.batch_size / seconds, "waiting": waited / seconds}

def train(config):
    """One run, from its first step or its newest checkpoint to its results; returns the exit code."""
    from eval import evaluate, format_results, open_sets  # here, since eval.py builds on this file
    device, autocast = pick_device(config)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = ranks()
    out = Path(config.out or f"runs/{config.method}-{config.scale}")
    state = open_run(out, config)
    loader = open_data(config, state)
    sets = [open_sets(source) for source in config.eval_data.split(",") if source]  # to fail now
    torch.manual_seed(config.seed)
    model = MAECLIP(config).to(device)
    optimizer = make_optimizer(model, config)
    step, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if config.compile or (config.compile is None and device.type == "cuda"):  # small steps as CUDA graphs
        net = torch.compile(net, mode="reduce-overhead" if config.width <= 256 and world == 1 else None)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    announce(config, model, net, loader, device, autocast, step)
    last = min(config.steps, config.stop_after or config.steps)
    signals, rows, number, shown = [], [], 0, (*config.weights(), "chance", "waiting")
    old = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    batches = loader.batches(loader.position or step)
    began, since, waited, failed = time.time() - seconds, time.time(), 0.0, torch.zeros((), device=device)
    bar = tqdm(total=config.steps, initial=step, disable=rank > 0 or None, dynamic_ncols=True,
               unit="pairs", unit_scale=config.batch_size)
    try:
        while step < last and not number:
            fetching = time.time()
            batch = next(batches)
            waited += time.time() - fetching
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            row, finite = train_step(net, optimizer, autocast, inputs(config, step, batch, device))
            if "contrastive" in config.weights():
                model.logit_scale.data.clamp_(0, math.log(100))  # as in CLIP
            rows, failed, step = [*rows, row], (failed + 1) * ~finite, step + 1
            bar.update()
            if step % config.log_every == 0 or step == last:  # the one place that waits for the device
                record = log_line(config, model, loader, step, rows, time.time() - since, waited)
                since, waited, rows = time.time(), 0.0, []
                if rank == 0:
                    with (out / "log.jsonl").open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    bar.set_postfix({name: record[name] for name in shown if name in record})
                    tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
                if failed >= 20:
                    raise DataError(f"step {step}: no finite loss in {int(failed)} steps, which changed "
                                    "nothing, so its checkpoint is good; lower --lr or raise --warmup")
            if world == 1 or step % config.log_every == 0:  # all processes stop at the same step
                sent = torch.tensor([max(signals, default=0)], device=device if world > 1 else "cpu")
                number = int(gather(sent).max())
            if rank == 0 and step % config.save_every == 0 and step < last:
                save_checkpoint(out, model, optimizer, step, config, loader, time.time() - began)
    finally:  # whatever ends the loop, nothing of what was trained is lost
        if rank == 0:
            save_checkpoint(out, model, optimizer, step, config, loader, time.time() - began)
        bar.close()
        for n, handler in old.items():
            signal.signal(n, handler)
    if rank == 0 and loader.report():
        print(loader.report())
    if rank == 0 and (number or step < config.steps):
        again = shlex.join(re.sub("pipe:.*", "pipe:...", x) for x in sys.argv[1:] if x != "--resume")
        print(f"stopped and saved at step {step:,}; go on with: python mae_clip.py {again} --resume")
    elif rank == 0:
        results = evaluate(model, loader.tokenizer, config.eval_data, out) if sets else {}
        print(format_results(results) if results else "no --eval-data, so nothing is scored")
        if (out / "reconstructions.png").exists():
            print(f"picture: {out}/reconstructions.png")
        results |= {"seconds": time.time() - began, "steps": step, "config": asdict(config)}
        (out / "results.part").write_text(json.dumps(results, indent=1))
        (out / "results.part").replace(out / "results.json")
    if "WORLD_SIZE" in os.environ:
        dist.destroy_process_group()
    return 128 + number if number else 0

def parse(argv=None):
    """The command line as a Config: the scale's preset, overridden by the flags that were given."""
    parser = argparse.ArgumentParser("mae_clip.py", argparse.SUPPRESS, __doc__.split("\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {"method": "run", "data": "data", "steps": "schedule", "image_size": "image tower",
              "text_width": "text tower", "decoder": "decoder", "mask_ratio": "masks and losses"}
    for f in fields(Config):
        if f.name in groups:
            group = parser.add_argument_group(groups[f.name])
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, bool | None) else kind
        group.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], **kind)
    given = vars(parser.parse_args(argv))
    return Config(**SCALES[given.get("scale", Config.scale)] | given)

def main(argv=None):
    """The command line: exit code 0 when done, 2 for bad input, 130 and 143 when interrupted."""
    try:
        sys.exit(train(parse(argv)))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        print(f"mae_clip.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    from mae_clip import main  # so that the module exists once, also for eval.py
    main()
