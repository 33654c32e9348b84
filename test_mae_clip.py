"""The specification of MAE-CLIP: one sentence a test, its oracle a loop or a number by hand."""

import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import doctest
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import symtable
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import data
import experiment
import machine
import mae_clip
import pack
import pictures
import scenes
import shards
import validation
import weights
from data import DataError, Tokenizer
from eval import fit_linear, retrieval, zero_shot
from mae_clip import (
    MAECLIP,
    METHODS,
    SCALES,
    Config,
    ModelConfig,
    preset,
    random_mask,
    random_text_mask,
    record_mask,
)

evaluation = sys.modules["eval"]  # a name that is a builtin's
torch.set_num_threads(1)  # on tensors of this size threads only wait for each other

# --- Helpers of the tests -------------------------------------------------------------------------

HERE = Path(__file__).parent
PAD, SOT, EOT = 0, 1, 2
FLOAT32 = torch.autocast("cpu", enabled=False)
BFLOAT16 = torch.autocast("cpu", dtype=torch.bfloat16)


def tiny(method="mae_clip", seed=0, **changes):
    """A model of scale tiny with 300 tokens, from a seed."""
    torch.manual_seed(seed)
    return MAECLIP(preset("tiny", method=method, **({"vocab_size": 300} | changes)))


def captions(*lengths, context=16, seed=0):
    """Token ids (B,T) of random captions of so many words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        words = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append([SOT, *words, EOT] + [PAD] * (context - length - 2))
    return torch.tensor(rows)


def random_images(B, generator):
    """uint8 (B,3,32,32)."""
    return torch.randint(0, 256, (B, 3, 32, 32), generator=generator, dtype=torch.uint8)


def example(B=6, seed=0):
    """Images, tokens, the noise of both masks and two views, as the training loop passes them."""
    generator = torch.Generator().manual_seed(seed)
    images = random_images(B, generator)
    views = [random_images(B, generator), random_images(B, generator)]
    tokens = captions(*[(3 * i) % 15 for i in range(B)])
    image_noise = torch.rand(B, 16, generator=generator)
    text_noise = torch.rand(B, 16, generator=generator)
    return images, tokens, image_noise, text_noise, views


def unit(*shape, seed=0):
    """Random float64 rows of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def where_removed(mask):
    """mask (B,16) of the patches of an example -> (B,3,32,32), the same of their pixels."""
    return mae_clip.unpatchify(mask.unsqueeze(-1).expand(-1, -1, 8 * 8 * 3), 8, 32, 32)


def gradients(model):
    """{parameter: gradient}, of those that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_distance(found, wanted):
    """Two dicts of tensors, taken as two vectors -> their distance over the second's length."""
    assert found.keys() == wanted.keys()
    difference = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted])
    return (difference.norm() / torch.cat([x.flatten() for x in wanted.values()]).norm()).item()


def assert_equal(found, wanted):
    """Two nests of dicts, lists, tensors and plain values are the same, bit for bit."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_equal(a, b)
    else:
        assert found == wanted


def set_rate(optimizers, rate):
    """Gives all parameters this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def fake(config):
    """A model under FakeTensorMode, whose tensors have shapes but no values: nor has its seed."""
    with mock.patch("torch.randint", return_value=SimpleNamespace(item=lambda: 0)):
        return MAECLIP(config)


def picture(width=24, height=16, mode="RGB", kind="JPEG", seed=0, **options):
    """An image file of that mode and kind, made of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 4), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode).save(out, kind, **options)
    return out.getvalue()


def tar_of(path, files, kind=tarfile.USTAR_FORMAT):
    """Writes (name, bytes) as a tar; None for bytes makes a directory, a str a link to it."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            elif content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.type = tarfile.SYMTYPE
                info.linkname = content
                tar.addfile(info)
    return str(path)


def samples_of(count, first=0):
    """The files of that many samples; sample n is named and captioned n."""
    files = []
    for n in range(first, first + count):
        files.append((f"{n:03d}.jpg", picture(seed=n)))
        files.append((f"{n:03d}.txt", b"number %d" % n))
    return files


def shards_of(folder, sizes):
    """Shards of that many samples; sample n of all is named and captioned n."""
    folder.mkdir()
    shards = []
    for number, size in enumerate(sizes):
        files = samples_of(size, sum(sizes[:number]))
        shards.append(tar_of(folder / f"{number}.tar", files))
    return shards


def python(*arguments):
    """Runs Python with these arguments."""
    command = [sys.executable, *[str(argument) for argument in arguments]]
    return subprocess.run(command, capture_output=True, text=True)


def command(*arguments):
    """data.py as a user calls it -> exit code, stdout, stderr."""
    done = python(data.__file__, *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def loader_of(shards, batch=2, **options):
    return data.Loader(shards, batch, 8, data.Tokenizer([]), 16, **options)


def keys_of(batches):
    """The keys of all samples of some batches."""
    keys = []
    for batch in batches:
        keys += batch.keys
    return keys


# --- Configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, terms",
    [
        ("clip", {"contrastive": 0.7}),
        ("mae", {"image": 0.3}),
        ("m3ae", {"image": 0.3, "text": 0.2}),
        ("mae_clip", {"contrastive": 0.7, "image": 0.3, "text": 0.2}),
        ("slip", {"contrastive": 0.7, "simclr": 0.5}),
    ],
)
def test_each_method_is_the_terms_that_it_sums_and_their_weights(method, terms):
    weights = {
        "contrastive_weight": 0.7,
        "image_weight": 0.3,
        "text_weight": 0.2,
        "simclr_weight": 0.5,
    }
    assert ModelConfig(method=method, **weights).weights() == terms
    assert set(METHODS[method]) == set(terms)


def test_a_term_of_weight_zero_is_none_of_the_methods_terms():
    assert ModelConfig(method="mae_clip", image_weight=0.0).weights().keys() == {
        "contrastive",
        "text",
    }


@pytest.mark.parametrize("kind", [ModelConfig, Config])
def test_a_configuration_cannot_be_changed_once_it_is_made(kind):
    config = kind()
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


SIZES = """
    image_size patch_size width depth heads
    text_width text_depth text_heads context embed vocab_size
    decoder_width decoder_depth decoder_heads
""".split()


@pytest.mark.parametrize(
    "scale, sizes",
    [
        ("tiny", [32, 8, 64, 2, 2, 64, 1, 2, 16, 64, 512, 32, 1, 1]),
        ("small", [32, 8, 96, 3, 3, 96, 1, 3, 16, 64, 512, 64, 1, 2]),
        ("base", [224, 16, 768, 12, 12, 512, 12, 8, 77, 512, 32768, 512, 8, 16]),
        ("large", [224, 16, 1024, 24, 16, 768, 12, 12, 77, 768, 32768, 512, 8, 16]),
    ],
)
def test_a_preset_has_the_sizes_of_its_scale_also_where_its_dict_is_given_to_config(scale, sizes):
    for config in (preset(scale), Config(**SCALES[scale])):
        assert [getattr(config, name) for name in SIZES] == sizes


def test_a_preset_writes_to_a_folder_of_the_methods_and_the_scales_name():
    assert preset("base").out == "runs/mae_clip-base"
    assert preset("small", method="clip").out == "runs/clip-small"
    assert preset("small", method="clip", out="here").out == "here"


def test_what_a_preset_is_given_goes_before_the_scale():
    config = preset("base", method="slip", depth=3, lr=0.25)
    assert (config.method, config.depth, config.lr, config.width) == ("slip", 3, 0.25, 768)


def test_a_scale_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^--scale huge: [^\n]*tiny, small, base, large[^\n]*$"):
        preset("huge")


def test_a_scale_that_would_do_nothing_cannot_be_given():
    with pytest.raises(TypeError):
        Config(scale="base")
    with pytest.raises(TypeError):
        preset("tiny", scale="base")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"method": "dino"}, "--method dino"),
        ({"pool": "sum"}, "--pool sum"),
        ({"optimizer": "sgd"}, "--optimizer sgd"),
        ({"precision": "fp8"}, "--precision fp8"),
        ({"mask_ratio": 1.5}, "--mask-ratio 1.5"),
        ({"mask_ratio": 0.0, "method": "mae"}, "--method mae"),
        ({"patch_size": 32, "method": "m3ae"}, "--method m3ae"),
        ({"text_mask_ratio": -0.1}, "--text-mask-ratio -0.1"),
        ({"contrastive_mask_ratio": 1.01}, "--contrastive-mask-ratio 1.01"),
        ({"patch_size": 7}, "--patch-size 7"),
        ({"width": 98}, "--width 98"),
        ({"heads": 5}, "--width 96"),
        ({"text_heads": 7}, "--text-width 96"),
        ({"decoder_width": 6}, "--decoder-width 6"),
        ({"steps": 0}, "--steps 0"),
        ({"depth": 0}, "--depth 0"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"batch_size": 1}, "--batch-size 1"),
        ({"samples": -1}, "--samples -1"),
        ({"vocab_size": 258}, "--vocab-size 258"),
        ({"context": 2}, "--context 2"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"lr": math.inf}, "--lr inf"),
        ({"image_weight": math.inf}, "--image-weight inf"),
        ({"text_weight": -0.1}, "--text-weight -0.1"),
        ({"crop": 0.0}, "--crop 0.0"),
        ({"muon_momentum": 1.01}, "--muon-momentum 1.01"),
        ({"workers": -1}, "--workers -1"),
        ({"method": "mae", "image_weight": 0.0}, "--method mae"),
        ({"method": "m3ae", "image_weight": 0.0}, "--method m3ae"),
        ({"method": "clip", "contrastive_weight": 0.0}, "--method clip"),
    ],
)
def test_a_value_that_does_not_fit_is_named_in_one_line(changes, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}: [^\n]+$"):
        Config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_ratio": 0.0},
        {"mask_ratio": 1.0},
        {"text_mask_ratio": 1.0},
        {"seed": 0},
        {"warmup": 0},
        {"samples": 0},
        {"workers": 0},
        {"crop": 1.0},
        {"lr": 0.0},
        {"muon_momentum": 0.0},
        {"weight_decay": 0.0},
    ],
)
def test_a_value_at_the_end_of_its_range_fits(changes):
    Config(**changes)


# --- Patches and positions ------------------------------------------------------------------------


def test_patchify_lists_patches_row_by_row_and_in_each_rows_columns_channels():
    image = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6)  # 2 x 3 patches of side 2
    patches = mae_clip.patchify(image, 2)
    assert patches.shape == (1, 6, 12)
    # The patch in row 1, column 2 starts at pixel (2, 4), number 2 * 6 + 4 = 16 of a channel's 24.
    assert patches[0, 5].tolist() == [16, 40, 64, 17, 41, 65, 22, 46, 70, 23, 47, 71]
    for n in range(6):
        top = n // 3 * 2
        left = n % 3 * 2
        wanted = []
        for row in range(top, top + 2):
            for column in range(left, left + 2):
                for channel in range(3):
                    wanted.append(image[0, channel, row, column].item())
        assert patches[0, n].tolist() == wanted


def test_unpatchify_is_the_inverse_of_patchify_for_rectangles_too():
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    assert torch.equal(mae_clip.unpatchify(mae_clip.patchify(image, 2), 2, 4, 6), image)


def test_uint8_images_are_normalised_by_imagenets_mean_and_deviation():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    wanted = [(0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert mae_clip.normalise_images(images).flatten().tolist() == pytest.approx(wanted, rel=1e-6)


def test_float_images_are_taken_as_normalised():
    images = torch.randn(2, 3, 4, 4)
    assert mae_clip.normalise_images(images) is images


def test_sincos_positions_follow_the_formula_with_columns_in_the_first_half():
    table = mae_clip.sincos_2d(16, 3, 5)
    assert table.shape == (15, 16)
    for row in range(3):
        for column in range(5):
            wanted = []
            for position in (column, row):
                angles = [position / 10000 ** (k / 4) for k in range(4)]
                wanted += [math.sin(angle) for angle in angles]
                wanted += [math.cos(angle) for angle in angles]
            assert table[row * 5 + column].tolist() == pytest.approx(wanted, abs=1e-6)


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, ratio, kept",
    [
        (196, 0.75, 49),
        (100, 0.9, 10),
        (10, 0.9, 1),
        (20, 0.9, 2),
        (100, 0.8, 20),
        (16, 0, 16),
        (16, 1, 1),
        (2, 0.75, 1),
    ],
)
def test_random_mask_keeps_the_rounded_number_of_patches_and_at_least_one(count, ratio, kept):
    keep, mask = random_mask(torch.rand(3, count), ratio)
    assert keep.shape == (3, kept)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [count - kept] * 3


def test_random_mask_keeps_the_smallest_noise_of_each_sample_and_true_means_removed():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.7, 0.4]])
    keep, mask = random_mask(noise, 0.5)
    assert [sorted(row) for row in keep.tolist()] == [[1, 3], [0, 3]]
    assert mask.tolist() == [[True, False, True, False], [False, True, True, False]]


def test_random_mask_removes_every_position_equally_often():
    _, mask = random_mask(torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 0.03  # 4.4 standard deviations


def test_random_mask_draws_for_each_sample_anew():
    _, mask = random_mask(torch.rand(100, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    assert len({tuple(row) for row in mask.tolist()}) > 90


@pytest.mark.parametrize("ratio", [0, 0.15, 0.5, 0.75, 0.9, 1])
def test_random_text_mask_agrees_with_a_loop_for_captions_of_every_length(ratio):
    tokens = captions(*range(15))  # in a context of 16
    noise = torch.rand(15, 16, generator=torch.Generator().manual_seed(1))
    keep, mask = random_text_mask(noise, tokens, ratio)
    assert keep.shape == (15, 2 + int(14 * (1 - ratio) + 0.5))
    for length in range(15):
        by_noise = sorted((noise[length, t].item(), t) for t in range(1, length + 1))
        words = [t for _, t in by_noise]
        stay = words[: int(length * (1 - ratio) + 0.5)]
        gone = words[len(stay) :]
        assert mask[length].nonzero().flatten().tolist() == sorted(gone)
        slots = keep[length].tolist()
        assert len(set(slots)) == len(slots)
        assert set(slots[: 2 + len(stay)]) == {0, length + 1, *stay}
        assert all(slot > length + 1 for slot in slots[2 + len(stay) :])  # the rest is padding


def test_random_text_mask_removes_neither_sot_nor_eot_nor_padding():
    tokens = captions(0, 3, 9, 14)
    _, mask = random_text_mask(torch.rand(4, 16), tokens, 1.0)
    assert torch.equal(mask, tokens > EOT)


def test_what_follows_eot_is_padding_whatever_ids_stand_there():
    tokens = captions(4, 9)
    other = tokens.clone()
    other[0, 6:] = 77
    other[0, 9] = EOT
    noise = torch.rand(2, 16)
    assert_equal(random_text_mask(noise, other, 0.5), random_text_mask(noise, tokens, 0.5))
    assert mae_clip.caption_end(other).tolist() == [[5], [10]]


@pytest.mark.parametrize("context", [3, 4, 16, 77])
def test_all_removed_tokens_fit_in_their_slots_for_every_length_and_ratio(context):
    lengths = range(context - 1)
    tokens = captions(*lengths, context=context)
    noise = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    for percent in range(0, 101, 5 if context < 77 else 25):
        keep, mask = random_text_mask(noise, tokens, percent / 100)
        masked = record_mask(keep, mask, None)
        for length in lengths:
            slots = masked.rest[length].tolist()
            assert set(mask[length].nonzero().flatten().tolist()) <= set(slots)
            # Each position is either kept or in a slot, and what is spare is padding.
            assert sorted(keep[length].tolist() + slots) == list(range(context))
            assert all(mask[length, slot] or slot > length + 1 for slot in slots)


def test_a_record_of_a_mask_lists_exactly_the_removed_patches():
    keep, mask = random_mask(torch.rand(5, 16), 0.6)
    masked = record_mask(keep, mask, None)
    for row in range(5):
        assert sorted(masked.rest[row].tolist()) == mask[row].nonzero().flatten().tolist()


def test_a_record_of_a_mask_cannot_be_changed():
    masked = record_mask(*random_mask(torch.rand(2, 4), 0.5), None)
    for name in ("keep", "removed", "real", "mask"):
        with pytest.raises(AttributeError):
            setattr(masked, name, None)


# --- Transformer block ----------------------------------------------------------------------------


def attention_by_hand(attention, x, real):
    """Attention of one sample x (T,D) as loops over heads and queries; real: a list of T bools."""
    T, D = x.shape
    size = D // attention.heads
    q, k, v = attention.qkv(x).split(D, dim=1)
    mixed = torch.zeros_like(x)
    for head in range(attention.heads):
        own = slice(head * size, head * size + size)
        for query in range(T):
            weights = torch.zeros(T, dtype=x.dtype)
            for key in range(T):
                if real[key]:
                    weights[key] = math.exp(q[query, own] @ k[key, own] / math.sqrt(size))
            mixed[query, own] = weights @ v[:, own] / weights.sum()
    return attention.proj(mixed)


def small_attention():
    torch.manual_seed(0)
    return mae_clip.Attention(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)


@torch.no_grad()
def test_attention_agrees_with_a_loop_over_heads_queries_and_keys():
    attention, x = small_attention()
    found = attention(x, None)
    for row in range(2):
        assert torch.allclose(found[row], attention_by_hand(attention, x[row], [True] * 5))


@torch.no_grad()
def test_attention_leaves_out_the_keys_that_are_padding():
    attention, x = small_attention()
    real = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])
    found = attention(x, real)
    for row in range(2):
        assert torch.allclose(found[row], attention_by_hand(attention, x[row], real[row].tolist()))


@torch.no_grad()
@pytest.mark.parametrize("real", [None, torch.arange(7) < torch.tensor([[7], [4]])])
def test_attention_in_bfloat16_on_a_cpu_is_that_in_float64(real):
    torch.manual_seed(0)
    attention = mae_clip.Attention(16, 2).bfloat16()
    x = torch.randn(2, 7, 16).bfloat16()
    found = attention(x, real)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), attention.double()(x.double(), real), atol=0.01)


@torch.no_grad()
def test_a_block_adds_attention_and_then_two_layers_each_to_what_its_norm_sees():
    torch.manual_seed(0)
    block = mae_clip.Block(8, 2)
    block.norm1.weight.data = torch.rand(8)
    block.norm2.bias.data = torch.rand(8)
    x = torch.randn(2, 5, 8)
    normed = F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6)
    middle = x + block.attn(normed, None)
    normed = F.layer_norm(middle, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
    hidden = block.mlp.fc1(normed)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # the exact GELU
    assert torch.allclose(block(x, None), middle + block.mlp.fc2(hidden), atol=1e-6)


# --- Encoders -------------------------------------------------------------------------------------


def test_a_patch_is_embedded_as_the_convolution_of_its_name_would():
    torch.manual_seed(0)
    encoder = mae_clip.ImageEncoder(ModelConfig(depth=0))
    torch.nn.init.normal_(encoder.patch_embed["proj"].weight)
    torch.nn.init.normal_(encoder.patch_embed["proj"].bias)
    images = torch.randn(2, 3, 32, 32)
    patches = encoder.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (2,16,96)
    wanted = encoder.norm(patches + mae_clip.sincos_2d(96, 4, 4))
    assert torch.allclose(encoder(images)[:, 1:], wanted, atol=1e-4)


def test_cls_comes_first_and_has_no_position():
    torch.manual_seed(0)
    encoder = mae_clip.ImageEncoder(ModelConfig(depth=0))
    torch.nn.init.normal_(encoder.cls_token)
    assert not encoder.pos_embed[0, 0].any()
    cls = encoder(torch.randn(2, 3, 32, 32))[:, 0]
    assert torch.allclose(cls, encoder.norm(encoder.cls_token[0]).expand(2, -1), atol=1e-6)


def test_positions_of_patches_are_kept_with_the_model_and_not_trained():
    encoder = mae_clip.ImageEncoder(ModelConfig())
    assert encoder.state_dict()["pos_embed"].shape == (1, 17, 96)
    assert "pos_embed" not in dict(encoder.named_parameters())


def test_parameters_of_the_image_encoder_have_timms_names():
    names = set(mae_clip.ImageEncoder(ModelConfig(depth=1)).state_dict())
    wanted = {"cls_token", "pos_embed"}
    for layer in (
        "patch_embed.proj",
        "blocks.0.norm1",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.norm2",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "norm",
    ):
        wanted |= {f"{layer}.weight", f"{layer}.bias"}
    assert names == wanted


def test_each_kept_patch_has_the_position_where_it_stood():
    model = tiny("clip")
    images = example()[0]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    found = model.image_encoder(images, order.expand(6, -1))
    whole = model.image_encoder(images)
    assert torch.allclose(found[:, 0], whole[:, 0], atol=1e-5)
    assert torch.allclose(found[:, 1:], whole[:, 1 + order], atol=1e-5)


def test_each_kept_token_has_the_position_where_it_stood():
    model = tiny("clip")
    tokens = captions(14, 6)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    found = model.text_encoder(tokens, order.expand(2, -1))
    assert torch.allclose(found, model.text_encoder(tokens)[:, order], atol=1e-5)


def test_a_token_is_the_sum_of_its_embedding_and_its_positions():
    torch.manual_seed(0)
    encoder = mae_clip.TextEncoder(ModelConfig(text_depth=0))
    torch.nn.init.normal_(encoder.embed.position)
    tokens = captions(5)
    for t in range(16):
        summed = encoder.embed.token.weight[tokens[0, t]] + encoder.embed.position[0, t]
        assert torch.allclose(encoder(tokens)[0, t], encoder.norm(summed), atol=1e-6)


def test_the_text_tower_looks_both_ways():
    model = tiny("clip")
    tokens = captions(8)
    other = tokens.clone()
    other[0, 8] = 3 if tokens[0, 8] != 3 else 4
    assert not torch.allclose(model.text_encoder(tokens)[0, 1], model.text_encoder(other)[0, 1])


def test_what_stands_in_the_padding_changes_no_text_feature():
    tokens = example()[1]
    other = torch.where(torch.arange(16) > mae_clip.caption_end(tokens), 55, tokens)
    assert not torch.equal(tokens, other)
    model = tiny("clip")
    assert torch.equal(model.encode_text(tokens), model.encode_text(other))


def test_the_length_of_the_padding_changes_no_text_feature():
    model = tiny("clip")
    shorter = captions(3, 5, context=9)
    longer = F.pad(shorter, (0, 7))
    assert torch.allclose(model.encode_text(shorter), model.encode_text(longer), atol=1e-6)


@pytest.mark.parametrize("method", ["m3ae", "mae_clip"])
def test_what_stands_in_the_padding_changes_no_term_of_the_loss(method):
    images, tokens, image_noise, text_noise, _ = example()
    other = torch.where(torch.arange(16) > mae_clip.caption_end(tokens), 55, tokens)
    model = tiny(method)
    found = model(images, other, image_noise, text_noise)
    assert_equal(found, model(images, tokens, image_noise, text_noise))


@torch.no_grad()
def test_the_trunk_of_m3ae_sees_cls_visible_patches_and_visible_words_in_one_sequence():
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny("m3ae")
    trunk = model.image_encoder
    keep_image = random_mask(image_noise, 0.75)[0]
    keep_text = random_text_mask(text_noise, tokens, 0.75)[0]
    embedded = (
        trunk.patch_embed["proj"](mae_clip.normalise_images(images)).flatten(2).transpose(1, 2)
    )
    for row in range(6):
        sequence = [trunk.cls_token[0, 0]]
        for n in keep_image[row]:
            sequence.append(embedded[row, n] + trunk.pos_embed[0, 1 + n])
        end = tokens[row].tolist().index(EOT)
        for t in keep_text[row]:
            if t <= end:  # what is left out here, the model has to leave out by its padding mask
                words = model.text_embed
                sequence.append(words.token.weight[tokens[row, t]] + words.position[0, t])
        x = torch.stack(sequence).unsqueeze(0)
        for block in trunk.blocks:
            x = block(x, None)
        x = trunk.norm(x)[0]
        found = model.masked_pass(images, tokens, image_noise, text_noise)
        assert torch.allclose(encoded_image_of(found)[row], x[:5], atol=1e-5)


def encoded_image_of(masked_pass):
    """The encoded image (B,1+K,D) in what MAECLIP.masked_pass returns."""
    return masked_pass[2]


# --- Decoder --------------------------------------------------------------------------------------


def decoder_inputs(method="mae_clip", **changes):
    """A decoder, and what the model gives it for the example: arguments of its forward."""
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(method, **changes)
    for name, parameter in model.decoder.named_parameters():
        if "mask_token" in name or "position" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    given = []
    with mock.patch.object(model.decoder, "forward", side_effect=model.decoder.forward) as forward:
        model.masked_pass(images, tokens, image_noise, text_noise)
        given = list(forward.call_args.args)
    return model.decoder, given


def enter_by_hand(modality, encoded, masked, row, end):
    """One modality's rows in the decoder, up to position `end`: each encoded one in its place."""
    rows = []
    for n in range(end):
        if n in masked.keep[row].tolist():
            token = modality.embed(encoded[row, masked.keep[row].tolist().index(n)])
        else:
            token = modality.mask_token[0, 0]
        rows.append(token + modality.position[0, n])
    return rows


@torch.no_grad()
@pytest.mark.parametrize("method", ["mae", "m3ae", "mae_clip"])
def test_the_decoder_agrees_with_a_loop_that_puts_each_kept_one_and_each_mask_token_in_its_place(
    method,
):
    decoder, given = decoder_inputs(method)
    image, encoded_image, text, encoded_text = given
    pixels, logits = decoder(*given)
    for row in range(6):
        sequence = [decoder.image.embed(encoded_image[row, 0])]  # CLS has no position
        sequence += enter_by_hand(decoder.image, encoded_image[:, 1:], image, row, 16)
        if text is not None:
            length = int(text.real[row].sum())  # SOT, words, EOT: padding is left out here
            sequence += enter_by_hand(decoder.text, encoded_text, text, row, length)
        x = torch.stack(sequence).unsqueeze(0)
        for block in decoder.blocks:
            x = block(x, None)
        x = decoder.norm(x)[0]
        for slot in range(image.rest.shape[1]):
            wanted = decoder.image.head(x[1 + image.rest[row, slot]])
            assert torch.allclose(pixels[row, slot], wanted, atol=1e-5)
        if text is None:
            continue
        for slot in range(text.rest.shape[1]):
            t = text.rest[row, slot]
            if text.mask[row, t]:
                wanted = decoder.text.head(x[1 + 16 + t])
                assert torch.allclose(logits[row, slot], wanted, atol=1e-5)


def test_the_decoder_of_one_modality_predicts_nothing_of_the_other():
    decoder, given = decoder_inputs("mae")
    assert decoder(*given)[1] is None
    decoder, given = decoder_inputs("mae_clip", image_weight=0.0)
    pixels, logits = decoder(*given)
    assert pixels is None
    assert logits.shape == (6, 10, 300)


def test_the_decoder_returns_its_predictions_and_changes_nothing():
    decoder, given = decoder_inputs()
    state = copy.deepcopy(decoder.state_dict())
    attributes = set(vars(decoder))
    before = copy.deepcopy([list(given[0]), given[1].detach(), list(given[2]), given[3].detach()])
    first = decoder(*given)
    assert_equal([list(given[0]), given[1].detach(), list(given[2]), given[3].detach()], before)
    assert_equal(decoder.state_dict(), state)
    assert set(vars(decoder)) == attributes
    assert_equal(decoder(*given), first)


def test_removed_ones_of_both_modalities_see_each_other_in_the_decoder():
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(decoder_depth=1)
    before = model.reconstruct(images, tokens, image_noise, text_noise)["image"]
    model.decoder.text.mask_token.data += torch.randn(32)
    after = model.reconstruct(images, tokens, image_noise, text_noise)["image"]
    assert not torch.equal(before, after)


@pytest.mark.parametrize("method", ["mae", "m3ae", "mae_clip"])
def test_a_removed_patch_or_token_cannot_influence_what_is_encoded_or_predicted(method):
    images, tokens, image_noise, text_noise, _ = example()
    image_mask = random_mask(image_noise, 0.75)[1]
    text_mask = random_text_mask(text_noise, tokens, 0.75)[1]
    other_images = torch.where(where_removed(image_mask), 255 - images, images)
    other_tokens = torch.where(text_mask, 99, tokens)
    assert not torch.equal(images, other_images)
    assert not torch.equal(tokens, other_tokens)
    model = tiny(method)
    found = model.masked_pass(other_images, other_tokens, image_noise, text_noise)
    wanted = model.masked_pass(images, tokens, image_noise, text_noise)
    assert_equal(list(found[2:]), list(wanted[2:]))


@pytest.mark.parametrize("method", ["mae", "m3ae", "mae_clip"])
def test_a_visible_patch_does_influence_what_is_predicted(method):
    images, tokens, image_noise, text_noise, _ = example()
    image_mask = random_mask(image_noise, 0.75)[1]
    other_images = torch.where(where_removed(image_mask), images, 255 - images)
    model = tiny(method)
    found = model.reconstruct(other_images, tokens, image_noise, text_noise)["image"]
    wanted = model.reconstruct(images, tokens, image_noise, text_noise)["image"]
    assert not torch.allclose(found[image_mask], wanted[image_mask])


# --- Losses ---------------------------------------------------------------------------------------


def test_contrastive_loss_agrees_with_a_loop_over_both_directions():
    images = unit(5, 7, seed=1)
    texts = unit(5, 7, seed=2)
    total = 0.0
    for i in range(5):
        row = [math.exp(11 * sum(images[i] * texts[j])) for j in range(5)]
        column = [math.exp(11 * sum(images[j] * texts[i])) for j in range(5)]
        total -= math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    loss = mae_clip.contrastive_loss(images, texts, torch.tensor(11, dtype=torch.float64))
    assert loss.item() == pytest.approx(total / 10, abs=1e-12)


def test_contrastive_loss_of_two_orthogonal_pairs_is_as_worked_by_hand():
    eye = torch.eye(2)
    assert mae_clip.contrastive_loss(eye, eye, 1.0).item() == pytest.approx(
        math.log(1 + math.exp(-1))
    )
    crossed = mae_clip.contrastive_loss(eye, eye.flip(0), 1.0).item()
    assert crossed == pytest.approx(math.log(1 + math.e))


def test_image_loss_agrees_with_a_loop_over_removed_patches_and_the_unbiased_variance():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    patches = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    total = 0.0
    for b, n in ((0, 0), (0, 2), (1, 2)):
        target = patches[b, n].tolist()
        mean = sum(target) / 12
        variance = sum((x - mean) ** 2 for x in target) / 11
        for k in range(12):
            wanted = (target[k] - mean) / math.sqrt(variance + 1e-6)
            total += (prediction[b, n, k].item() - wanted) ** 2 / 12
    loss = mae_clip.masked_mean(mae_clip.image_error(prediction, patches), mask)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)


def test_image_error_without_normalisation_is_the_mean_squared_difference_of_each_patch():
    prediction = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    patches = torch.tensor([[[1.0, 0.0, 3.0], [3.0, 0.0, 0.0]]])
    error = mae_clip.image_error(prediction, patches, normalise=False)
    assert error.tolist() == [[pytest.approx(4 / 3), pytest.approx(3.0)]]


def test_predicting_zero_has_an_image_error_just_under_one():
    patches = torch.randn(4, 9, 768, generator=torch.Generator().manual_seed(0))
    error = mae_clip.image_error(torch.zeros(4, 9, 768), patches)
    assert error.mean().item() == pytest.approx(767 / 768, abs=1e-4)


def test_a_flat_patch_has_a_target_of_zero():
    flat = torch.full((1, 1, 768), 0.9337, dtype=torch.bfloat16)
    assert mae_clip.patch_targets(flat).abs().max() < 1e-2


def test_text_loss_agrees_with_a_loop_over_removed_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[1, 5, 0, 2], [1, 7, 2, 0]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    total = 0.0
    for b, t in ((0, 1), (0, 2), (1, 1)):
        values = logits[b, t].tolist()
        total -= values[tokens[b, t]] - math.log(sum(math.exp(x) for x in values))
    loss = mae_clip.masked_mean(mae_clip.text_error(logits, tokens), mask)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)


def test_masked_mean_is_over_the_removed_ones_of_the_whole_batch_and_not_of_each_sample():
    errors = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, True, True], [False, False, True]])
    assert mae_clip.masked_mean(errors, mask).item() == (1 + 2 + 4 + 32) / 4


def test_what_is_visible_carries_no_gradient():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 8, generator=generator) < 0.5
    prediction = torch.randn(3, 8, 12, generator=generator, requires_grad=True)
    patches = torch.randn(3, 8, 12, generator=generator)
    mae_clip.masked_mean(mae_clip.image_error(prediction, patches), mask).backward()
    assert torch.equal(prediction.grad.abs().sum(dim=-1) > 0, mask)


def test_masked_mean_is_zero_with_zero_gradient_where_nothing_is_removed():
    errors = torch.rand(2, 3, requires_grad=True)
    loss = mae_clip.masked_mean(errors, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not errors.grad.any()


def test_simclr_loss_agrees_with_a_loop_over_all_views_and_normalises_them_itself():
    first = 3 * unit(4, 6, seed=1)
    second = 2 * unit(4, 6, seed=2)
    views = [view / view.norm() for view in [*first, *second]]
    total = 0.0
    for i in range(8):
        similarity = {}
        for j in range(8):
            if j != i:
                similarity[j] = math.exp(torch.dot(views[i], views[j]) / 0.2)
        total -= math.log(similarity[(i + 4) % 8] / sum(similarity.values()))
    loss = mae_clip.simclr_loss(first, second, temperature=0.2)
    assert loss.item() == pytest.approx(total / 8, rel=1e-10)


def test_the_temperature_of_simclr_is_a_tenth_unless_given():
    first = unit(4, 6, seed=1)
    second = unit(4, 6, seed=2)
    assert torch.equal(
        mae_clip.simclr_loss(first, second), mae_clip.simclr_loss(first, second, 0.1)
    )


# --- The model: features and reconstructions ------------------------------------------------------


def test_pooling_takes_the_mean_or_the_maximum_of_the_patches_or_cls():
    encoded = torch.tensor([[[9.0, 7.0], [1.0, 6.0], [3.0, 2.0]]])  # CLS and two patches
    assert mae_clip.pool(encoded, "gap").tolist() == [[2.0, 4.0]]
    assert mae_clip.pool(encoded, "max").tolist() == [[3.0, 6.0]]
    assert mae_clip.pool(encoded, "cls").tolist() == [[9.0, 7.0]]


@pytest.mark.parametrize("pool", ["gap", "max", "cls"])
def test_the_image_feature_is_pooled_as_asked_then_projected_and_of_unit_norm(pool):
    images = example()[0]
    model = tiny("clip", pool=pool)
    pooled = mae_clip.pool(model.image_encoder(images), pool)
    wanted = pooled @ model.image_proj.weight.T
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    assert torch.allclose(model.encode_image(images), wanted, atol=1e-6)
    assert torch.equal(model.image_feature(model.image_encoder(images)), model.encode_image(images))


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_the_text_feature_is_the_output_at_eot_however_images_are_pooled(pool):
    tokens = example()[1]
    model = tiny("clip", pool=pool)
    encoded = model.text_encoder(tokens)
    found = model.encode_text(tokens)
    for row in range(6):
        at_end = encoded[row, tokens[row].tolist().index(EOT)]
        wanted = model.text_proj.weight @ at_end
        assert torch.allclose(found[row], wanted / wanted.norm(), atol=1e-6)


@pytest.mark.parametrize("method", ["mae", "m3ae"])
def test_the_image_feature_of_a_method_without_projection_is_what_was_pooled(method):
    images = example()[0]
    model = tiny(method)
    pooled = model.image_encoder(images)[:, 1:].mean(dim=1)
    wanted = pooled / pooled.norm(dim=-1, keepdim=True)
    assert torch.allclose(model.encode_image(images), wanted, atol=1e-6)


@pytest.mark.parametrize("method", ["mae", "m3ae"])
def test_a_method_without_contrastive_loss_says_so(method):
    model = tiny(method)
    assert "contrastive" not in model.terms
    with pytest.raises(ValueError, match=f"{method} has no contrastive loss"):
        model.encode_text(captions(3))


@pytest.mark.parametrize("method", ["clip", "slip"])
def test_a_method_without_decoder_says_so(method):
    images, tokens, *_ = example()
    model = tiny(method)
    assert not model.has_decoder
    with pytest.raises(ValueError, match=f"{method} has no reconstruction loss"):
        model.reconstruct(images, tokens)


def test_uint8_images_are_normalised_inside_the_model():
    batch = example()
    model = tiny()
    normalised = mae_clip.normalise_images(batch[0])
    assert_equal(model(normalised, *batch[1:]), model(*batch))
    assert torch.equal(model.encode_image(normalised), model.encode_image(batch[0]))


@pytest.mark.parametrize("method", ["mae", "m3ae", "mae_clip"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_shows_the_truth_where_visible_in_the_space_of_the_loss(method, norm_pix):
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(method, norm_pix=norm_pix)
    found = model.reconstruct(images, tokens, image_noise, text_noise)
    truth = mae_clip.patchify(mae_clip.normalise_images(images), 8)
    if norm_pix:
        truth = mae_clip.patch_targets(truth)
    visible = ~found["image_mask"]
    assert torch.equal(found["image_mask"], random_mask(image_noise, 0.75)[1])
    assert torch.equal(found["image"][visible], truth[visible])


@pytest.mark.parametrize("method", ["mae", "m3ae", "mae_clip"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_shows_of_removed_patches_what_the_loss_saw(method, norm_pix):
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(method, norm_pix=norm_pix)
    found = model.reconstruct(images, tokens, image_noise, text_noise)
    patches = mae_clip.patchify(mae_clip.normalise_images(images), 8)
    errors = mae_clip.image_error(found["image"], patches, norm_pix)
    loss = mae_clip.masked_mean(errors, found["image_mask"])
    terms = model(images, tokens, image_noise, text_noise)
    assert loss.item() == pytest.approx(terms["image"].item(), rel=1e-5)


@pytest.mark.parametrize("method", ["m3ae", "mae_clip"])
def test_reconstruct_shows_the_likeliest_word_where_one_was_removed_and_elsewhere_the_captions(
    method,
):
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(method)
    found = model.reconstruct(images, tokens, image_noise, text_noise)
    mask = random_text_mask(text_noise, tokens, 0.75)[1]
    assert torch.equal(found["text_mask"], mask)
    assert torch.equal(found["text"][~mask], tokens[~mask])
    _, text, _, _, logits = model.masked_pass(images, tokens, image_noise, text_noise)
    for row in range(6):
        for slot, t in enumerate(text.rest[row].tolist()):
            if mask[row, t]:
                assert found["text"][row, t] == logits[row, slot].argmax()


def test_reconstruct_of_mae_leaves_the_caption_alone():
    images, tokens, image_noise, text_noise, _ = example()
    found = tiny("mae").reconstruct(images, tokens, image_noise, text_noise)
    assert torch.equal(found["text"], tokens)
    assert not found["text_mask"].any()


# --- The model: the five methods ------------------------------------------------------------------

ENCODER = {"image_encoder"}
TOWERS = {"image_encoder", "text_encoder", "image_proj", "text_proj", "logit_scale"}


@pytest.mark.parametrize(
    "method, changes, parts",
    [
        ("clip", {}, TOWERS),
        ("mae", {}, ENCODER | {"decoder"}),
        ("m3ae", {}, ENCODER | {"text_embed", "decoder"}),
        ("mae_clip", {}, TOWERS | {"decoder"}),
        ("slip", {}, TOWERS | {"simclr_head"}),
        ("mae_clip", {"image_weight": 0.0, "text_weight": 0.0}, TOWERS),
        ("mae_clip", {"contrastive_weight": 0.0}, ENCODER | {"text_encoder", "decoder"}),
        ("m3ae", {"text_weight": 0.0}, ENCODER | {"decoder"}),
        ("slip", {"contrastive_weight": 0.0}, ENCODER | {"simclr_head"}),
        ("slip", {"simclr_weight": 0.0}, TOWERS),
    ],
)
def test_a_method_is_built_of_exactly_the_parts_that_it_trains_and_each_has_gradient(
    method, changes, parts
):
    model = tiny(method, **changes)
    model(*example())["loss"].backward()
    assert {name.split(".")[0] for name in model.state_dict()} == parts
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("left_out, other", [("image", "text"), ("text", "image")])
def test_one_reconstruction_alone_leaves_the_other_modality_out_of_the_decoder(left_out, other):
    model = tiny(**{f"{left_out}_weight": 0.0})
    terms = model(*example())
    assert left_out not in terms
    assert other in terms
    assert not hasattr(model.decoder, left_out)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_weighted_sum_of_the_unweighted_terms(method):
    weights = {"contrastive": 0.7, "image": 0.3, "text": 0.2, "simclr": 0.5}
    changes = {f"{term}_weight": weight for term, weight in weights.items()}
    terms = tiny(method, **changes)(*example())
    assert tuple(terms) == (*METHODS[method], "loss")
    total = sum(weights[term] * terms[term].item() for term in METHODS[method])
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    assert all(term.ndim == 0 for term in terms.values())
    unweighted = tiny(method)(*example())
    for term in METHODS[method]:
        assert torch.equal(terms[term], unweighted[term])


@pytest.mark.parametrize("method", METHODS)
def test_terms_are_the_same_in_training_and_evaluation_mode(method):
    model = tiny(method)
    assert_equal(model.eval()(*example()), model.train()(*example()))


def test_the_terms_are_those_of_the_tested_losses_on_the_models_features():
    images, tokens, image_noise, text_noise, views = example()
    model = tiny("clip")
    terms = model(images, tokens, image_noise, text_noise)
    features = (model.encode_image(images), model.encode_text(tokens))
    wanted = mae_clip.contrastive_loss(*features, 1 / 0.07)  # CLIP's first temperature
    assert terms["contrastive"].item() == pytest.approx(wanted.item(), rel=1e-6)
    model = tiny("slip")
    terms = model(images, tokens, image_noise, text_noise, views)
    heads = [model.simclr_head(model.image_encoder(view)[:, 1:].mean(dim=1)) for view in views]
    wanted = mae_clip.simclr_loss(*heads)
    assert terms["simclr"].item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("method", ["m3ae", "mae_clip"])
def test_the_text_term_is_the_mean_cross_entropy_of_the_removed_words(method):
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(method)
    _, text, _, _, logits = model.masked_pass(images, tokens, image_noise, text_noise)
    errors = []
    for row in range(6):
        for slot, t in enumerate(text.rest[row].tolist()):
            if text.mask[row, t]:
                errors.append(-logits[row, slot].log_softmax(dim=0)[tokens[row, t]].item())
    assert len(errors) == text.mask.sum()
    terms = model(images, tokens, image_noise, text_noise)
    assert terms["text"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("method, off", [("mae_clip", ("image", "text")), ("slip", ("simclr",))])
def test_a_method_without_what_it_adds_follows_clip_bit_for_bit(method, off):
    followed = []
    for model in (tiny("clip"), tiny(method, **{f"{term}_weight": 0.0 for term in off})):
        optimizers = mae_clip.make_optimizers(model, model.config)
        rows = []
        for step in range(4):
            batch = example(seed=step)
            rows.append(mae_clip.train_step(model, optimizers, FLOAT32, batch))
        followed.append([rows, model.state_dict()])
    assert_equal(followed[1], followed[0])


def test_methods_start_from_the_same_weights_in_what_they_share():
    base = tiny("mae_clip").state_dict()
    for method in METHODS:
        for name, values in tiny(method).state_dict().items():
            if name in base:
                assert torch.equal(base[name], values), (method, name)


def test_another_seed_starts_from_other_weights():
    first = tiny("mae", seed=0).image_encoder
    second = tiny("mae", seed=1).image_encoder
    assert not torch.equal(first.cls_token, second.cls_token)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, second.blocks[0].mlp.fc1.weight)


def test_weights_start_as_mae_draws_them():
    for name, parameter in tiny().named_parameters():
        if "token" in name or "position" in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.5), name
        elif parameter.ndim > 1:
            rows = parameter.flatten(1).shape  # the patch convolution counts as a matrix
            bound = math.sqrt(6 / sum(rows))
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
        elif name == "logit_scale":
            assert parameter.exp().item() == pytest.approx(1 / 0.07)
        else:
            assert not parameter.any(), name


def test_equal_ratios_share_one_masked_image_pass():
    model = tiny(contrastive_mask_ratio=0.75)
    lengths = []
    model.image_encoder.register_forward_hook(lambda _, given, out: lengths.append(out.shape[1]))
    model(*example())
    assert lengths == [5]  # CLS and a quarter of 16 patches


def test_one_shared_pass_gives_the_terms_that_two_passes_would():
    batch = example()
    terms = tiny(contrastive_mask_ratio=0.75)(*batch)
    alone = tiny("clip", contrastive_mask_ratio=0.75)(*batch)
    assert torch.equal(terms["contrastive"], alone["contrastive"])
    assert torch.equal(terms["image"], tiny()(*batch)["image"])


def test_unequal_ratios_mask_the_image_for_each_loss_as_asked():
    batch = example()
    terms = tiny(contrastive_mask_ratio=0.5)(*batch)
    alone = tiny("clip", contrastive_mask_ratio=0.5)(*batch)
    assert torch.equal(terms["contrastive"], alone["contrastive"])
    assert torch.equal(terms["image"], tiny()(*batch)["image"])


def test_a_masked_contrastive_pass_does_not_see_what_is_removed():
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny("clip", contrastive_mask_ratio=0.5)
    hidden = where_removed(random_mask(image_noise, 0.5)[1])
    other = torch.where(hidden, 255 - images, images)
    assert_equal(
        model(other, tokens, image_noise, text_noise),
        model(images, tokens, image_noise, text_noise),
    )


def test_the_contrastive_pass_sees_the_whole_image_unless_asked():
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny()
    hidden = where_removed(random_mask(image_noise, 0.75)[1])
    other = torch.where(hidden, 255 - images, images)
    found = model(other, tokens, image_noise, text_noise)
    wanted = model(images, tokens, image_noise, text_noise)
    assert not torch.allclose(found["contrastive"], wanted["contrastive"])


@pytest.mark.parametrize("method", ["m3ae", "mae_clip"])
def test_captions_without_a_word_left_give_a_zero_text_term_with_zero_gradient(method):
    images, _, image_noise, text_noise, _ = example()
    model = tiny(method)
    terms = model(images, captions(0, 0, 0, 0, 0, 0), image_noise, text_noise)
    assert terms["text"].item() == 0
    terms["text"].backward(retain_graph=True)
    assert not any(gradient.any() for gradient in gradients(model).values())
    terms["loss"].backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_mae_ignores_tokens():
    images, tokens, *noise_and_views = example()
    model = tiny("mae")
    other = torch.zeros_like(tokens)
    assert_equal(model(images, other, *noise_and_views), model(images, tokens, *noise_and_views))


def test_noise_that_is_not_given_comes_from_torchs_global_generator():
    images, tokens, *_ = example()
    model = tiny()
    torch.manual_seed(3)
    found = model(images, tokens)
    torch.manual_seed(3)
    image_noise = torch.rand(6, 16)
    text_noise = torch.rand(6, 16)
    assert_equal(found, model(images, tokens, image_noise, text_noise))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_overfits_8_pairs(method):
    model = tiny(
        method,
        depth=1,
        steps=70,
        warmup=5,
        lr=0.02,
        mask_ratio=0.5,
        text_mask_ratio=0.5,
        weight_decay=0.0,
        image_weight=1.0,
        text_weight=1.0,
    )
    optimizers = mae_clip.make_optimizers(model, model.config)
    torch.manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    images = images.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # a colour a patch
    views = (images, images.flip(3))
    batch = (images, captions(*[5] * 8), torch.rand(8, 16), torch.rand(8, 16), views)
    before = model(*batch)
    for step in range(70):
        set_rate(optimizers, mae_clip.learning_rate(step, model.config))
        mae_clip.train_step(model, optimizers, FLOAT32, batch)
    after = model(*batch)
    for name in METHODS[method]:
        assert after[name] < 0.35 * before[name], name


# --- Pieces, graphs, work -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.75])
@pytest.mark.parametrize("dtype, pieces, limit", [("float32", 2, 1e-6), ("float64", 4, 1e-10)])
def test_pieces_give_the_losses_and_gradients_of_the_whole_batch(
    method, ratio, dtype, pieces, limit
):
    dtype = getattr(torch, dtype)
    images, tokens, image_noise, text_noise, views = example(8)
    images = mae_clip.normalise_images(images).to(dtype)
    views = [mae_clip.normalise_images(view).to(dtype) for view in views]
    models = []
    for count in (1, pieces):
        model = tiny(method, accumulate=count, contrastive_mask_ratio=ratio).to(dtype)
        terms = model(images, tokens, image_noise, text_noise, views)
        terms["loss"].backward()
        models.append((model, {name: term.detach() for name, term in terms.items()}))
    whole, whole_terms = models[0]
    parts, part_terms = models[1]
    for name in whole_terms:
        assert part_terms[name].item() == pytest.approx(whole_terms[name].item(), rel=limit)
    assert relative_distance(gradients(parts), gradients(whole)) <= limit


def test_pieces_that_do_not_divide_the_batch_give_its_losses_too():
    batch = example(7)
    wanted = tiny()(*batch)
    found = tiny(accumulate=3)(*batch)
    for name in wanted:
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=1e-6)


def saved_bytes(model):
    """Bytes that autograd keeps of a forward pass for the backward one."""
    saved = []

    def count(x):
        saved.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model(*example())
    return sum(saved)


def test_pieces_keep_less_in_memory():
    assert saved_bytes(tiny(depth=4, accumulate=3)) < 0.5 * saved_bytes(tiny(depth=4))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_compiles_as_one_graph_that_no_mask_or_caption_makes_anew(method):
    torch._dynamo.reset()
    net = torch.compile(tiny(method, depth=1), backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(10):
            images, _, *rest = example(seed=seed)
            tokens = captions(*[seed % 15] * 6, seed=seed)
            net(images, tokens, *rest)["loss"].backward()


def test_a_model_whose_blocks_are_compiled_has_the_same_terms_and_gradients_in_pieces_too():
    torch._dynamo.reset()
    plain = tiny(depth=1, accumulate=2)
    wanted = plain(*example())
    wanted["loss"].backward()
    model = tiny(depth=1, accumulate=2)
    for module in model.modules():
        if isinstance(module, mae_clip.Block):
            module.compile(backend="aot_eager", dynamic=False)
    found = model(*example())
    found["loss"].backward()
    for name in wanted:
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=1e-5)
    assert relative_distance(gradients(model), gradients(plain)) < 1e-5


@pytest.mark.parametrize(
    "device, width, asked, blocks",
    [
        ("cpu", 64, None, 0),
        ("cpu", 64, True, 3),  # one block a tower, and the decoder's
        ("cpu", 512, None, 0),
        ("cuda", 512, None, 3),
        ("cuda", 512, False, 0),
        ("cuda", 64, None, 0),
        ("cuda", 64, True, 3),
    ],
)
def test_blocks_are_compiled_where_asked_and_else_on_cuda_if_they_are_large(
    device, width, asked, blocks
):
    model = tiny(depth=1)
    config = preset("tiny", width=width, compile=asked)
    with mock.patch.object(mae_clip.Block, "compile") as compile_block:
        mae_clip.compile_blocks(model, config, torch.device(device))
    assert compile_block.call_count == blocks


@pytest.mark.parametrize("scale, count", [("base", 85_798_656), ("large", 303_301_632)])
def test_the_image_encoder_has_the_size_of_its_vit(scale, count):
    with torch.device("meta"):
        encoder = mae_clip.ImageEncoder(preset(scale))
    assert sum(values.numel() for values in encoder.state_dict().values()) == count


def forward_flops(**changes):
    """Floating-point operations of a forward pass of one pair at scale base."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = fake(preset("base", **changes))
        images = torch.zeros(1, 3, 224, 224)
        tokens = torch.zeros(1, 77, dtype=torch.int64)
        model(images, tokens, torch.rand(1, 196), torch.rand(1, 77))
    return counter.get_total_flops()


def test_work_follows_the_visible_tokens():
    clip = forward_flops(method="clip")
    assert forward_flops(method="mae") <= 0.48 * clip
    assert forward_flops(method="mae_clip") <= 1.70 * clip
    assert forward_flops(method="mae_clip", contrastive_mask_ratio=0.75) <= 0.85 * clip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_forward_and_backward_run_on_tensors_without_values_so_they_wait_for_no_device(
    method, pieces
):
    with FakeTensorMode():
        images = torch.zeros(6, 3, 32, 32)
        tokens = torch.zeros(6, 16, dtype=torch.int64)
        model = fake(preset("tiny", method=method, accumulate=pieces))
        terms = model(images, tokens, torch.rand(6, 16), torch.rand(6, 16), (images, images))
        terms["loss"].backward()


# --- Across ranks ---------------------------------------------------------------------------------


def on_one_rank(rank, world, port, folder):
    """Losses and averaged gradients of one gloo rank's share of a batch, as DDP averages them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=limit)
    images, tokens, image_noise, text_noise, views = example(8)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    views = [view[mine] for view in views]
    batch = (images[mine], tokens[mine], image_noise[mine], text_noise[mine], views)
    result = {}
    for method in METHODS:
        for pieces in (1, 2):
            net = torch.nn.parallel.DistributedDataParallel(tiny(method, accumulate=pieces))
            terms = net(*batch)
            terms["loss"].backward()
            with torch.no_grad():
                evaluated = net.module(*batch)
            result[method, pieces] = {
                "terms": {name: term.detach() for name, term in terms.items()},
                "without gradient": evaluated,
                "gradients": gradients(net.module),
            }
    result["own rows"] = mae_clip.own_rows(torch.zeros(4, 2))
    result["gathered"] = mae_clip.gather(torch.tensor([[rank, 7.0]])).tolist()
    if rank == 0:  # the other one is gone by then: no collective could return
        model = tiny()
        result["features"] = model.encode_image(images[:4]), model.encode_text(tokens[:4])
        result["picture"] = model.reconstruct(*batch[:4])["image"]
    torch.save(result, f"{folder}/{rank}.pt")
    machine.end_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What on_one_rank found on either of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    port = 20_000 + os.getpid() % 20_000
    torch.multiprocessing.spawn(on_one_rank, (2, port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_each_of_two_ranks_has_the_losses_of_one_process(two_ranks, method, pieces):
    wanted = tiny(method)(*example(8))
    for rank in two_ranks:
        for name, term in rank[method, pieces]["terms"].items():
            assert term.item() == pytest.approx(wanted[name].item(), rel=1e-6), name


@pytest.mark.parametrize("method", METHODS)
def test_who_the_ranks_are_does_not_depend_on_whether_gradients_are_on(two_ranks, method):
    wanted = tiny(method)(*example(8))
    for rank in two_ranks:
        for name, term in rank[method, 1]["without gradient"].items():
            assert term.item() == pytest.approx(wanted[name].item(), rel=1e-6), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_mean_over_two_ranks_of_the_gradients_is_that_of_one_process(two_ranks, method, pieces):
    model = tiny(method)
    model(*example(8))["loss"].backward()
    wanted = gradients(model)
    for rank in two_ranks:
        found = rank[method, pieces]["gradients"]
        assert relative_distance(found, wanted) < 1e-6
        for name in wanted:
            difference = (found[name] - wanted[name]).norm()
            assert difference < 1e-5 * (wanted[name].norm() + 1e-6), name


def test_gathered_rows_stand_in_the_order_of_the_ranks(two_ranks):
    for rank in range(2):
        assert two_ranks[rank]["gathered"] == [[0, 7], [1, 7]]
    assert two_ranks[0]["own rows"].tolist() == [0, 1, 2, 3]
    assert two_ranks[1]["own rows"].tolist() == [4, 5, 6, 7]


def test_a_rank_that_evaluates_alone_waits_for_nobody(two_ranks):
    images, tokens, image_noise, text_noise, _ = example(8)
    model = tiny()
    features = two_ranks[0]["features"]
    assert torch.allclose(features[0], model.encode_image(images[:4]), atol=1e-6)
    assert torch.allclose(features[1], model.encode_text(tokens[:4]), atol=1e-6)
    picture = model.reconstruct(images[:4], tokens[:4], image_noise[:4], text_noise[:4])["image"]
    assert torch.allclose(two_ranks[0]["picture"], picture, atol=1e-5)


def test_one_process_gathers_its_own_rows():
    x = torch.randn(3, 2)
    assert mae_clip.gather(x) is x
    assert mae_clip.own_rows(x).tolist() == [0, 1, 2]


# --- Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, speedup, dtype",
    [
        ("auto", 3.0, torch.bfloat16),
        ("auto", 1.0, torch.float32),
        ("bf16", 0.5, torch.bfloat16),
        ("fp32", 3.0, torch.float32),
    ],
)
def test_on_a_cpu_products_are_in_bfloat16_where_asked_or_where_that_is_faster(
    monkeypatch, precision, speedup, dtype
):
    monkeypatch.setattr(machine, "bf16_speedup", lambda width: speedup)
    config = preset("tiny", device="cpu", precision=precision)
    device, autocast = mae_clip.pick_device(config)
    with autocast:
        assert (torch.rand(2, 2, device=device) @ torch.rand(2, 2, device=device)).dtype == dtype


def test_the_measured_speed_of_bfloat16_is_a_positive_ratio():
    assert 0 < machine.bf16_speedup(16) < 1000


def test_without_a_gpu_auto_is_the_cpu_also_where_torch_is_built_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, _ = mae_clip.pick_device(preset("tiny"))
    assert device.type == "cpu"


def test_a_device_that_is_not_there_is_named_in_one_line():
    with pytest.raises(DataError, match=r"^--device cuda:77: [^\n]+$"):
        mae_clip.pick_device(preset("tiny", device="cuda:77"))


def test_contrastive_logits_and_softmax_are_in_float32_under_bfloat16():
    images = unit(64, 32, seed=1).float()
    texts = unit(64, 32, seed=2).float()
    wanted = mae_clip.contrastive_loss(images, texts, 100.0)
    with BFLOAT16:
        found = mae_clip.contrastive_loss(images, texts, 100.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_features_in_bfloat16_are_compared_in_float32():
    images = unit(64, 32, seed=1).bfloat16()
    texts = unit(64, 32, seed=2).bfloat16()
    wanted = mae_clip.contrastive_loss(images.float(), texts.float(), 100.0)
    with BFLOAT16:
        found = mae_clip.contrastive_loss(images, texts, 100.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_simclrs_logits_are_in_float32_under_bfloat16():
    first = unit(64, 32, seed=1).bfloat16()
    second = unit(64, 32, seed=2).bfloat16()
    wanted = mae_clip.simclr_loss(first.float(), second.float())
    with BFLOAT16:
        found = mae_clip.simclr_loss(first, second)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_pixel_targets_and_their_error_are_in_float32_under_bfloat16():
    generator = torch.Generator().manual_seed(0)
    patches = 20 + torch.randn(4, 192, generator=generator)  # bfloat16 knows 20 to an eighth
    prediction = torch.randn(4, 192, generator=generator).bfloat16()
    with BFLOAT16:
        targets = mae_clip.patch_targets(patches)
        errors = mae_clip.image_error(prediction, patches)
    assert torch.equal(targets, mae_clip.patch_targets(patches))
    assert errors.dtype == torch.float32
    assert torch.equal(errors, mae_clip.image_error(prediction.float(), patches))


def test_the_cross_entropy_of_words_is_in_float32_under_bfloat16():
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(8)
    with BFLOAT16:
        found = mae_clip.text_error(logits, tokens)
    assert found.dtype == torch.float32
    assert torch.allclose(found, mae_clip.text_error(logits.float(), tokens), rtol=1e-6)


def test_the_statistics_of_a_layer_norm_are_in_float32_under_bfloat16():
    generator = torch.Generator().manual_seed(0)
    x = (20 + torch.randn(4, 64, generator=generator)).bfloat16()
    norm = mae_clip.Block(64, 2).norm1
    with BFLOAT16:
        found = norm(x)
    wanted = norm(x.float())
    assert torch.allclose(found.float(), wanted, rtol=2**-8, atol=1e-3)


def test_features_come_out_in_float32_of_unit_norm_under_bfloat16():
    images, tokens, *_ = example()
    model = tiny("clip")
    with BFLOAT16:
        found = [model.encode_image(images), model.encode_text(tokens)]
    for features in found:
        assert features.dtype == torch.float32
        assert torch.allclose(features.norm(dim=-1), torch.ones(6), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_terms_in_bfloat16_are_close_to_those_in_float32(method):
    model = tiny(method)
    wanted = model(*example())
    with BFLOAT16:
        found = model(*example())
    for name in wanted:
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=0.02)


# --- Optimisers and schedule ----------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine():
    config = Config(lr=0.8, warmup=4, steps=12)
    rates = [mae_clip.learning_rate(step, config) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    wanted = [0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert rates[4:] == pytest.approx(wanted)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert mae_clip.learning_rate(0, Config(lr=0.8, warmup=0, steps=12)) == 0.8


def optimizer_names(model, optimizer):
    """[{names of a group's parameters}] of an optimiser."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        found.append({names[id(parameter)] for parameter in group["params"]})
    return found


def test_muon_has_the_matrices_of_linear_layers_and_adamw_all_else():
    model = tiny(optimizer="muon")
    adamw, muon = mae_clip.make_optimizers(model, model.config)
    [matrices] = optimizer_names(model, muon)
    decaying, free = optimizer_names(model, adamw)
    wanted = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            wanted.add(f"{name}.weight")
    assert matrices == wanted
    assert decaying == {
        "image_encoder.patch_embed.proj.weight",
        "text_encoder.embed.token.weight",
    }
    assert matrices | decaying | free == {name for name, _ in model.named_parameters()}


def test_adamw_alone_has_every_parameter():
    model = tiny(optimizer="adamw")
    [adamw] = mae_clip.make_optimizers(model, model.config)
    decaying, free = optimizer_names(model, adamw)
    assert decaying | free == {name for name, _ in model.named_parameters()}
    assert not decaying & free


def test_neither_biases_nor_norms_nor_tokens_nor_positions_nor_the_scale_decay():
    model = tiny(optimizer="adamw", weight_decay=0.3)
    [adamw] = mae_clip.make_optimizers(model, model.config)
    decaying, free = optimizer_names(model, adamw)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0]
    parameters = dict(model.named_parameters())
    for name in decaying:
        assert name.endswith("weight") and parameters[name].ndim > 1, name
    for name in free:
        vector = parameters[name].ndim < 2
        assert vector or "token" in name or "position" in name, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_matrix_without_gradient_decays_by_rate_times_decay_with_either_optimizer(optimizer):
    model = tiny(optimizer=optimizer, weight_decay=0.5)
    optimizers = mae_clip.make_optimizers(model, model.config)
    set_rate(optimizers, 0.1)
    weight = model.image_proj.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    assert torch.allclose(weight, before * (1 - 0.1 * 0.5), rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_orthogonalising_keeps_the_singular_vectors_and_makes_their_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.T @ mae_clip.orthogonalise(x) @ v.T
    values = turned.diagonal()
    assert torch.allclose(turned, torch.diag(values), atol=1e-4)
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_has_the_settings_of_the_run():
    model = tiny(lr=0.3, muon_momentum=0.7, muon_rms=0.4, weight_decay=0.2)
    _, muon = mae_clip.make_optimizers(model, model.config)
    [group] = muon.param_groups
    found = {name: group[name] for name in group if name != "params"}
    assert found == {"lr": 0.3, "momentum": 0.7, "rms": 0.4, "weight_decay": 0.2}


def test_muon_moves_a_matrix_along_its_orthogonalised_momentum_which_looks_ahead():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    rates = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.7, "rms": 0.3}
    optimizer = mae_clip.Muon([weight], rates)
    momentum = torch.zeros(6, 4)
    for _ in range(3):
        before = weight.detach().clone()
        gradient = torch.randn(6, 4)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.7 * momentum + 0.3 * gradient
        direction = mae_clip.orthogonalise(0.3 * gradient + 0.7 * momentum)
        size = 0.3 * math.sqrt(6)  # the longer side's
        wanted = before * (1 - 0.1 * 0.5) - 0.1 * size * direction
        assert torch.allclose(weight, wanted, atol=1e-5)


def test_a_step_gives_the_terms_the_loss_and_the_gradients_norm():
    model = tiny()
    terms = model(*example())
    terms["loss"].backward()
    norm = torch.cat([gradient.flatten() for gradient in gradients(model).values()]).double().norm()
    model = tiny()
    optimizers = mae_clip.make_optimizers(model, model.config)
    row = mae_clip.train_step(model, optimizers, FLOAT32, example())
    wanted = [term.item() for term in terms.values()]
    assert row.tolist() == pytest.approx([*wanted, norm.item()], rel=1e-5)


def test_a_step_clips_the_gradients_norm_at_one():
    model = tiny(contrastive_weight=1000.0)
    seen = []

    def remember(_):
        seen.append(torch.cat([g.flatten() for g in gradients(model).values()]).norm().item())

    optimizers = mae_clip.make_optimizers(model, model.config)
    with mock.patch.object(optimizers[-1], "step", side_effect=lambda: remember(None)):
        row = mae_clip.train_step(model, [optimizers[-1]], FLOAT32, example())
    assert row[-1] > 1
    assert seen == [pytest.approx(1, rel=1e-4)]


def test_a_step_leaves_no_gradient_for_the_next():
    found = []
    for _ in range(2):
        model = tiny(optimizer="adamw")
        optimizers = mae_clip.make_optimizers(model, model.config)
        mae_clip.train_step(model, optimizers, FLOAT32, example(seed=1))
        model.zero_grad()
        found.append(mae_clip.train_step(model, optimizers, FLOAT32, example(seed=2)))
    assert torch.equal(found[0], found[1])
    assert not gradients(model)


def state_of(model, optimizers):
    """All that a step may change, copied."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    return copy.deepcopy([dict(model.state_dict()), states])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_loss_is_not_finite_changes_nothing_and_gives_none(optimizer):
    model = tiny(optimizer=optimizer)
    optimizers = mae_clip.make_optimizers(model, model.config)
    mae_clip.train_step(model, optimizers, FLOAT32, example())
    before = state_of(model, optimizers)
    images, *rest = example()
    row = mae_clip.train_step(model, optimizers, FLOAT32, (images / 0.0, *rest))
    assert row is None
    assert_equal(state_of(model, optimizers), before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "name",
    ["logit_scale", "image_proj.weight", "text_encoder.embed.token.weight"],
)
def test_a_step_with_one_gradient_that_is_not_finite_changes_nothing(optimizer, value, name):
    model = tiny(optimizer=optimizer)
    optimizers = mae_clip.make_optimizers(model, model.config)
    mae_clip.train_step(model, optimizers, FLOAT32, example())
    before = state_of(model, optimizers)

    def spoil(gradient):
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    handle = dict(model.named_parameters())[name].register_hook(spoil)
    row = mae_clip.train_step(model, optimizers, FLOAT32, example(seed=1))
    handle.remove()
    assert row is None
    assert_equal(state_of(model, optimizers), before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_after_a_step_that_is_not_finite_training_goes_on_as_if_it_had_not_been(optimizer):
    followed = []
    for seeds in ([0, 1], [0, None, 1]):
        model = tiny(optimizer=optimizer)
        optimizers = mae_clip.make_optimizers(model, model.config)
        for seed in seeds:
            images, *rest = example(seed=seed or 0)
            if seed is None:
                images = images / 0.0
            mae_clip.train_step(model, optimizers, FLOAT32, (images, *rest))
        followed.append(state_of(model, optimizers))
    assert_equal(followed[0], followed[1])


# --- What a step is given -------------------------------------------------------------------------


def some_pairs(B=8):
    """A batch as the Loader gives it."""
    images, tokens, *_ = example(B)
    return SimpleNamespace(images=images, tokens=tokens)


def given_at(step, config, batch=None):
    """What the model is given at a step."""
    return mae_clip.training_batch(config, step, batch or some_pairs(), torch.device("cpu"))


def test_the_noise_of_a_step_is_uniform_and_of_the_masks_shapes():
    images, tokens, image_noise, text_noise, views = given_at(5, preset("tiny"))
    assert torch.equal(images, some_pairs().images)
    assert torch.equal(tokens, some_pairs().tokens)
    assert image_noise.shape == (8, 16)
    assert text_noise.shape == (8, 16)
    noise = torch.cat([image_noise, text_noise])
    assert 0 <= noise.min() < 0.1 and 0.9 < noise.max() < 1
    assert views is None


def test_the_noise_of_a_step_depends_on_the_seed_and_the_step_alone():
    torch.manual_seed(1)
    first = given_at(5, preset("tiny", seed=3, method="slip"))
    torch.manual_seed(2)
    assert_equal(given_at(5, preset("tiny", seed=3, method="slip", steps=7)), first)


@pytest.mark.parametrize("seed, step", [(3, 6), (4, 5), (5, 3), (35, 0)])
def test_another_step_or_seed_draws_other_noise(seed, step):
    first = given_at(5, preset("tiny", seed=3))
    second = given_at(step, preset("tiny", seed=seed))
    assert not torch.isclose(first[2], second[2]).any(dim=1).all()
    assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize("method", ["mae_clip", "slip"])
def test_each_rank_takes_its_own_part_of_the_noise_of_one_process(monkeypatch, method):
    config = preset("tiny", method=method)
    whole = given_at(5, config)
    for rank in range(2):
        monkeypatch.setattr(mae_clip, "ranks", lambda rank=rank: (rank, 2))
        mine = slice(4 * rank, 4 * rank + 4)
        batch = SimpleNamespace(images=whole[0][mine], tokens=whole[1][mine])
        found = given_at(5, config, batch)
        assert torch.equal(found[2], whole[2][mine])
        assert torch.equal(found[3], whole[3][mine])
        if method == "slip":
            for view in range(2):
                assert torch.equal(found[4][view], whole[4][view][mine])


def test_slip_is_given_two_different_views_of_the_images():
    images, _, _, _, views = given_at(5, preset("tiny", method="slip"))
    assert [view.shape for view in views] == [images.shape, images.shape]
    assert not torch.equal(views[0], views[1])


# --- Checkpoints ----------------------------------------------------------------------------------


def small_run(out, step=7, method="mae_clip"):
    """A Run of one step's training, without data."""
    model = tiny(method)
    config = dataclasses.replace(model.config, out=str(out))
    optimizers = mae_clip.make_optimizers(model, config)
    mae_clip.train_step(model, optimizers, FLOAT32, example())
    tokenizer = Tokenizer([(104, 105)])
    loader = SimpleNamespace(identity=["a.tar", 5], tokenizer=tokenizer)
    return mae_clip.Run(config, model, optimizers, loader, step, 1.5, position=3)


def test_load_gives_the_model_in_evaluation_mode_its_tokenizer_and_its_configuration(tmp_path):
    run = small_run(tmp_path)
    mae_clip.save_checkpoint(run)
    model, tokenizer, config = mae_clip.load(tmp_path / "checkpoint-7.pt")
    assert not model.training
    assert_equal(dict(model.state_dict()), dict(run.model.state_dict()))
    assert tokenizer.merges == run.loader.tokenizer.merges
    assert config == run.config


def test_a_checkpoint_holds_plain_values_under_names_without_a_wrappers_prefix(tmp_path):
    run = small_run(tmp_path)
    mae_clip.save_checkpoint(run)
    state = torch.load(tmp_path / "checkpoint-7.pt", weights_only=True)
    assert set(state["model"]) == set(run.model.state_dict())
    assert state["step"] == 7
    assert state["position"] == 3
    assert state["data"] == ["a.tar", 5]
    assert_equal(state["optimizers"], [optimizer.state_dict() for optimizer in run.optimizers])


def test_a_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in (9, 10, 100):
        run = small_run(tmp_path, step)
        run.model.logit_scale.data.fill_(step)
        mae_clip.save_checkpoint(run)
    assert mae_clip.load(tmp_path)[0].logit_scale == 100
    assert mae_clip.load(tmp_path / "checkpoint-10.pt")[0].logit_scale == 10


def test_the_last_two_checkpoints_are_kept_and_nothing_half_written(tmp_path):
    for step in (9, 10, 100):
        mae_clip.save_checkpoint(small_run(tmp_path, step))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-10.pt", "checkpoint-100.pt"}


def test_a_folder_without_a_checkpoint_is_named_in_one_line(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}: [^\n]+$"):
        mae_clip.load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_a_checkpoint_that_cannot_be_read_is_named_in_one_line(tmp_path, damage):
    mae_clip.save_checkpoint(small_run(tmp_path))
    path = tmp_path / "checkpoint-7.pt"
    if damage == "missing":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if damage == "text":
        path.write_text("not a checkpoint")
    with pytest.raises(DataError, match=f"^{path}: [^\n]+$"):
        mae_clip.load(path)


# --- Reading, copying, importing ------------------------------------------------------------------


def part_one():
    """The text before the first ruled comment of part one, and {title: text} of its sections."""
    source = (HERE / "mae_clip.py").read_text()
    method = source[: source.index("\n# =====")]
    head, *pieces = re.split(r"^# --- (.+?) -+\n", method, flags=re.MULTILINE)
    return head, dict(zip(pieces[0::2], pieces[1::2], strict=True))


def definitions(source):
    """{name: [(line, text), ...]} of a source's functions, classes and constants, and of its
    imports."""
    lines = source.splitlines()
    defined = {}
    imported = {}
    for statement in ast.parse(source).body:
        place = defined
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names = [statement.name]
        elif isinstance(statement, ast.Assign):
            targets = [node for target in statement.targets for node in ast.walk(target)]
            names = [node.id for node in targets if isinstance(node, ast.Name)]
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
            place = imported
        else:
            continue
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *[each.lineno for each in decorators]])
        text = "\n".join(lines[first - 1 : statement.end_lineno])
        for name in names:
            place.setdefault(name, []).append((first, text))
    return defined, imported


def globals_read(text):
    """Names that a text reads from its module."""
    tables = [symtable.symtable(text, "text", "exec")]
    names = set()
    for table in tables:  # which grows
        tables += table.get_children()
        read = [each for each in table.get_symbols() if each.is_referenced()]
        names |= {each.get_name() for each in read if each.is_global()}
    return names


def sections_needed(title, sections):
    """Titles of the sections that a section names, with those that these name, itself last."""
    names = globals_read(sections[title])
    needed = []
    for other in reversed(sections):
        if other == title or definitions(sections[other])[0].keys() & names:
            needed.append(other)
            names |= globals_read(sections[other])
    return needed[::-1]


# What to call of each section to see that it works, with the example's images and tokens.
USES = {
    "Configuration of the model": "ModelConfig().weights()",
    "Patches and positions": """
unpatchify(patchify(normalise_images(images), 8), 8, 32, 32)
sincos_2d(8, 2, 3)
""",
    "Masks": """
random_mask(torch.rand(2, 4), 0.5)
keep, mask = random_text_mask(torch.rand(6, 16), tokens, 0.5)
record_mask(keep, mask, None)
""",
    "Transformer block": "Block(8, 2)(torch.rand(2, 4, 8), None)",
    "Encoders": """
keep = torch.tensor([[0, 5, 15]]).expand(6, -1)
ImageEncoder(config)(images, keep)
TextEncoder(config)(tokens, keep)
""",
    "Decoder": "Decoder(config)(image, torch.rand(2, 3, 96), None, None)",
    "Losses": """
features = torch.eye(3)
contrastive_loss(features, features, 1.0)
mask = torch.tensor([True, False, True])
masked_mean(image_error(features, features), mask)
masked_mean(text_error(features, torch.arange(3)), mask)
simclr_loss(features, features)
""",
    "The model": """
MAECLIP(config)(images, tokens)["loss"].backward()
MAECLIP(config).reconstruct(images, tokens)
MAECLIP(config).encode_text(tokens)
""",
}


@pytest.mark.parametrize("title", USES)
def test_a_section_pasted_with_those_above_it_that_it_names_runs(tmp_path, title):
    head, sections = part_one()
    assert list(sections) == list(USES)
    needed = sections_needed(title, sections)
    assert needed[-1] == title  # a reader meets nothing before its definition
    text = head + "".join(sections[each] for each in needed) + USES[title]
    (tmp_path / "pasted.py").write_text(text)
    images, tokens, *_ = example()
    image = record_mask(*random_mask(torch.rand(2, 4), 0.5), None)
    given = {"images": images, "tokens": tokens, "image": image, "config": ModelConfig()}
    runpy.run_path(str(tmp_path / "pasted.py"), given)


def names_to_copy(name, defined, imported):
    """What a definition needs beside itself -> names of definitions, in their order, and of
    imports."""
    needed = [name]
    for each in needed:  # which grows
        for _, text in defined.get(each, []):
            for other in globals_read(text):
                if other in {*defined, *imported} - set(needed):
                    needed.append(other)
    with_it = [other for other in defined if other in needed and other != name]
    return with_it, [other for other in imported if other in needed]


# What is copied, and a use of it with the example's images and tokens.
COPIES = {
    "mae_clip.py": {
        "ModelConfig": "ModelConfig(method='mae').weights()",
        "normalise_images": "normalise_images(images)",
        "patchify": "patchify(images, 8)",
        "unpatchify": "unpatchify(torch.rand(1, 4, 12), 2, 4, 4)",
        "sincos_2d": "sincos_2d(8, 2, 3)",
        "take": "take(torch.rand(2, 4, 3), torch.tensor([[1], [2]]))",
        "kept_count": "kept_count(100, 0.9)",
        "random_mask": "random_mask(torch.rand(2, 16), 0.75)",
        "caption_end": "caption_end(tokens)",
        "kept_first": "kept_first(torch.rand(2, 16) < 0.5)",
        "random_text_mask": "random_text_mask(torch.rand(6, 16), tokens, 0.75)",
        "Masked": "Masked(None, None, None, None)",
        "record_mask": "record_mask(torch.tensor([[1]]), torch.tensor([[True, False]]), None)",
        "Attention": "Attention(8, 2)(torch.rand(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))",
        "Mlp": "Mlp(8)(torch.rand(2, 4, 8))",
        "Block": "Block(8, 2)(torch.rand(2, 4, 8), None)",
        "make_blocks": "make_blocks(8, 2, 3)",
        "ImageEncoder": "ImageEncoder(config)(images)",
        "TextEmbedding": "TextEmbedding(config, 8)(tokens)",
        "no_padding": "no_padding(tokens)",
        "TextEncoder": "TextEncoder(config)(tokens)",
        "Modality": "Modality(8, 4, 12, torch.rand(16, 4))",
        "Decoder": "Decoder(config)",
        "at_least_float32": "at_least_float32(torch.rand(2).bfloat16())",
        "unit_norm": "unit_norm(torch.rand(2, 3))",
        "contrastive_loss": "contrastive_loss(torch.eye(3), torch.eye(3), 10.0)",
        "patch_targets": "patch_targets(torch.rand(2, 4, 12))",
        "image_error": "image_error(torch.rand(2, 4, 12), torch.rand(2, 4, 12))",
        "text_error": "text_error(torch.rand(6, 16, 300), tokens)",
        "masked_mean": "masked_mean(torch.rand(2, 4), torch.rand(2, 4) < 0.5)",
        "simclr_loss": "simclr_loss(torch.rand(4, 8), torch.rand(4, 8))",
        "gather": "gather(torch.rand(2, 3))",
        "own_rows": "own_rows(torch.rand(2, 3))",
        "of_all_ranks": "of_all_ranks(torch.rand(()))",
        "pool": "pool(torch.rand(2, 5, 8), 'max')",
        "simclr_head": "simclr_head(8)(torch.rand(2, 8))",
        "MAECLIP": "MAECLIP(config)(images, tokens)['loss'].backward()",
        "learning_rate": "learning_rate(3, config)",
        "Muon": "Muon([torch.rand(2, 3)], {'lr': 1, 'weight_decay': 0, 'momentum': 0, 'rms': 1})",
        "make_optimizers": "make_optimizers(torch.nn.Linear(2, 3), config)",
    },
    "data.py": {
        "Tokenizer": "Tokenizer.train(['a red circle', 'a red star'], 300).batch(['a red'], 8)",
        "preprocess": "preprocess(photo, 16)",
        "random_crop": "random_crop(content, 16, 0.5, np.random.default_rng(0))",
        "read_samples": "list(read_samples(shard))",
        "simclr_view": "simclr_view(images, torch.rand(6, 12))",
    },
    "eval.py": {
        "zero_shot": "zero_shot(torch.eye(6), torch.eye(6), torch.arange(6))",
        "retrieval": "retrieval(torch.eye(10), torch.eye(10), torch.arange(10))",
        "fit_linear": "fit_linear(torch.rand(9, 2), torch.arange(9) % 3, 3, 0.1)",
        "linear_probe": "linear_probe(features, labels, features, labels)",
        "knn": "knn(features, labels, features, labels, k=3)",
    },
}


def what_to_copy():
    """docs/copying.md's table, as it follows from the code -> lines."""
    rows = ["| of | copy | and with it | imported |", "| --- | --- | --- | --- |"]
    for file, uses in COPIES.items():
        found = definitions((HERE / file).read_text())
        for name in uses:
            cells = [
                ", ".join(f"`{each}`" for each in part) for part in names_to_copy(name, *found)
            ]
            rows.append(f"| `{file}` | `{name}` | {' | '.join(cell or '-' for cell in cells)} |")
    return rows


def test_the_table_of_what_to_copy_has_every_function_and_class_of_part_one():
    tree = ast.parse((HERE / "mae_clip.py").read_text().split("# ====")[0])
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert {each.name for each in tree.body if isinstance(each, kinds)} <= set(
        COPIES["mae_clip.py"]
    )


def test_the_table_of_what_to_copy_is_what_the_code_needs():
    table = (HERE / "docs" / "copying.md").read_text().splitlines()
    assert [line for line in table if line.startswith("|")] == what_to_copy()


@pytest.mark.parametrize(
    "file, name", [(file, name) for file, uses in COPIES.items() for name in uses]
)
def test_what_is_copied_with_the_names_that_it_needs_runs_in_an_empty_file(tmp_path, file, name):
    defined, imported = definitions((HERE / file).read_text())
    with_it, imports = names_to_copy(name, defined, imported)
    taken = set()  # an import of several names comes once
    for each in imports:
        taken |= set(imported[each])
    for each in [*with_it, name]:
        taken |= set(defined[each])
    text = "\n".join(part for _, part in sorted(taken))
    (tmp_path / "copied.py").write_text(f"{text}\n\n{COPIES[file][name]}\n")
    images, tokens, *_ = example()
    content = picture()
    given = {
        "torch": torch,
        "np": np,
        "images": images,
        "tokens": tokens,
        "config": preset("tiny", vocab_size=300),
        "content": content,
        "photo": Image.open(io.BytesIO(content)),
        "shard": tar_of(tmp_path / "0.tar", [("x.jpg", content), ("x.txt", b"x")]),
        "features": torch.eye(30).repeat(3, 1),
        "labels": torch.arange(30).repeat(3),
    }
    runpy.run_path(str(tmp_path / "copied.py"), given)


def test_what_the_walkthrough_shows_is_what_python_answers():
    text = (HERE / "docs" / "walkthrough.md").read_text()
    names = {}
    blocks = re.findall(r"^```python\n(>>> .*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9  # one a section
    for block in blocks:
        shown = doctest.DocTestParser().get_doctest(block, names, "walkthrough.md", None, None)
        said = []
        doctest.DocTestRunner().run(shown, out=said.append, clear_globs=False)
        assert not said, "".join(said)
        names = shown.globs


def test_part_one_imports_torch_and_the_standard_library_alone():
    head, _ = part_one()
    modules = set()
    for node in ast.walk(ast.parse(head)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules - sys.stdlib_module_names == {"torch"}


def global_settings():
    """Settings of torch that a program owns and a module must not touch."""
    return {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cudnn.allow_tf32,
        "autocast": torch.is_autocast_enabled("cpu"),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "signals": [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)],
        "environment": dict(os.environ),
    }


def test_importing_the_file_and_making_a_model_leave_torch_and_the_process_alone():
    before = global_settings()
    drawn = torch.get_rng_state()
    with mock.patch("ctypes.CDLL") as library:
        spec = importlib.util.spec_from_file_location("imported_anew", HERE / "mae_clip.py")
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {"imported_anew": module}):
            spec.loader.exec_module(module)
            assert torch.equal(torch.get_rng_state(), drawn)
            module.MAECLIP(module.preset("tiny"))
    assert not library.called
    assert global_settings() == before


# --- Parity, where the peer is installed ----------------------------------------------------------


def test_contrastive_loss_equals_transformers_clip_loss():
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    images = unit(6, 8, seed=1)
    texts = unit(6, 8, seed=2)
    theirs = clip.image_text_contrastive_loss(14.3 * texts @ images.T)
    loss = mae_clip.contrastive_loss(images, texts, 14.3)
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-10)


def copy_blocks(blocks, layers):
    """Copies the layers of transformers' ViT into our blocks."""
    for block, layer in zip(blocks, layers, strict=True):
        attention = layer.attention
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        block.attn.qkv.weight.data = torch.cat([part.weight for part in parts])
        block.attn.qkv.bias.data = torch.cat([part.bias for part in parts])
        block.attn.proj.load_state_dict(attention.o_proj.state_dict())
        block.mlp.load_state_dict(layer.mlp.state_dict())
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())


PEER_SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-6,
}


@torch.no_grad()
def test_the_image_encoder_equals_transformers_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**PEER_SIZES)
    peer = transformers.ViTModel(config, add_pooling_layer=False).eval()
    ours = tiny("mae").image_encoder
    projection = peer.embeddings.patch_embeddings.projection
    ours.patch_embed["proj"].load_state_dict(projection.state_dict())
    ours.cls_token.data = peer.embeddings.cls_token.data
    ours.pos_embed = peer.embeddings.position_embeddings.data
    copy_blocks(ours.blocks, peer.layers)
    ours.norm.load_state_dict(peer.layernorm.state_dict())
    images = mae_clip.normalise_images(example()[0])
    assert torch.allclose(ours(images), peer(images).last_hidden_state, atol=1e-5)


@torch.no_grad()
def test_the_masked_encoder_the_decoder_and_the_loss_equal_transformers_mae():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **PEER_SIZES,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=1,
        decoder_intermediate_size=128,
        norm_pix_loss=True,
        mask_ratio=0.75,
    )
    peer = transformers.ViTMAEForPreTraining(config).eval()
    model = tiny("mae", decoder_depth=2)
    ours = model.image_encoder
    theirs = peer.vit
    projection = theirs.embeddings.patch_embeddings.projection
    ours.patch_embed["proj"].load_state_dict(projection.state_dict())
    ours.cls_token.data = theirs.embeddings.cls_token.data
    theirs.embeddings.position_embeddings.data = ours.pos_embed
    copy_blocks(ours.blocks, theirs.layers)
    ours.norm.load_state_dict(theirs.layernorm.state_dict())
    image = model.decoder.image
    image.embed.load_state_dict(peer.decoder.decoder_embed.state_dict())
    image.mask_token.data = peer.decoder.mask_token.data
    image.head.load_state_dict(peer.decoder.decoder_pred.state_dict())
    peer.decoder.decoder_pos_embed.data = F.pad(image.position, (0, 0, 1, 0))
    copy_blocks(model.decoder.blocks, peer.decoder.decoder_layers)
    model.decoder.norm.load_state_dict(peer.decoder.decoder_norm.state_dict())

    images, tokens, noise, text_noise, _ = example()
    images = mae_clip.normalise_images(images)
    hidden = theirs(images, noise=noise).last_hidden_state
    assert torch.allclose(ours(images, random_mask(noise, 0.75)[0]), hidden, atol=1e-5)
    loss = model(images, tokens, noise, text_noise)["image"]
    assert loss.item() == pytest.approx(peer(images, noise=noise).loss.item(), rel=1e-5)


# --- Data: reading shards -------------------------------------------------------------------------
def test_a_source_names_shards_by_paths_globs_and_numbers(tmp_path):
    shards = shards_of(tmp_path / "a", [1] * 12)
    found = data.expand(f"{tmp_path}/a/{{9..11}}.tar::{tmp_path}/a/1?.tar")
    assert found == shards[9:12] + shards[10:12]
    numbered = [f"pipe:cat x{n}.tar" for n in ("08", "09", "10")]
    assert data.expand("pipe:cat x{08..10}.tar") == numbered
    for wrong in (f"{tmp_path}/b-*.tar", f"{tmp_path}/a/{{11..12}}.tar", ""):
        with pytest.raises(data.DataError, match="no such shard"):
            data.expand(wrong)
    # `::` may be part of a command, as of IPv6, or of a path.
    sources = f" {shards[0]}::pipe:curl http://[2001::1]/a.tar?key=secret:: Pipe: cat b"
    commands = ["pipe:curl http://[2001::1]/a.tar?key=secret", "pipe: cat b"]
    assert data.expand(sources) == [shards[0], *commands]
    assert data.public(sources) == f"{shards[0]}::a.tar::a command"
    (odd,) = shards_of(tmp_path / "x::y", [1])
    assert data.expand(odd) == [odd] and data.public(odd) == odd


def test_a_folder_is_a_source_of_its_training_shards_whatever_its_name_holds(tmp_path):
    folder = tmp_path / "a, b [1]"
    for path in (
        "train/0.tar",
        "test/0.tar",
        "packed/train-0.tar",
        "packed/dev-0.tar",
        "flat/x.tar",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        tar_of(folder / path, samples_of(1))
    assert data.expand(str(folder)) == [str(folder / "train/0.tar")]
    assert data.expand(str(folder / "packed")) == [str(folder / "packed/train-0.tar")]
    assert data.expand(str(folder / "flat")) == [str(folder / "flat/x.tar")]
    assert data.expand(str(folder / "test/0.tar")) == [str(folder / "test/0.tar")]
    (folder / "none").mkdir()
    with pytest.raises(data.DataError, match="none: a folder without train"):
        data.expand(str(folder / "none"))
    for name in ("c::d", "g{0..1}"):  # where there is such a folder its name is that alone
        (folder / name).mkdir()
        tar_of(folder / name / "0.tar", samples_of(1))
        assert data.expand(str(folder / name)) == [str(folder / name / "0.tar")]
    assert data.expand(f"{folder}/c::d/{{0..0}}.tar") == [str(folder / "c::d" / "0.tar")]


ODD = [
    ("a/b.c/x.y/one.JPG", picture()),
    ("a/b.c/x.y/one.seg.png", b"png"),
    ("folder", None),
    ("link.jpg", "one"),
    ("__meta__/x.txt", b"skipped"),
    ("n" * 180 + ".jpg", picture()),
    ("n" * 180 + ".txt", b""),
    ("no_suffix", b"x"),
    ("deep/" * 60 + "k.txt", b"\xff\xfe broken"),
    ("p\u00e4.txt", b"umlaut"),
    (".hidden", b"h"),
    ("q/.hidden", b"h"),
]


def test_what_macos_adds_to_a_tar_does_not_part_samples(tmp_path):
    files = []
    for name, content in samples_of(2):
        files += [(f"train/._{name}", b"\0\5\x16\7"), (f"train/{name}", content)]
    shard = tar_of(tmp_path / "mac.tar", files)
    assert [sorted(sample) for sample in data.read_samples(shard)] == 2 * [
        ["__key__", "jpg", "txt"]
    ]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_those_of_the_webdataset_package(kind, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tar_of(tmp_path / "odd.tar", ODD, kind)
    theirs = []
    for sample in webdataset.WebDataset(path, shardshuffle=False):
        del sample["__url__"]
        sample.pop("__local_path__", None)
        theirs.append(sample)
    assert list(data.read_samples(path)) == theirs and len(theirs) == 5
    assert list(data.read_samples(f"pipe:cat {path}")) == theirs


CAPTIONS = [  # txt, json, captions
    (b"a dog\r\n\n  a cat \n", None, ["a dog", "a cat"]),
    ("a\u2028b\x0cc\x85d\n".encode(), None, ["a\u2028b\x0cc\x85d"]),
    (b"\xef\xbb\xbfa dog", None, ["a dog"]),
    (None, {"caption": "a dog"}, ["a dog"]),
    (None, {"caption": ["a dog", "", 3, "a cat"]}, ["a dog", "a cat"]),
    (b" \n", {"caption": "a dog"}, ["a dog"]),
    (None, {"caption": "a dog\nruns\r\nhome"}, ["a dog runs home"]),
    (b"a dog\nruns", {"caption": "a dog\nruns\n"}, ["a dog runs"]),
    (b"a dog\na cat", {"caption": "a dog"}, ["a dog", "a cat"]),
    (b"a dog", {"caption": None}, ["a dog"]),
    (b"a dog", [1], ["a dog"]),
    (None, {"caption": {"en": "a dog"}}, []),
    (None, None, []),
]


@pytest.mark.parametrize("txt, note, expected", CAPTIONS)
def test_a_caption_is_a_line_of_the_txt_or_what_the_json_calls_one(txt, note, expected):
    sample = {"__key__": "x"}
    if txt is not None:
        sample["txt"] = txt
    if note is not None:
        sample["json"] = json.dumps(note).encode()
    assert data.captions(sample) == expected
    assert data.captions({"json": b"[" * 100_000}) == []


# --- Data: loader ---------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_an_epoch_is_a_plain_list_whatever_the_shards_ranks_workers_and_interruptions(
    seed, tmp_path
):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, rng.integers(1, 5)).tolist()
    world = int(rng.integers(1, 4))
    batch = int(rng.integers(1, 4))
    start = int(rng.integers(0, 5))
    sizes[0] += world * batch
    shards = shards_of(tmp_path / "s", sizes)
    steps = sum(sizes) // (world * batch)
    model = loader_of(shards, seed=seed, batch=1)  # the oracle: one process, a sample a batch
    epochs = []
    for n in (0, 1):
        epoch = []
        for each in model.epoch(n):
            epoch.append((each.keys[0], each.images[0].tolist(), each.tokens[0].tolist()))
        epochs.append(epoch)
    orders = [[key for key, _, _ in epoch] for epoch in epochs]
    assert sorted(orders[0]) == [f"{n:03d}" for n in range(sum(sizes))]
    assert orders[0] != orders[1] or sum(sizes) < 4
    for rank in range(world):
        part = loader_of(shards, batch, seed=seed, rank=rank, world=world, workers=seed % 3)
        assert len(part) == steps
        stream = part.batches(start)
        for step in range(start, min(start + steps + 1, 2 * steps)):  # into the next epoch
            epoch, number = divmod(step, steps)
            first = (number * world + rank) * batch
            found = next(stream)
            for n in range(batch):
                key, pixels, tokens = epochs[epoch][first + n]
                assert found.keys[n] == key
                assert found.images[n].tolist() == pixels
                assert found.tokens[n].tolist() == tokens
        stream.close()
        first = ((steps - 1) * world + rank) * batch
        assert keys_of(part.epoch(1, skip=steps - 1)) == orders[1][first : first + batch]


def test_samples_of_a_source_are_nested_and_the_same_for_every_seed(tmp_path):
    shards = shards_of(tmp_path / "s", [5, 7])
    chosen = {}
    for count in (3, 4, 12):
        for seed in (0, 1):
            loader = loader_of(shards, 1, samples=count, seed=seed)
            chosen[count, seed] = sorted(keys_of(loader.epoch(0)))
            assert len(chosen[count, seed]) == len(set(chosen[count, seed])) == count
            assert sorted(loader.texts()) == sorted(
                f"number {int(key)}" for key in chosen[count, seed]
            )
        assert chosen[count, 0] == chosen[count, 1]
    assert set(chosen[3, 0]) < set(chosen[4, 0]) < set(chosen[12, 0])
    for wrong, says in (
        (13, "12 usable samples, and 13 are needed"),
        (1, "1 usable samples, a batch"),
    ):
        with pytest.raises(data.DataError, match=says):
            loader_of(shards, 2, samples=wrong)
    with pytest.raises(data.DataError, match="--samples"):
        loader_of(f"pipe:cat {shards[0]}", samples=3)


def test_spawned_workers_give_what_forked_ones_give(tmp_path):
    shards = shards_of(tmp_path / "s", [9])
    code = (
        "import data, multiprocessing, sys\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv[1])\n"
        "    tokenizer = data.Tokenizer([])\n"
        "    loader = data.Loader(sys.argv[2:], 2, 8, tokenizer, 16, workers=2, crop=0.5)\n"
        "    print([(b.keys, b.images.sum().item()) for b in loader.epoch(0)])\n"
    )
    (tmp_path / "use.py").write_text(code)
    (tmp_path / "data.py").write_text(Path(data.__file__).read_text())  # alone in a folder
    said = {python(tmp_path / "use.py", how, *shards).stdout for how in ("fork", "spawn")}
    assert len(said) == 1 and said != {""}


def test_damaged_samples_are_skipped_logged_and_counted_by_cause(tmp_path, capsys):
    good = picture()
    png = picture(kind="PNG")
    bomb = bytearray(png)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    files = []
    for n in range(9):
        files += [(f"good{n}.jpg", good), (f"good{n}.txt", b"fine")]
    bad = {
        "cut": good[:-40],
        "header": b"no image at all",
        "bomb": bytes(bomb),
        "empty": b"",
        "inside": png[:60] + bytes(20) + png[80:],  # its header and its end are there
    }
    for key, content in bad.items():
        files += [(f"{key}.jpg", content), (f"{key}.txt", b"fine")]
    files += [("mute.jpg", good), ("mute.txt", b" \n\n")]
    causes = {
        "image does not decode": 2,
        "image header unreadable": 1,
        f"image of over {Image.MAX_IMAGE_PIXELS:,} pixels is too large": 1,
        "no image": 1,
        "no caption": 1,
    }
    path = tar_of(tmp_path / "x.tar", files)
    for source, workers in itertools.product((path, f"pipe:cat {path}"), (0, 2)):
        loader = loader_of(source, 5, workers=workers)
        assert set(keys_of(loader.epoch(0))) <= {f"good{n}" for n in range(9)}
        assert loader.bad == causes
        assert "1 x no caption" in loader.report()
        assert "skipped: 'x.tar cut (jpg, txt)': image does not decode" in capsys.readouterr().err


def test_a_batch_of_which_nothing_decodes_takes_others_in_its_place(tmp_path):
    files = samples_of(12)
    damaged = bytearray(picture(kind="PNG"))
    damaged[500:540] = bytes(40)  # its header and its end look whole
    for n in range(0, len(files), 4):  # of every second sample
        files[n] = (files[n][0], bytes(damaged))
    path = tar_of(tmp_path / "x.tar", files)
    for workers in (0, 2):
        loader = loader_of(path, 1, workers=workers)
        keys = keys_of(itertools.chain(loader.epoch(0), loader.epoch(1)))
        assert len(keys) == 24
        assert set(keys) == {name.split(".")[0] for name, _ in files[2::4]}
        # Each is counted once, in however many epochs it fails.
        assert loader.bad == {"image does not decode": 6}
    everything = tar_of(tmp_path / "y.tar", [*files[:2], *files[4:6]])
    with pytest.raises(DataError, match="most samples are of no use"):
        list(loader_of(everything, 1).epoch(0))
    # A stream has no number of batches to keep: it leaves such a batch out.
    loader = loader_of(f"pipe:cat {path}", 1)
    assert len(keys_of(loader.epoch(0))) == 6


def test_headers_that_lead_tarfile_astray_end_the_tar(tmp_path):
    def header(name, size, kind):
        info = tarfile.TarInfo(name)
        info.size = size
        info.type = kind
        return info.tobuf(tarfile.GNU_FORMAT)

    long_name = header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)
    pax = b"32 GNU.sparse.realsize=00000512\n"
    assert len(pax) == 32
    back = header("x", 32, tarfile.XHDTYPE) + pax.ljust(512, b"\0") + header("y", -1024, b"D")
    for n, content in enumerate((long_name * 3000, back, header("z", 2**62, b"q"))):
        path = tmp_path / f"{n}.tar"
        tar_of(path, samples_of(2))
        path.write_bytes(path.read_bytes()[: 4 * 1024] + content + bytes(10_240))
        with path.open("rb") as file:
            keys = []
            with pytest.raises(DataError, match="tar breaks off"):
                for key, _ in data.grouped(file):
                    keys.append(key)
        assert keys[:1] == ["000"] and len(keys) <= 2


def test_a_header_that_announces_more_than_the_file_holds_ends_the_tar(tmp_path, capsys):
    path = tmp_path / "x.tar"
    tar_of(path, samples_of(3))
    content = path.read_bytes()
    info = tarfile.TarInfo("huge.jpg")
    info.size = 1 << 39
    end = max(n for n in range(0, len(content), 512) if content[n : n + 512].strip(b"\0")) + 512
    path.write_bytes(content[:end] + info.tobuf() + bytes(1024))
    assert len(list(data.read_samples(str(path)))) == 2  # the third may lack a member
    assert "x.tar: tar breaks off" in capsys.readouterr().err
    loader = loader_of(str(path), 2)
    assert len(loader) == 1 and sum(loader.bad.values()) == 1


def test_processes_share_the_work_of_an_index(tmp_path):
    shards = shards_of(tmp_path / "s", [3, 4])
    code = (
        "import data, sys, time\n"
        "index = data.index\n"
        "def slow(file, shard, captioned):\n"
        "    open(sys.argv[1], 'a').write(shard + '\\n')\n"
        "    time.sleep(0.5)\n"
        "    return index(file, shard, captioned)\n"
        "data.index = slow\n"
        "loader = data.Loader(sys.argv[2:], 2, 8, data.Tokenizer([]), 16)\n"
        "print(len(loader), loader.identity)\n"
    )
    (tmp_path / "use.py").write_text(code)
    (tmp_path / "data.py").write_text(Path(data.__file__).read_text())
    made = tmp_path / "made"
    command = [sys.executable, tmp_path / "use.py", made, *shards]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate()[0] for process in started}
    assert len(said) == 1 and said.pop().startswith("3 ")
    assert sorted(made.read_text().split()) == sorted(shards)
    # What a killed process left is made anew; a cache that cannot be written costs time only.
    for cache in (tmp_path / "cache").rglob("*.json"):
        cache.write_text('[["0"')
    assert python(tmp_path / "use.py", made, *shards).returncode == 0


def test_an_index_takes_at_most_a_hundred_bytes_a_sample(tmp_path):
    reader = loader_of(shards_of(tmp_path / "s", [300, 200])).reader
    parts = (reader.rows, reader.ends, reader.shard_of, reader.chosen)
    assert sum(part.nbytes for part in parts) + len(reader.keys) <= 100 * 500
    # And all that is held besides does not grow with the samples.
    others = [value for name, value in vars(reader).items() if name not in ("loader", "identity")]
    assert all(len(value) <= 2 for value in others if isinstance(value, (list, dict, set)))


def test_bad_samples_of_equal_names_in_several_shards_are_all_counted(tmp_path):
    files = [("a.jpg", b"bad"), ("a.txt", b"x"), *samples_of(4)]
    paths = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        paths.append(tar_of(tmp_path / name / "0.tar", files))
    assert loader_of(paths).bad == {"image header unreadable": 3}


def test_what_stays_decoded_does_not_hold_the_files_too(tmp_path):
    loader = loader_of(shards_of(tmp_path / "s", [6]))
    first, second = [[batch.images for batch in loader.epoch(0)] for _ in range(2)]
    assert all(map(torch.equal, first, second)) and len(loader.decoded) == 6
    assert {len(name) for name in loader.decoded} == {32}
    loader.keeps = False
    assert all(map(torch.equal, first, [batch.images for batch in loader.epoch(0)]))


def test_a_sample_of_no_need_is_not_read(tmp_path):
    loader = loader_of(shards_of(tmp_path / "s", [8]))
    with mock.patch.object(data, "loaded", wraps=data.loaded) as reading:
        list(loader.epoch(0))
    assert reading.call_count == 8


def test_an_index_is_read_from_a_cache_that_cannot_be_written(tmp_path):
    job = (shards_of(tmp_path / "s", [3])[0], True)
    data.index_shard(job)

    def refused(path, mode="r", **options):
        if "a" in mode:
            raise PermissionError
        return open(path, mode, **options)

    with mock.patch.object(data, "open", refused, create=True):
        with mock.patch.object(data, "index", side_effect=AssertionError):
            assert len(data.index_shard(job)[1]) == 3


def test_what_a_header_says_of_a_folders_size_is_void(tmp_path):
    path = tar_of(tmp_path / "x.tar", samples_of(3))
    info = tarfile.TarInfo("folder")
    info.type = tarfile.DIRTYPE
    info.size = 1 << 20
    path = Path(path)
    path.write_bytes(info.tobuf() + path.read_bytes())
    assert len(list(data.read_samples(str(path)))) == 3


def test_a_key_that_comes_again_begins_another_sample(tmp_path):
    files = [("a.jpg", b"1"), ("a.txt", b"one"), ("a.jpg", b"2"), ("a.txt", b"two")]
    samples = list(data.read_samples(str(tar_of(tmp_path / "twice.tar", files))))
    assert [(sample["jpg"], sample["txt"]) for sample in samples] == [
        (b"1", b"one"),
        (b"2", b"two"),
    ]


def test_paths_with_colons_work_for_sets_too(tmp_path):
    folder = tmp_path / "we::ird"
    (folder / "test").mkdir(parents=True)
    tar_of(folder / "test" / "0.tar", [("x.jpg", picture()), ("x.cls", b"1")])
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("cat\ndog\n")
    evaluation.check_sets(str(folder), "clip")
    (folder / "test" / "nshards.txt").write_text("0")
    with pytest.raises(DataError, match="nshards.txt: says '0'"):
        evaluation.check_sets(str(folder), "clip")
    (folder / "test" / "nshards.txt").write_text("1")
    assert [label for _, _, label in evaluation.open_sets(str(folder))[0].samples("test")] == [1]


def test_equal_shards_of_a_stream_are_shuffled_each_in_its_own_way(tmp_path):
    shard = shards_of(tmp_path / "s", [20])[0]
    loader = loader_of([f"pipe:cat {shard}"] * 3, 20)
    first, second, third = [batch.keys for batch in loader.epoch(0)]
    assert first != second != third and sorted(first) == sorted(second) == sorted(third)


@pytest.mark.skipif(sys.platform != "linux", reason="uses PR_SET_PDEATHSIG")
def test_a_worker_that_waits_for_a_command_ends_with_its_killed_parent(tmp_path):
    os.mkfifo(tmp_path / "alive")
    command = f"exec 9> {tmp_path}/alive; sleep 600"
    code = (
        "import data\n"
        f"loader = data.Loader('pipe:{command}', 2, 8, data.Tokenizer([]), 16, workers=1)\n"
        "next(loader.batches(0))\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
    with open(tmp_path / "alive") as alive:
        reader.kill()
        reader.wait()
        assert alive.read() == ""


def test_a_folder_is_made_by_one_program_at_a_time_even_if_the_first_fails(tmp_path):
    inside, seen = [], []

    def make(number):
        with shards.only_one(tmp_path / "lock"):
            inside.append(number)
            seen.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=make, args=[n]) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == 12 * [1] and not (tmp_path / "lock").exists()


def test_names_never_give_orders_to_the_terminal(tmp_path):
    key = "a\x1b[31mred"
    escape = "\x1b"
    files = [(f"{key}.jpg", picture()), (f"{key}.txt", b"fine \x1b[31m"), ("b\x9b.jpg", b"bad")]
    path = tar_of(tmp_path / f"{escape}[1m.tar", files)
    table = tmp_path / "t.csv"
    table.write_text(f"path,caption\n{key}.jpg,lost\n")
    code, said, err = command("inspect", path)
    assert code == 1 and r"a\x1b[31mred: fields" in said
    for arguments in (("inspect", f"{path}?"), ("pack", table, tmp_path / "out")):
        code, out, more = command(*arguments)
        assert code == 2 and r"\x1b" in more
        said += out
        err += more
    assert not re.search("[\x1b\x9b]", said + err)
    assert data.printable("Blume ü 犬 😀") == "Blume ü 犬 😀"


def test_the_tokenizer_is_learned_from_a_fixed_part_of_many_samples(tmp_path, monkeypatch):
    loader = loader_of(shards_of(tmp_path / "s", [6, 5]))
    everything = list(loader.texts())
    assert len(everything) == 11
    monkeypatch.setattr(data, "TOKENIZED", 3)
    assert list(loader.texts()) == [everything[0], everything[5], everything[10]]


def test_an_image_that_pillow_decodes_is_used_whatever_follows_its_end(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "x" * 40_000  # a header longer than the part that is looked at
    images = {
        "film": picture() + bytes(range(256)) * 800,
        "png": picture(kind="PNG") + bytes(5000),
        "header": picture(exif=exif) + bytes(5000),
        "gif": picture(kind="GIF"),
        "webp": picture(400, 300, kind="WEBP"),
    }
    files = []
    for key, content in images.items():
        files += [(f"{key}.jpg", content), (f"{key}.txt", b"fine")]
        (tmp_path / f"{key}.jpg").write_bytes(content)
    path = tar_of(tmp_path / "x.tar", files)
    loader = loader_of(path, 1)
    assert sorted(keys_of(loader.epoch(0))) == sorted(images) and not loader.bad
    code, said, _ = command("inspect", path)
    assert code == 0 and "5 samples" in said
    (tmp_path / "t.csv").write_text("".join(f"{key}.jpg,fine\n" for key in images))
    code, said, _ = command("pack", tmp_path / "t.csv", tmp_path / "out")
    assert code == 0 and "5 samples" in said and "0 left out" in said


@pytest.mark.parametrize(
    "files, says",
    [
        ([("a.jpg", picture())], "1 x no caption.*first sample has .*'jpg'"),
        ([("a.txt", b"words")], "1 x no image.*first sample has .*'txt'"),
        (
            [("2.0 (clean).jpg", picture()), ("2.0 (clean).txt", b"x")],
            "has .*'0 .clean..jpg', '0 .clean..txt'",
        ),
        (
            [("a.input.jpg", picture()), ("a.outputs.txt", b"x")],
            "has .*'input.jpg', 'outputs.txt'.; a samp",
        ),
        ([("a.jpg", picture()), ("a.cls", b"3")], "'jpg', 'cls'.*data.py pack"),
        ([], "tar without samples.*first sample has \\[\\]"),
        ([("a.jpg", picture()), ("a.txt", b"few")], "1 usable samples, a batch is 2"),
    ],
)
def test_shards_with_nothing_to_train_on_are_named_in_one_line_with_what_they_hold(
    files, says, tmp_path
):
    with pytest.raises(data.DataError, match=says) as error:
        loader_of(tar_of(tmp_path / "x.tar", files))
    assert "\n" not in str(error.value)


def test_a_shard_rewritten_with_equal_size_and_date_is_read_anew(tmp_path):
    path = tmp_path / "x.tar"
    for name in ("one", "two"):
        tar_of(path, [(f"{name}.jpg", picture()), (f"{name}.txt", b"words")])
        os.utime(path, (1, 1))
        assert keys_of(loader_of(str(path), 1).epoch(0)) == [name]


def test_other_captions_of_the_same_size_are_other_data(tmp_path):
    identities = []
    for n, text in enumerate((b"words", b"wards", b"words")):
        path = tmp_path / f"{n}.tar"
        tar_of(path, [("a.jpg", picture()), ("a.txt", text)])
        identities.append(loader_of(str(path), 1).identity)
    assert identities[0] == identities[2] != identities[1]


@pytest.mark.skipif(sys.platform != "linux", reason="as the workers' commands are ended")
def test_workers_that_hang_end_with_the_iteration_of_their_batches(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "x.tar", samples_of(4))
    # Torch's wait for a worker that is busy, here longer than a test may take.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 3600)
    # Each worker reads one shard of two batches, and hangs when it reads another.
    once = f"mkdir {tmp_path}/a || mkdir {tmp_path}/b || exec sleep 3600; cat {path}"
    loader = loader_of([f"pipe:{once}"], 2, workers=2, resample=True)
    before = multiprocessing.active_children()
    batches = loader.batches(0)
    for _ in range(4):
        next(batches)
    assert len(multiprocessing.active_children()) == len(before) + 2
    batches.close()
    assert len(multiprocessing.active_children()) == len(before)


def killed(job):
    """Ends its worker process."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_that_is_killed_while_it_indexes_or_draws_is_one_line():
    with pytest.raises(DataError, match="a worker process failed: [^\n]*$"):
        list(data.in_parallel(killed, [1, 2], "work"))


def test_a_truncated_tar_gives_its_whole_samples_and_the_loss_is_counted(tmp_path, capsys):
    whole = Path(shards_of(tmp_path / "s", [6])[0]).read_bytes()
    with tarfile.open(tmp_path / "s" / "0.tar") as tar:  # where its files end
        ends = [-(-(info.offset_data + info.size) // 512) * 512 for info in tar]
    path = tmp_path / "cut.tar"
    for length in [*range(ends[5], ends[-1], 700), *ends[5:]]:
        path.write_bytes(whole[:length])
        samples = list(data.read_samples(str(path)))
        found = [sample["__key__"] for sample in samples if "txt" in sample]
        there = sum(end <= length for end in ends[1::2])
        assert found in ([f"{n:03d}" for n in range(count)] for count in (there - 1, there))
        assert "cut.tar: tar breaks off" in capsys.readouterr().err
        for source in (str(path), f"pipe:cat {path}"):
            loader = loader_of(source, 1)
            assert sorted(keys_of(loader.epoch(0))) == found
            assert any("tar breaks off" in cause for cause in loader.bad)
    with pytest.raises(data.DataError, match="cut.tar: tar breaks off"):
        list(data.whole_samples(str(path)))


def test_a_loader_says_how_many_captions_are_cut_and_what_would_hold_nearly_all(tmp_path):
    files = []
    for n, length in enumerate([5, 14, 15, 20]):  # letters, each a token; SOT and EOT come to it
        files += [(f"{n}.jpg", picture(seed=n)), (f"{n}.txt", b"a" * length)]
    shard = tar_of(tmp_path / "x.tar", files)
    wanted = round(np.quantile([7, 16, 17, 22], 0.99))
    said = loader_of(shard).about()
    assert f"captions    50.0% are cut at --context 16; {wanted} would hold 99 %" in said
    loader = loader_of(shard)
    loader.tokenizer = None
    assert "cut" not in loader.about()


def test_a_command_that_fails_stops_the_run_and_its_secrets_are_not_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PAUSES", ())
    path = shards_of(tmp_path / "s", [4])[0]
    for workers in (0, 1):
        secret = "token=abc http://me:word@host/x-000.tar?key=def"
        with pytest.raises(data.DataError, match="exit code 7") as error:
            source = f"pipe:cat {path}; : {secret}; exit 7"
            list(loader_of(source, workers=workers).epoch(0))
        said = data.one_line(error.value)
        assert said.startswith("x-000.tar: ") and not re.search("abc|def|me:|word", said)


def test_a_command_that_fails_is_tried_again_after_growing_pauses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PAUSES", (0.01, 0.02))
    path = shards_of(tmp_path / "s", [4])[0]
    tries = tmp_path / "tries"
    for good, last in ((3, "no more"), (4, "exit code 9")):
        tries.write_text("")
        # Fails until it has been tried `good` times.
        command = f"echo >> {tries}; [ $(wc -l < {tries}) -ge {good} ] || exit 9; cat {path}"
        loader = loader_of(f"pipe:{command}", 4)
        if good == 3:
            assert len(keys_of(loader.epoch(0))) == 4
        else:
            with pytest.raises(DataError, match=last):
                list(loader.epoch(0))
        assert len(tries.read_text()) == 3
        assert re.findall(r"exit code 9; tried again in (\S+) s", capsys.readouterr().err) == [
            "0.01",
            "0.02",
        ]
    with pytest.raises(DataError, match="exit code 127"):  # no such command: no other try
        list(loader_of("pipe:no-such-command-here", 4).epoch(0))
    assert "tried again" not in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="commands run without a guard there")
def test_nothing_is_left_of_a_command_when_its_reader_has_been_killed(tmp_path):
    # What holds this file open for writing is alive; its reader sees the end once none is.
    os.mkfifo(tmp_path / "alive")
    command = f"exec 9> {tmp_path}/alive; sleep 600 & sleep 601 | cat"
    code = f"import data\ndata.opened('pipe:{command}')"
    reader = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
    with open(tmp_path / "alive") as alive:
        reader.kill()
        reader.wait()
        assert alive.read() == ""
    # Nor when it has ended by itself, or the command has; its exit code and its words are its own.
    assert data.sent_by("printf 'a{}b'; exit 3") == (3, b"a{}b")
    assert data.sent_by("cat; false | echo last") == (0, b"last\n")


def test_a_stream_gives_each_shard_to_one_worker_and_goes_on_at_the_next(tmp_path):
    source = [f"pipe:cat {shard}" for shard in shards_of(tmp_path / "s", [5, 3, 4, 6])]
    for workers in (0, 2, 8):
        loader = loader_of(source, 1, workers=workers)
        keys = keys_of(loader.epoch(0))
        assert sorted(keys) == [f"{n:03d}" for n in range(18)] and loader.position == 4
        assert sorted(keys_of(loader.batches(3, 5))) not in (sorted(keys), [])
    loader = loader_of(source, 4)
    endless = loader.batches(0)
    for _ in range(9):
        assert len(next(endless).keys) == 4
    assert loader.position == 8
    cut = loader_of(f"pipe:head -c 1500 {tmp_path}/s/0.tar", 4)
    assert not list(cut.epoch(0)) and sum(cut.bad.values()) == 1
    with pytest.raises(data.DataError, match="--steps"):
        len(loader)
    with pytest.raises(data.DataError, match="--resample"):
        loader_of(source, world=2)


def test_resampled_shards_differ_by_rank_and_come_without_end(tmp_path):
    shards = shards_of(tmp_path / "s", [5, 3, 4, 6])
    drawn = []
    for rank in (0, 1):
        loader = loader_of(shards, 1, resample=True, rank=rank, world=2, seed=1)
        drawn.append(keys_of(itertools.islice(loader.batches(0), 40)))
    assert drawn[0] != drawn[1]
    for keys in drawn:
        assert len(set(keys)) < 40 == len(keys)


# --- Data: images ---------------------------------------------------------------------------------
MODES = [
    picture(mode="CMYK"),
    picture(mode="L"),
    picture(kind="WEBP"),
    picture(kind="PNG", mode="I;16"),
    picture(kind="PNG", mode="LA"),
    picture(kind="PNG", mode="1"),
    picture(1, 10_000),
    picture(10_000, 1),
    picture(kind="PNG", mode="P", transparency=3),
    picture(kind="GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))]),
]


@pytest.mark.parametrize("content", MODES)
def test_images_of_every_mode_and_shape_decode(content):
    image = data.decode(content)
    assert image.mode == "RGB" and data.preprocess(image, 8).shape == (3, 8, 8)
    crop = data.random_crop(content, 8, 0.2, np.random.default_rng(0))
    assert crop.shape == (3, 8, 8) and crop.dtype == torch.uint8


def test_16_bits_are_scaled_transparent_is_white_and_exif_turns():
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(out, "PNG")
    assert np.asarray(data.decode(out.getvalue()))[0, :, 0].tolist() == [0, 100, 255]
    out = io.BytesIO()
    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(out, "PNG")
    assert data.decode(out.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert data.decode(picture(24, 16, exif=turned)).size == (16, 24)
    # By hand: ImageLength as one byte, which is no type for it, and Orientation 6.
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0101, 1, 1, 16)
    odd += struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)
    assert data.decode(picture(24, 16, exif=odd)).size == (16, 24)


def resized_then_cropped(image, size):
    """torchvision's Resize(size) and CenterCrop(size), step by step."""
    if image.width <= image.height:
        width = size
        height = int(size * image.height / image.width)
    else:
        width = int(size * image.width / image.height)
        height = size
    left = int(round((width - size) / 2.0))
    top = int(round((height - size) / 2.0))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("size", [32, 33])
def test_the_test_transform_is_resize_and_centre_crop_at_every_aspect(size):
    rng = np.random.default_rng(0)
    for short in (29, 50):
        for long in range(short, 3 * short + 1, 3):
            for width, height in ((short, long), (long, short)):
                image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
                found = data.preprocess(image, size).numpy().astype(int)
                assert np.array_equal(found, resized_then_cropped(image, size))


def test_the_test_transform_is_that_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(32, bicubic), transforms.CenterCrop(32)])
    for width, height in ((50, 73), (73, 50), (99, 50), (20, 61)):
        image = Image.open(io.BytesIO(picture(width, height)))
        expected = np.asarray(theirs(image)).transpose(2, 0, 1).astype(int)
        assert np.array_equal(data.preprocess(image, 32).numpy(), expected)


def test_a_simclr_view_is_a_crop_perhaps_flipped_with_changed_colours():
    noise = torch.zeros(4, 12)
    noise[:, 0] = 1  # the crop is all of the image
    noise[:, 1] = torch.tensor([1, 0, 1, 1])  # the second is flipped
    noise[:, 4] = 0.9  # no jitter
    noise[:, 8] = torch.tensor([1, 1, 0, 1])  # the third is grey
    noise[3, 4:8] = torch.tensor([0, 0.25, 0.5, 0.5])  # the fourth at brightness 0.8
    images = torch.randint(0, 256, (4, 3, 8, 10), dtype=torch.uint8)
    views = data.simclr_view(images, noise)
    assert views.dtype == torch.uint8 and torch.equal(views[0], images[0])
    assert torch.equal(views[1], images[1].flip(2))
    grey = images[2].double().mean(dim=0).round()
    assert (views[2].double() - grey).abs().max() <= 1
    assert (views[3].double() - 0.8 * images[3].double()).abs().max() <= 1
    noise[:, 0] = (0.25 - 0.08) / 0.92  # a quarter of the area, in the corner at the top left
    noise[:, 2:4] = 0
    corner = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    corner[..., :4, :4] = 77
    assert (data.simclr_view(corner, noise[:1])[..., :7, :7] == 77).all()


@pytest.mark.parametrize("least, side", [(100, 100), (101, 200), (300, 400), (401, 800)])
def test_a_jpeg_is_decoded_no_finer_than_asked(least, side):
    assert data.decode(picture(800, 800), least).size == (side, side)
    assert data.decode(picture(800, 800)).size == (800, 800)
    assert data.decode(picture(800, 800, kind="PNG"), least).size == (800, 800)


# --- Data: tokenizer ------------------------------------------------------------------------------
def test_the_tokenizer_is_lossless_on_any_bytes_and_cuts_long_captions_before_eot():
    rng = random.Random(0)
    tokenizer = data.Tokenizer.train(["a small dog runs", "a big dog sleeps", "the dog"] * 3, 300)
    assert 259 < tokenizer.vocab_size <= 300
    odd = " a  dog\n\u4f60".encode()
    for content in (bytes(range(256)), b"", rng.randbytes(999), b"dog" * 999, odd):
        assert tokenizer.decode(tokenizer.encode(content)) == content
    for text in ("dog " * 30_000, "d" * 100_000, "", "\ud800"):
        ids = tokenizer.encode(text)[:14]
        row = [data.SOT, *ids, data.EOT] + [data.PAD] * (14 - len(ids))
        assert tokenizer.batch([text], 16).tolist() == [row]
    with pytest.raises(data.DataError, match="259"):
        data.Tokenizer.train(["a"], 258)


def test_the_tokenizer_merges_what_a_loop_over_all_pairs_would(tmp_path):
    texts = ["the cat sat on the mat", "a cat and a hat", "that that", "the hat sat"]
    words = []
    for text in texts:
        for piece in data.Tokenizer.pieces.findall(text.encode()):
            words.append([byte + 3 for byte in piece])
    merges = []
    while len(merges) < 8:
        pairs = []
        for word in words:
            pairs += zip(word, word[1:], strict=False)
        best = min(set(pairs), key=lambda pair: (-pairs.count(pair), pair))
        for word in words:
            for n in range(len(word) - 1):
                if tuple(word[n : n + 2]) == best:
                    word[n : n + 2] = [259 + len(merges)]
        merges.append(best)
    assert data.Tokenizer.train(texts, 267).merges == merges
    files = []
    for n, text in enumerate(texts):
        files += [(f"{n}.jpg", picture()), (f"{n}.txt", text.encode())]
    shards = tar_of(tmp_path / "x.tar", files)
    made = tmp_path / "t.json"
    assert command("tokenizer", shards, made, "--vocab-size", 267)[0] == 0
    assert data.Tokenizer.load(made).merges == merges
    for content in (Path(shards).read_bytes(), b"{}", b"[[99999999999, 3]]"):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(data.DataError, match="not a tokenizer"):
            data.Tokenizer.load(tmp_path / "other.json")


def test_a_tokenizer_overwrites_no_file_such_as_the_second_shard_of_an_open_pattern(tmp_path):
    shards = [Path(captioned_shard(tmp_path / f"{n}.tar")) for n in range(2)]
    before = shards[1].read_bytes()
    code, _, said = command("tokenizer", *shards)
    assert code == 2 and "1.tar: exists already" in said
    assert shards[1].read_bytes() == before


# --- Data: making and inspecting shards -----------------------------------------------------------
def photos_in(folder, names, kind="JPEG"):
    """Photos of 64 x 48 with these names, each of its own noise."""
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(64, 48, kind=kind, seed=n))


def packed(folder, split="train"):
    """The samples of a packed split."""
    return list(data.read_samples(f"{folder}/{split}/*.tar"))


def origin(sample):
    """The photo that a packed sample was made of."""
    return Path(json.loads(sample["json"])["path"])


def test_pack_makes_the_same_shards_of_a_table_again_and_names_broken_rows(tmp_path):
    photos_in(tmp_path, [f"{n}.jpg" for n in range(5)])
    rows = [f"{n % 5}.jpg,caption {n}" for n in range(10)] + ["gone.jpg,lost", "./1.jpg"]
    table = tmp_path / "t.csv"
    table.write_text("path,caption\n" + "\n".join(rows))
    for out in ("a", "b"):
        flags = ("--size", 20, "--test", 0.4)
        code, said, err = command("pack", table, tmp_path / out, *flags)
        assert code == 0 and "No such file" in err and "1 left out" in said
        assert f"left out: {table} line 12: {tmp_path / 'gone.jpg'}: " in err
    for split in ("train", "test"):
        first, second = [(tmp_path / out / split / "0.tar").read_bytes() for out in ("a", "b")]
        assert first == second
    samples = packed(tmp_path / "a", "t*")
    assert sorted(origin(sample).name for sample in samples) == [f"{n}.jpg" for n in range(5)]
    for sample in samples:
        n = int(origin(sample).stem)
        assert data.captions(sample) == [f"caption {n}", f"caption {n + 5}"]
        assert data.decode(data.image_of(sample)).size == (27, 20)
    code, _, err = command("pack", table, tmp_path / "a")
    assert code == 2 and "exists already" in err


def test_pack_takes_the_columns_that_a_header_names_and_without_one_the_first_two(tmp_path):
    photos_in(tmp_path, ["0.jpg", "1.jpg"])
    tables = {
        "caption_score,Caption_1,filepath,caption_2,text_len\n64,a dog,0.jpg,a big dog,3\n": [
            "a dog",
            "a big dog",
        ],
        "0.jpg,a dog,64,0.3\n": ["a dog"],
        "image,text\n0.jpg,\n1.jpg\n": [],
        "image;text\n0.jpg;a dog, running\n": ["a dog, running"],
        "0.jpg;a dog, running\n": ["a dog, running"],
        "text\tImage Path\na dog, running; here\t0.jpg\n": ["a dog, running; here"],
        "\ufefffilename,caption\n0.jpg,a dog\n": ["a dog"],
        "path,caption_en,text_de,score\n0.jpg,a dog,ein Hund,3\n": ["a dog", "ein Hund"],
        "path,caption,caption_id,title_no\n0.jpg,a dog,817,4\n": ["a dog"],
        "path,caption,commenter,comment_at,captioned\n0.jpg,a dog,bob,3,yes\n": ["a dog"],
        "path,caption_en-US,caption-de,Text 2\n0.jpg,a,b,c\n": ["a", "b", "c"],
        "\n\npath;caption\n0.jpg;a dog, running\n": ["a dog, running"],
        "0.jpg;a dog, image\n": ["a dog, image"],
        'path, caption\n0.jpg, "a dog, a cat"\n , \n': ["a dog, a cat"],
        'path|caption\n0.jpg| "Stop" sign , red\n': ['"Stop" sign , red'],
        "image,caption,path\n17,a dog,0.jpg\n": ["a dog"],
        "image_name| comment_number| comment\n0.jpg| 0| a dog, brown\n": ["a dog, brown"],
        "0.jpg,Image\n": ["Image"],  # no header, as its first cell is a photo
        "path,caption,\n0.jpg,a dog,,\n": ["a dog"],
        f'path,caption\n0.jpg,"{"x" * 200_000}"\n': ["x" * 200_000],
    }
    for n, (text, expected) in enumerate(tables.items()):
        (tmp_path / f"{n}.csv").write_text(text)
        assert command("pack", tmp_path / f"{n}.csv", tmp_path / f"out{n}")[0] == 0
        for sample in packed(tmp_path / f"out{n}"):
            assert data.captions(sample) == expected
    bare = loader_of(str(tmp_path / "out2"), captions=False)  # as --method mae has it
    assert len(keys_of(bare.epoch(0))) == 2
    (tmp_path / "quote.tsv").write_text('0.jpg\ta "dog\n1.jpg\ta cat"\n')
    assert command("pack", tmp_path / "quote.tsv", tmp_path / "tsv")[0] == 0
    assert len(packed(tmp_path / "tsv")) == 2
    (tmp_path / "quotes.tsv").write_text('0.jpg\t"dog\n1.jpg\t"Bo" says "stop"\n')
    assert command("pack", tmp_path / "quotes.tsv", tmp_path / "quotes")[0] == 0
    found = [data.captions(sample)[0] for sample in packed(tmp_path / "quotes")]
    assert sorted(found) == ['"Bo" says "stop"', '"dog']
    (tmp_path / "latin.csv").write_bytes(b"path,caption\n0.jpg,caf\xe9\n")
    code, _, err = command("pack", tmp_path / "latin.csv", tmp_path / "latin")
    assert code == 2 and "latin.csv line 2: is not in UTF-8" in err
    (tmp_path / "open.csv").write_text('path,caption\n0.jpg,a dog\n1.jpg,"a" cat\n')
    code, _, err = command("pack", tmp_path / "open.csv", tmp_path / "open")
    assert code == 2 and "open.csv: no csv, in the row that begins in line 3" in err
    (tmp_path / "more.csv").write_text('path,caption\n0.jpg,"a, b"\n1.jpg,a dog, brown\n')
    code, _, err = command("pack", tmp_path / "more.csv", tmp_path / "more")
    assert code == 2 and "1 rows have more cells than the first, 2, such as line 3" in err
    code, _, err = command("pack", tmp_path / "open.csv", tmp_path / "open", "--shard", 0)
    assert code == 2 and "--shard 0" in err


@pytest.mark.parametrize("name", ["t.tsv", "bars.csv"])
def test_pack_takes_quoted_cells_where_all_quotes_of_a_table_close(tmp_path, name):
    photos_in(tmp_path, ["0.jpg", "1.jpg"])
    rows = ["path|caption", '"0.jpg"|"a ""red""\ndog"', '1.jpg|"a dog | a cat"']
    if name == "t.tsv":
        rows = [row.replace(" | ", " and ").replace("|", "\t") for row in rows]
    (tmp_path / name).write_text("\n".join(rows))
    assert command("pack", tmp_path / name, tmp_path / "out")[0] == 0
    found = sorted(data.captions(sample)[0] for sample in packed(tmp_path / "out"))
    second = "a dog | a cat" if name == "bars.csv" else "a dog and a cat"
    assert found == ['a "red" dog', second]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_pack_reads_a_table_whose_lines_are_longer_than_a_files_name_may_be(tmp_path, end):
    photos_in(tmp_path, ["0.jpg", "1.jpg"])
    captions = [f"{'word ' * 100}{n}" for n in range(2)]
    rows = [f"{'long ' * 100}.jpg,x", *(f"{n}.jpg,{captions[n]}" for n in range(2))]
    (tmp_path / "t.csv").write_bytes(end.join(rows[1:] + rows[:1]).encode())
    code, said, err = command("pack", tmp_path / "t.csv", tmp_path / "out")
    assert code == 0 and "1 left out" in said and "File name too long" in err
    assert sorted(data.captions(sample)[0] for sample in packed(tmp_path / "out")) == captions
    (tmp_path / "late.csv").write_bytes(end.join(rows).encode())
    assert command("pack", tmp_path / "late.csv", tmp_path / "late")[0] == 0
    assert len(packed(tmp_path / "late")) == 2


def test_a_folder_that_may_not_be_read_is_passed_over_and_said(tmp_path, monkeypatch, capsys):
    photos_in(tmp_path, ["cat/0.jpg", "lost+found/1.jpg"])
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = [str(path) for path in pack.paths_below(tmp_path)]
    assert found == ["cat", os.path.join("cat", "0.jpg"), "lost+found"]
    assert f"passed over: {tmp_path}/lost+found: may not be read" in capsys.readouterr().err


def test_what_is_no_table_in_utf8_and_a_folder_without_photos_are_told_the_remedy(tmp_path):
    (tmp_path / "wide.csv").write_bytes("path,caption\n0.jpg,a dog\n".encode("utf-16"))
    code, _, err = command("pack", tmp_path / "wide.csv", tmp_path / "out")
    assert code == 2 and "is not in UTF-8: save it so" in err
    (tmp_path / "in").mkdir()
    for name in ("0.heic", "1.HEIC", "2.tif", "none"):
        (tmp_path / "in" / name).touch()
    code, _, err = command("pack", tmp_path / "in", tmp_path / "out")
    assert code == 2 and "found 2 x .heic, 1 x .tif, 1 x without ending. Convert" in err


def test_pack_does_not_join_lines_by_quotes_where_tabs_part_the_cells(tmp_path):
    photos_in(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "t.tsv").write_text('0.jpg\t"Stop\n1.jpg\tgo"\n')
    assert command("pack", tmp_path / "t.tsv", tmp_path / "out")[0] == 0
    found = sorted(data.captions(sample)[0] for sample in packed(tmp_path / "out"))
    assert found == ['"Stop', 'go"']


def test_pack_refuses_a_text_beside_a_photo_that_is_not_in_utf_8(tmp_path):
    photos_in(tmp_path / "in", ["0.jpg"])
    for content in ("un café".encode("latin-1"), "un café".encode("utf-16")):
        (tmp_path / "in" / "0.txt").write_bytes(content)
        code, _, said = command("pack", tmp_path / "in", tmp_path / "out")
        assert code == 2 and "not in UTF-8: b'" in said
    assert not (tmp_path / "out").exists()


def test_pack_takes_the_texts_that_most_photos_have_beside_them(tmp_path):
    photos_in(tmp_path / "in", [f"0000{n % 2}/{n}.jpg" for n in range(5)])
    for n in range(4):
        (tmp_path / "in" / f"0000{n % 2}" / f"{n}.txt").write_text(f"dog {n}\n")
    # Of one caption of two lines, as img2dataset writes it to both files.
    (tmp_path / "in" / "00000" / "0.txt").write_text("dog\n0")
    (tmp_path / "in" / "00000" / "0.json").write_text(json.dumps({"caption": "dog\n0"}))
    code, said, _ = command("pack", tmp_path / "in", tmp_path / "out")
    assert code == 0 and "4 photos have NAME.txt" in said and "these 1 without caption" in said
    assert "passed over" not in said
    (tmp_path / "in" / "00000" / "9.HEIC").write_bytes(b"no image that is read")
    (tmp_path / "in" / "00000" / "alone.txt").write_text("a caption without photo")
    assert ": 1 x .heic, 1 x .txt\n" in command("pack", tmp_path / "in", tmp_path / "again")[1]
    assert not (tmp_path / "out" / "classnames.txt").exists()
    for sample in packed(tmp_path / "out"):
        assert data.captions(sample) == [f"dog {origin(sample).stem}"]


def test_pack_says_which_classes_it_makes_and_takes_splits_for_none(tmp_path):
    photos_in(tmp_path, ["in/cat/0.jpg", "in/dog/1.jpg", "in/dog/2.jpg"])
    assert (
        "classes: 2 (cat, dog), captioned " in command("pack", tmp_path / "in", tmp_path / "a")[1]
    )
    photos_in(tmp_path, ["set/train/cat/0.jpg", "set/Val/cat/1.jpg"])
    code, _, err = command("pack", tmp_path / "set", tmp_path / "b")
    assert code == 2 and f"are no classes; pack {tmp_path / 'set' / 'Val'} by itself" in err


def test_pack_leaves_no_photo_out_for_a_caption_whose_photo_cannot_be_read(tmp_path):
    photos_in(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "t.csv").write_text("path,caption\n0.jpg,\n1.jpg,\ngone.jpg,a dog\n")
    code, said, _ = command("pack", tmp_path / "t.csv", tmp_path / "out")
    assert code == 0 and "2 photos have no caption" in said


def test_pack_makes_a_labelled_set_of_class_folders_and_counts_what_it_passes_over(tmp_path):
    names = [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(10)]
    photos = tmp_path / "classes"
    names += ["v1.0/0.png", "v1.0/1.png"]  # a class whose name looks like a file's
    photos_in(photos, [*names, "loose.png", ".hidden/x.png", "__MACOSX/x.png"], "PNG")
    (photos / "cat" / "notes.heic").write_bytes(b"no image")
    (photos / "dog" / "broken.png").write_bytes(b"no image")
    (photos / "dog" / "link.png").symlink_to("nowhere.png")
    (photos / "dog" / "same.png").symlink_to("0.png")
    (photos / "empty").mkdir()
    out = tmp_path / "out"
    code, said, err = command("pack", photos, out, "--test", 0.3)
    assert code == 0 and "convert other images to JPEG): 1 x .heic, 2 x .png\n" in said
    assert "folders without photos ['empty']" in said and "2 left out" in said
    assert "broken.png: image header" in err and "No such file" in err
    wanted = f"--data {out} --out {out}-run --eval-data {out} --batch-size 15"
    assert f"python mae_clip.py {wanted}\n" in said
    assert (out / "classnames.txt").read_text().split() == ["cat", "dog", "v1.0"]
    labels = {"train": [], "test": []}
    for split in labels:
        whole = data.whole_samples(data.split_shards(out, split), labelled=True)
        for sample, (_, _, label) in zip(packed(out, split), whole, strict=True):
            name = origin(sample).parent.name
            assert name == ["cat", "dog", "v1.0"][label]
            assert data.captions(sample) == [f"a photo of a {name}"]
            labels[split].append(label)
    for label, count in enumerate((10, 10, 2)):
        assert labels["train"].count(label) + labels["test"].count(label) == count
        assert 1 <= labels["test"].count(label) <= 0.3 * count + 1  # each class gives its share
    code, _, err = command("pack", photos, tmp_path / "wrong", "--test", 10)
    assert code == 2 and "--test 10: must be a share" in err and "--shard" not in err
    photos_in(tmp_path / "one", ["cat/0.png", "cat/1.png"], "PNG")
    code, _, err = command("pack", tmp_path / "one", tmp_path / "wrong", "--test", 0.5)
    assert code == 2 and "--test needs two class folders or more" in err
    (tmp_path / "one" / "zebra").mkdir()  # a link to all that is there
    (tmp_path / "one" / "all").symlink_to(".")
    (tmp_path / "one" / "cat" / "up").symlink_to("..")
    (tmp_path / "one" / "cat" / "up too").symlink_to("..")
    assert command("pack", tmp_path / "one", tmp_path / "linked")[0] == 0
    assert (tmp_path / "linked" / "classnames.txt").read_text() == "cat"
    photos_in(tmp_path / "one", [f"{n}.png" for n in range(3)], "PNG")
    code, _, err = command("pack", tmp_path / "one", tmp_path / "wrong")
    assert code == 2 and "3 photos lie beside the class folders ['cat'], and 2 in them" in err
    photos_in(tmp_path / "broken", ["line\nbreak/0.png"], "PNG")
    code, _, err = command("pack", tmp_path / "broken", tmp_path / "wrong")
    assert code == 2 and "name has a line break" in err
    (tmp_path / "head.csv").write_text("path,caption\n")
    (tmp_path / "one.csv").write_text("classes/cat/0.png,a cat\n")
    code, _, err = command("pack", tmp_path / "one.csv", tmp_path / "wrong", "--test", 0.01)
    assert code == 2 and "leaves 1 of 1 photos for training, 0 for the test" in err
    photos_in(tmp_path / "flat", ["0.png", "1.png"], "PNG")
    code, _, err = command("pack", tmp_path / "flat", tmp_path / "wrong", "--test", 0.9)
    assert code == 2 and "--test 0.9: leaves 0 of 2 photos for training, 2 for the test" in err
    assert command("pack", photos, tmp_path / "rare", "--test", 0.01)[0] == 0
    assert sorted(
        data.captions(sample)[0][-3:] for sample in packed(tmp_path / "rare", "test")
    ) == [
        "1.0",
        "cat",
        "dog",
    ]
    refusals = {
        "nowhere.csv": "nowhere.csv: no such file or folder",
        "classes/empty": "no file in it, nor in its folders, ends in",
        "head.csv": "holds no row with the path of a photo",
    }
    for source, says in refusals.items():
        code, _, err = command("pack", tmp_path / source, tmp_path / "wrong")
        assert code == 2 and says in err


@pytest.fixture
def interrupt_raises():
    """SIGINT as a shell's foreground job has it; a background one, as the tests may be, ignores
    it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_signal_waits_until_all_workers_are_started(interrupt_raises):
    done = []

    class Starting:
        def __iter__(self):
            signal.raise_signal(signal.SIGINT)
            done.append("started")
            return iter(())

    with pytest.raises(KeyboardInterrupt), data.workers_of(Starting()):
        done.append("used")
    assert done == ["started"]
    with pytest.raises(KeyboardInterrupt):  # and then signals come at once again
        signal.raise_signal(signal.SIGINT)
        done.append("waited")
    assert done == ["started"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_stopped_drawing_left_is_gone_or_cleaned_up_by_the_next(number, tmp_path):
    drawing = [sys.executable, data.__file__, "draw", tmp_path / "scenes", "--scenes", "20000"]
    process = subprocess.Popen(drawing, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("scenes.part/*.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert not list(tmp_path.iterdir())
    # Two at once: one draws, the other waits for it and then refuses.
    again = [*drawing[:-1], "40"]
    both = [subprocess.Popen(again, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[1] for process in both)
    assert said[0] == "" and "exists already" in said[1]
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_pack_of_a_table_whose_paths_are_all_wrong_makes_nothing_and_says_so(tmp_path):
    (tmp_path / "table.csv").write_text("path,caption\nnowhere/a.jpg,one\nnowhere/b.jpg,two\n")
    code, _, said = command("pack", tmp_path / "table.csv", tmp_path / "out")
    assert code == 2 and "none of its first paths is a file" in said and "nowhere/a.jpg" in said
    photos_in(tmp_path, ["broken.jpg"])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "table.csv").write_text("path,caption\nbroken.jpg,one\n")
    code, _, said = command("pack", tmp_path / "table.csv", tmp_path / "out")
    assert code == 2 and "not one image could be read" in said
    assert not (tmp_path / "out").exists()


def test_the_command_that_pack_prints_works_also_where_captions_are_missing(tmp_path):
    photos_in(tmp_path, [f"{n}.jpg" for n in range(40)])
    rows = [f"{n}.jpg,{'' if n % 4 == 0 else f'number {n}'}" for n in range(40)]
    (tmp_path / "some.csv").write_text("path,caption\n" + "\n".join(rows))
    (tmp_path / "39.jpg").write_bytes(b"no image")
    out = tmp_path / "c::d's $HOME {0..1}"
    _, said, err = command("pack", tmp_path / "some.csv", out, "--test", 0.4)
    assert "17 samples for training and 12 for test; 11 left out, of these 10 without" in said
    assert err.count("left out: ") == 1 and "39.jpg" in err
    next_one = shlex.split(said.splitlines()[-1])
    assert next_one[:2] == ["python", "mae_clip.py"] and next_one[-2:] == ["--batch-size", "17"]
    run(*next_one[2:], "--scale", "tiny", "--steps", 1, "--workers", 0, "--warmup", 1)
    results = json.loads(Path(f"{out}-run", "results.json").read_text())
    assert results["retrieval"]["n"] == 12


def test_pack_leaves_a_jpeg_of_several_pictures_as_a_phone_writes_it(tmp_path):
    first = Image.open(io.BytesIO(picture(seed=1)))
    second = Image.open(io.BytesIO(picture(seed=2)))
    first.save(tmp_path / "phone.JPG", "MPO", save_all=True, append_images=[second])
    command("pack", tmp_path, tmp_path / "out")
    (sample,) = data.read_samples(str(tmp_path / "out" / "train" / "0.tar"))
    assert sample["jpg"] == (tmp_path / "phone.JPG").read_bytes()


def test_pack_takes_a_folder_of_photos_without_captions(tmp_path):
    photos_in(tmp_path / "photos", ["0.jpg", "1.jpg"])
    assert command("pack", tmp_path / "photos", tmp_path / "out")[0] == 0
    assert sorted(origin(sample).name for sample in packed(tmp_path / "out")) == ["0.jpg", "1.jpg"]
    assert len(loader_of(str(tmp_path / "out"), captions=False)) == 1


def test_photos_without_captions_are_a_test_set_for_mae_and_for_it_alone(tmp_path):
    photos_in(tmp_path / "photos", [f"{n}.jpg" for n in range(40)])
    out = tmp_path / "out"
    said = command("pack", tmp_path / "photos", f"{out}/", "--test", 0.25)[1]
    wanted = f"--data {out} --out {out}-run --eval-data {out} --method mae --batch-size 30"
    assert "40 photos have no caption" in said and f"python mae_clip.py {wanted}\n" in said
    assert command("inspect", out)[0] == 0
    flags = ("--scale", "tiny", "--data", out, "--eval-data", out, "--batch-size", 8, "--steps", 2)
    flags += ("--workers", 0, "--log-every", 1, "--out", tmp_path / "run")
    said = run(*flags, "--method", "mae", "--eval-every", 1).stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reconstruction"]["n"] == 10 and "image_loss" in said
    assert "image" in logged(tmp_path / "run")[-1]["validation"]
    with pytest.raises(DataError, match="no image has a caption; --method clip"):
        evaluation.check_sets(str(out), "clip")


def test_images_without_a_caption_are_left_out_of_recall_and_said(trained, tmp_path, capsys):
    whole = captioned_shard(tmp_path / "whole.tar", 12)
    content = [(f"{n}x.jpg", picture(seed=n)) for n in range(2)]
    mixed = tar_of(tmp_path / "mixed.tar", content)
    evaluation.check_sets(f"{whole}::{mixed}", "mae")
    both = tmp_path / "both.tar"
    with tarfile.open(both, "w") as tar:
        for sample in [*data.read_samples(str(mixed)), *data.read_samples(str(whole))]:
            for field in list(sample)[1:]:
                info = tarfile.TarInfo(f"{sample['__key__']}.{field}")
                info.size = len(sample[field])
                tar.addfile(info, io.BytesIO(sample[field]))
    capsys.readouterr()
    evaluation.check_sets(str(both), "clip")
    assert "both.tar: 2 of 14 images have no caption; recall leaves them out" in (
        capsys.readouterr().err
    )
    rows = []
    for source in (whole, both):
        out = call(capsys, "retrieval", trained["clip"], "--data", source, "--format", "json")
        rows.append([(row["measure"], row["values"]) for row in json.loads(out)])
    evaluation.main(["retrieval", str(trained["clip"]), "--data", str(both)])
    assert "both.tar: 2 images have no caption, and are left out" in capsys.readouterr().err
    assert [name for name, _ in rows[0]] == [name for name, _ in rows[1]]
    for (_, first), (_, second) in zip(*rows, strict=True):
        assert list(first.values()) == list(second.values())
    file = tmp_path / "f.npz"
    call(capsys, "embed", trained["clip"], "--data", both, "--out", file)
    assert len(np.load(file)["keys"]) == 14 and len(np.load(file)["texts"]) == 24


def test_inspect_reports_and_its_exit_code_says_whether_something_is_wrong(tmp_path):
    shards_of(tmp_path / "s", [4, 3])
    bad = tar_of(tmp_path / "bad.tar", [("x.jpg", b"bad"), ("x.txt", b"x")])
    labelled = tar_of(tmp_path / "labelled.tar", [("x.jpg", picture()), ("x.cls", b"3")])
    code, said, _ = command("inspect", tmp_path / "s")
    assert code == 0 and "7 samples" in said and "class '', captions ['number 0']" in said
    assert "the first one has 24 x 16 pixels" in said
    code, said, _ = command("inspect", f"{tmp_path}/s/*.tar::{bad}")
    assert code == 1 and "1 x image header unreadable" in said
    code, said, _ = command("inspect", labelled)  # a shard alone, without names of its classes
    assert code == 0 and "fields ['jpg', 'cls'], class '3', captions []" in said
    named = tmp_path / "set"
    (named / "test").mkdir(parents=True)
    (named / "classnames.txt").write_text("cat\ndog\ncow\nowl\n")
    shutil.copy(labelled, named / "test" / "0.tar")
    code, said, _ = command("inspect", named / "test" / "0.tar")
    assert code == 0 and "class '3 owl'" in said
    for source in (bad, tmp_path / "none.tar"):
        assert command("inspect", source)[0] == 2


def test_every_command_explains_itself():
    for name in ("pack", "inspect", "tokenizer", "draw"):
        code, said, _ = command(name, "--help")
        assert code == 0 and f"usage: data.py {name}" in said
    assert "default: 1000" in command("pack", "--help")[1]
    assert command("unknown")[0] == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_worker_processes_end_with_their_parent_even_if_that_is_killed(tmp_path):
    drawing = [sys.executable, data.__file__, "draw", str(tmp_path / "scenes"), "--scenes", "40000"]
    parent = subprocess.Popen(drawing, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    workers = []
    while len(workers) < min(4, os.cpu_count()):
        workers = children.read_text().split()
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        time.sleep(0.1)
    assert not (tmp_path / "scenes").exists()


# --- Data: built-in scenes ------------------------------------------------------------------------
def test_the_built_in_scenes_are_the_same_for_a_seed_and_hide_the_unseen_classes(tmp_path):
    for out in ("a", "b"):
        scenes.draw(tmp_path / out, 40, seed=3)
    shards = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.tar"))
    assert len(shards) == 4 + 1 + 2 * 4
    for shard in shards:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    unseen = [scenes.CLASSES[n] for n in scenes.unseen(3)]
    assert len(unseen) == 8 and len({name.split()[0] for name in unseen}) == 8
    texts = list(loader_of(str(tmp_path / "a")).texts())
    assert len(texts) == 40 and not any(name in text for name in unseen for text in texts)
    source = data.split_shards(tmp_path / "a" / "objects", "test")
    assert len(list(data.whole_samples(source, labelled=True))) == 10


# --- Evaluation: functions of features ------------------------------------------------------------
def tied(*shape, seed):
    """Unit vectors with so few values that scores tie."""
    values = torch.randint(-2, 3, shape, generator=torch.manual_seed(seed)) + 1e-3
    return F.normalize(values, dim=1)


def test_zero_shot_counts_as_clip_benchmark_does_ties_and_absent_classes_included():
    x = tied(40, 4, seed=1)
    classes = tied(7, 4, seed=2)
    y = torch.arange(40) % 6
    found = zero_shot(x, classes, y)
    logits = 100.0 * x @ classes.T
    top = logits.topk(5, dim=1).indices.tolist()
    best = logits.argmax(dim=1)
    for k in (1, 5):
        hits = [label in row[:k] for row, label in zip(top, y.tolist(), strict=True)]
        assert found[f"acc{k}"] == sum(hits) / 40
    recalls = [(best[y == k] == k).double().mean().item() for k in range(6)]
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / 6, abs=1e-12)
    assert math.isnan(zero_shot(x, classes[:4], y % 4)["acc5"])


def test_zero_shot_and_retrieval_do_not_depend_on_the_blocks_they_are_computed_in(monkeypatch):
    images = tied(40, 4, seed=1)
    texts = tied(60, 4, seed=2)
    labels = torch.arange(40) % 7
    owner = torch.arange(60) % 40
    whole = zero_shot(images, texts[:7], labels), retrieval(images, texts, owner)
    monkeypatch.setattr(evaluation, "BLOCK", 100)
    assert (zero_shot(images, texts[:7], labels), retrieval(images, texts, owner)) == whole


def test_retrieval_counts_as_clip_benchmark_does_with_ties_and_several_captions():
    images = tied(12, 3, seed=1)
    texts = tied(18, 3, seed=2)
    owner = torch.arange(18) * 7 % 12
    found = retrieval(images, texts, owner)
    scores = texts @ images.T
    for k in (1, 5, 10):
        of_texts = [owner[n] in scores[n : n + 1].topk(k, dim=1)[1] for n in range(18)]
        of_images = [n in owner[scores.T[n : n + 1].topk(k, dim=1)[1]] for n in range(12)]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(sum(of_texts) / 18)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(sum(of_images) / 12)


def test_knn_is_the_weighted_vote_of_the_nearest_whatever_the_blocks(monkeypatch):
    x = tied(30, 3, seed=1)
    test_x = tied(15, 3, seed=2)
    y = torch.arange(30) % 4
    weight = [[math.exp(float(x[i] @ row) / 0.07) for i in range(30)] for row in test_x]
    votes = [[sum(row[k::4]) for k in range(4)] for row in weight]
    right = sum(row.index(max(row)) == n % 4 for n, row in enumerate(votes))
    monkeypatch.setattr(evaluation, "BLOCK", 64)
    found = evaluation.knn(x, y, 7 * test_x.double(), y[:15], k=30)
    assert found["acc1"] == right / 15


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1], [0.0, 1.0], [0, 1, 1, 0]])
def test_labels_that_do_not_fit_are_a_value_error(labels):
    x = torch.eye(2)
    for call in (
        lambda: zero_shot(x, x, labels),
        lambda: fit_linear(x, labels, 2, 0.1),
        lambda: evaluation.linear_probe(x, [0, 1], x, labels),
        lambda: evaluation.knn(x, labels, x, [0, 1], k=1),
    ):
        if labels == [0, -1] or len(labels) != 2 or isinstance(labels[0], float):
            with pytest.raises(ValueError, match="labels"):
                call()


def awkward(kind):
    """Features (n,16) and labels of one hard kind."""
    rng = np.random.default_rng(0)
    y = np.arange(12 if kind == "few" else 150) % 4
    apart = 9 if kind == "separable" else 0.4
    x = rng.normal(size=(len(y), 16)) + rng.normal(size=(4, 16))[y] * apart
    if kind == "scales":
        x *= 10.0 ** rng.uniform(-3, 3, 16)
    elif kind == "huge":
        x *= 1e4
    elif kind == "rank":
        x = x[:, :3] @ rng.normal(size=(3, 16))
    elif kind == "constant":
        x[:, 5] = 7
    elif kind == "unit":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, y


@pytest.mark.parametrize("l2", [1e-1, 1e-4, 1e-7])
@pytest.mark.parametrize(
    "kind",
    ["plain", "scales", "rank", "constant", "few", "separable", "absent", "unit", "huge"],
)
def test_fit_linear_reaches_the_objective_of_scikit_learn(kind, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = awkward(kind)

    def objective(weight, bias):
        weight = torch.as_tensor(weight)
        logits = torch.tensor(x) @ weight.T + torch.as_tensor(bias)
        loss = F.cross_entropy(logits, torch.tensor(y))
        return (loss + l2 / 2 * weight.square().sum()).item()

    ours = objective(*fit_linear(x, y, 6 if kind == "absent" else 4, l2))
    peer = linear_model.LogisticRegression(C=1 / len(y) / l2, solver="newton-cholesky", tol=1e-10)
    peer.fit(x, y)
    assert ours == pytest.approx(objective(peer.coef_, peer.intercept_), rel=1e-4)


def test_for_two_classes_scikit_learns_c_is_twice_as_large():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = awkward("plain")
    weight, bias = fit_linear(x, y % 2, 2, 0.01)
    peer = linear_model.LogisticRegression(C=2 / len(y) / 0.01, tol=1e-10).fit(x, y % 2)
    assert np.allclose(peer.coef_[0], weight[1] - weight[0], atol=1e-3)
    assert np.allclose(peer.intercept_[0], bias[1] - bias[0], atol=1e-3)


def test_fit_linear_ends_where_it_may_go_on_for_ever():
    x, y = awkward("separable")
    weight, bias = fit_linear(x, y, 4, 0.0)
    assert (torch.tensor(x) @ weight.T + bias).argmax(dim=1).tolist() == y.tolist()


def test_the_linear_probe_chooses_on_train_alone_and_is_as_good_as_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 3000)
    x = rng.normal(size=(3000, 24)) + 0.5 * rng.normal(size=(5, 24))[y]
    held, rest = np.split(np.random.default_rng(0).permutation(1000), [200])

    def score(C, fit, test):
        model = linear_model.LogisticRegression(C=C, max_iter=1000).fit(x[fit], y[fit])
        return model.score(x[test], y[test])

    best = max((10.0**k for k in range(-5, 3)), key=lambda C: score(C, rest, held))
    found = evaluation.linear_probe(x[:1000], y[:1000], x[1000:], y[1000:])
    assert abs(found["acc1"] - score(best, slice(1000), slice(1000, None))) < 0.005


def test_the_sweep_of_the_linear_probe_goes_on_until_the_best_is_not_at_its_end():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 900)
    x = rng.normal(size=(900, 12)) + 0.5 * rng.normal(size=(3, 12))[y]
    x *= 10.0 ** np.linspace(-4, 4, 12)  # a penalty as large as usual hides the smallest columns
    variance = x[:600].var(axis=0).sum()

    def accuracy(power):
        weight, bias = fit_linear(x[:600], y[:600], 3, variance * 10.0**power, tolerance=1e-4)
        logits = torch.tensor(x[600:]) @ weight.T + bias
        return (logits.argmax(dim=1) == torch.tensor(y[600:])).double().mean().item()

    found = evaluation.linear_probe(x[:600], y[:600], x[600:], y[600:])
    assert accuracy(-7) < accuracy(-18) - 0.05
    assert found["acc1"] > accuracy(-18) - 0.04


# --- Evaluation: intervals ------------------------------------------------------------------------
def test_intervals_resample_images_and_a_lead_is_on_the_same_images():
    number = np.arange(400)
    score = evaluation.Score(number % 4 == 0, number >= 0, 0.1)
    worse = evaluation.Score((number % 4 == 0) & (number > 0), number >= 0, 0.1)
    _, low, high = evaluation.spread(score)
    assert low < 0.25 < high
    assert abs(high - low - 2 * 1.96 * math.sqrt(0.25 * 0.75 / 400)) < 0.01
    lead, low, high = evaluation.spread(score.less(worse))
    assert lead == pytest.approx(1 / 400)
    assert 0 <= low <= lead <= high < 5 / 400


def test_a_measure_weights_its_images_and_is_undefined_without_weight():
    assert evaluation.Score([1.0, 0.0, 1.0], [1, 2, 1], 0.5).mean() == 0.5
    assert evaluation.Score([1.0, 0.0, 1.0], [1, 2, 1], 0.5).mean(np.array([2, 0, 1])) == 1
    assert math.isnan(evaluation.Score([1.0], [0], 0.5).mean())


def test_a_rate_of_almost_nothing_below_zero_has_no_minus():
    assert evaluation.show(-0.0001, "acc1") == "0.0 %"
    assert evaluation.show(-0.0001, "image_loss") == "0.000"
    assert evaluation.show(-0.011, "acc1") == "-1.1 %"


# --- Evaluation: sets and checkpoints -------------------------------------------------------------
def labelled_folder(folder, count=8, classes="ab", split="test"):
    """Writes a split in CLIP_benchmark's layout, image n of class n mod C -> the folder."""
    (folder / split).mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(classes))
    (folder / split / "nshards.txt").write_text("1\n")
    files = []
    for n in range(count):
        files.append((f"{n:03d}.jpg", picture(8, 8 + n, seed=n)))
        files.append((f"{n:03d}.cls", b"%d" % (n % len(classes))))
    tar_of(folder / split / "0.tar", files)
    return folder


def captioned_shard(path, count=12, broken=()):
    """Writes a shard of images with two captions each; of those in `broken` the end is missing."""
    files = []
    for n in range(count):
        content = picture(40, 40, seed=n)
        files.append((f"{n:03d}.jpg", content[:700] if n in broken else content))
        files.append((f"{n:03d}.txt", b"number %d\nit is %d" % (n, n)))
    return tar_of(path, files)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of new tiny models by method, with a tokenizer of bytes alone."""
    paths = {}
    for seed, method in enumerate(("clip", "mae", "mae_clip")):
        model = tiny(method, seed, vocab_size=259)
        paths[method] = tmp_path_factory.mktemp(method) / "checkpoint-1.pt"
        state = {
            "model": model.state_dict(),
            "config": dataclasses.asdict(model.config),
            "merges": None if method == "mae" else [],
        }
        torch.save(state, paths[method])
    return paths


def call(capsys, *words):
    """Runs eval.py in this process -> what it prints."""
    evaluation.main([str(word) for word in words])
    return capsys.readouterr().out


def test_a_split_is_encoded_once_in_a_suite(trained, tmp_path, monkeypatch, capsys):
    folder = labelled_folder(labelled_folder(tmp_path / "set", 24), 24, split="train")
    encode = evaluation.encode_split
    seen = []

    def counted(model, dataset, split):
        seen.append(split)
        return encode(model, dataset, split)

    monkeypatch.setattr(evaluation, "encode_split", counted)
    call(capsys, "suite", trained["clip"], "--data", folder)
    assert sorted(seen) == ["test", "train"]


def test_an_image_is_encoded_as_the_model_alone_would(trained, tmp_path):
    model, _, config = mae_clip.load(trained["clip"])
    (dataset,) = evaluation.open_sets(str(labelled_folder(tmp_path / "set", 5)))
    found = evaluation.encode_split(model, dataset, "test")
    assert found.targets == [0, 1, 0, 1, 0]
    for n in range(5):
        image = data.preprocess(data.decode(picture(8, 8 + n, seed=n)), config.image_size)[None]
        with torch.no_grad():
            assert torch.allclose(found.embedded[n], model.encode_image(image)[0], atol=1e-5)
            pooled = mae_clip.pool(model.image_encoder(image), config.pool)[0]
            assert torch.allclose(found.pooled[n], pooled, atol=1e-4)


def test_sets_that_cannot_be_scored_are_refused_when_they_are_opened(tmp_path):
    def refused(folder, says):
        with pytest.raises(ValueError, match=says):
            evaluation.open_sets(str(folder))

    loose = tmp_path / "loose [1]"
    loose.mkdir()
    captioned_shard(loose / "0.tar")
    (dataset,) = evaluation.open_sets(str(loose))
    assert len(list(dataset.samples("test"))) == 12
    assert data.expand(f"{loose}/*.tar") == [f"{loose}/0.tar"]
    captioned_shard(loose / "train-0.tar")
    refused(loose, "or name its shards")
    refused(tmp_path / "nowhere", "nowhere: no such shard")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "classnames.txt")
    folder = labelled_folder(tmp_path / "set", 8, "abc")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na")
    refused(folder, "template 'a'")
    (folder / "classnames.txt").write_text("a")
    refused(folder, "needs 2 lines in classnames.txt")
    for label in (b"dog", b"-1"):
        tar_of(tmp_path / "odd.tar", [("0.jpg", picture()), ("0.cls", label)])
        with pytest.raises(DataError, match=f"class index, 0 or more, in KEY.cls; found {label!r}"):
            list(data.whole_samples(str(tmp_path / "odd.tar"), labelled=True))


def test_sets_whose_headers_or_classes_do_not_fit_are_refused_before_training(tmp_path, capsys):
    folder = labelled_folder(tmp_path / "set", 9, "abc")
    evaluation.check_sets(f"{folder}::{captioned_shard(tmp_path / 'dev.tar')}", "clip")
    (folder / "classnames.txt").write_text("a\nb")
    found = "set: 002: its class is 2, but there are 0 to 1"
    with pytest.raises(ValueError, match=found):
        evaluation.check_sets(str(folder), "clip")
    (folder / "classnames.txt").write_text("a\nb\nc")
    labelled_folder(folder, 9, "abcd", "train")
    (folder / "classnames.txt").write_text("a\nb\nc")
    with pytest.raises(ValueError, match="set: 003: its class is 3, but there are 0 to 2"):
        evaluation.check_sets(str(folder), "clip")
    (folder / "train" / "nshards.txt").unlink()
    with pytest.raises(ValueError, match="nshards.txt: says 'no such file'"):
        evaluation.check_sets(str(folder), "clip")
    few = captioned_shard(tmp_path / "few.tar", 9)
    for method, said in (("clip", True), ("mae", False)):
        evaluation.check_sets(str(few), method)
        words = "few.tar: 9 images; there will be no recall, which needs 10"
        assert (words in capsys.readouterr().err) is said
    files = [("1.jpg", picture(8, 8)), ("1.txt", b"a"), ("2.jpg", b"no image"), ("2.txt", b"b")]
    shard = tar_of(tmp_path / "damaged.tar", files)
    with pytest.raises(ValueError, match="damaged.tar: 2: image header unreadable"):
        evaluation.check_sets(str(shard), "clip")
    done = run(*TINY, "--eval-data", shard, "--out", tmp_path / "run", code=2)
    assert "damaged.tar: 2: image header unreadable" in said_in_one_line(done)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_sets_are_joined_by_double_colons(tmp_path):
    folder = labelled_folder(tmp_path / "set")
    shard = captioned_shard(tmp_path / "dev.tar")
    sets = evaluation.open_sets(f"{folder}::{shard}")
    assert [dataset.source for dataset in sets] == [str(folder), str(shard)]
    assert [bool(dataset.classes) for dataset in sets] == [True, False]
    assert evaluation.open_sets("") == []


# --- Evaluation: evaluate -------------------------------------------------------------------------
def test_evaluate_gives_each_task_with_chance_and_number_and_draws_a_picture(trained, tmp_path):
    model, tokenizer, _ = mae_clip.load(trained["mae_clip"])
    folder = labelled_folder(labelled_folder(tmp_path / "set"), 12, split="train")
    shard = captioned_shard(tmp_path / "dev.tar")
    results = evaluation.evaluate(model, tokenizer, f"{folder}::{shard}", tmp_path)
    assert list(results) == ["zero_shot", "linear_probe", "retrieval", "reconstruction"]
    assert results["zero_shot"]["acc5"] is None and results["zero_shot"]["unseen"] is None
    assert results["zero_shot"]["chance"]["acc1"] == 0.5 and results["zero_shot"]["n"] == 8
    assert results["retrieval"]["chance"]["image_retrieval_recall@5"] == pytest.approx(5 / 12)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    (folder / "unseen.txt").write_text("7")  # a class of which there is no image
    again = evaluation.evaluate(model, tokenizer, str(folder))
    assert again["zero_shot"] == results["zero_shot"]
    assert Image.open(tmp_path / "reconstructions.png").width > 500
    assert "image_retrieval_recall@10" in evaluation.format_results(results)


def test_a_task_that_fails_costs_itself_alone_and_a_line(trained, tmp_path, capsys):
    model, tokenizer, _ = mae_clip.load(trained["mae_clip"])
    folder = labelled_folder(labelled_folder(tmp_path / "set", 9, "abc"), 8, "ab", "train")
    (folder / "classnames.txt").write_text("a\nb\nc")
    few = captioned_shard(tmp_path / "few.tar", 9)
    damaged = captioned_shard(tmp_path / "damaged.tar", 600, broken=[599])
    sets = f"{folder}::{few}::{damaged}"
    results = evaluation.evaluate(model, tokenizer, sets, tmp_path)
    assert list(results) == [
        "zero_shot",
        "reconstruction",
        f"reconstruction {damaged}",
    ]
    said = capsys.readouterr().err
    reason = "its train split has no image of 'c'"
    assert f"linear_probe on {folder}: {reason}" in said
    assert "found 9 and 18" in said
    assert "damaged.tar: 599: image does not decode" in said
    assert (tmp_path / "reconstructions.png").exists()
    first = captioned_shard(tmp_path / "first.tar", 12, broken=[0])
    second = tmp_path / "second"
    second.mkdir()
    evaluation.evaluate(model, tokenizer, f"{first}::{few}", second)
    assert (second / "reconstructions.png").exists()


def test_the_scores_of_a_set_do_not_take_the_place_of_those_of_one_that_failed(trained, tmp_path):
    model, tokenizer, _ = mae_clip.load(trained["clip"])
    good = labelled_folder(tmp_path / "good", 8)
    bad = labelled_folder(tmp_path / "bad", 8)
    tar_of(bad / "test" / "0.tar", [("x.jpg", picture()[:300]), ("x.cls", b"0")])
    results = evaluation.evaluate(model, tokenizer, f"{bad}::{good}")
    assert list(results) == [f"zero_shot {good}"]
    assert results[f"zero_shot {good}"]["images"] == {
        "acc1": 8,
        "mean_per_class_recall": 8,
    }


def test_a_run_that_has_nothing_to_score_keeps_the_scores_it_had(trained, tmp_path, capsys):
    model, tokenizer, _ = mae_clip.load(trained["clip"])
    good = str(labelled_folder(tmp_path / "good", 8))
    bad = labelled_folder(tmp_path / "bad", 8)
    tar_of(bad / "test" / "0.tar", [("x.jpg", picture()[:300]), ("x.cls", b"0")])
    file = tmp_path / "results.json"
    evaluation.score_run(model, tokenizer, good, tmp_path, {"steps": 1})
    before = json.loads(file.read_text())
    assert before["steps"] == 1 and "acc1" in before["zero_shot"]
    evaluation.score_run(model, tokenizer, "", tmp_path, {"steps": 1})
    assert "nothing is scored" in capsys.readouterr().out
    with pytest.raises(DataError, match="trained and saved, but none of --eval-data could be"):
        evaluation.score_run(model, tokenizer, str(bad), tmp_path, {"steps": 1})
    assert json.loads(file.read_text()) == before


def test_a_picture_that_cannot_be_written_does_not_cost_the_results(trained, tmp_path, capsys):
    model, tokenizer, _ = mae_clip.load(trained["mae"])
    shard = captioned_shard(tmp_path / "dev.tar")
    results = evaluation.evaluate(model, tokenizer, str(shard), tmp_path / "nowhere")
    assert results["reconstruction"]["n"] == 12
    assert "picture" in capsys.readouterr().err


def test_reconstruction_is_scored_on_removed_patches_and_tokens_alone(trained, tmp_path):
    model, tokenizer, config = mae_clip.load(trained["mae_clip"])
    (dataset,) = evaluation.open_sets(str(captioned_shard(tmp_path / "dev.tar")))
    found = evaluation.reconstructions(model, tokenizer, dataset, 12)
    scores = evaluation.score_reconstruction(model, tokenizer, dataset, None)
    errors = []
    targets = []
    right = []
    for n in range(12):
        for patch in range(found["patches"].shape[1]):
            if found["image_mask"][n, patch]:
                raw = found["patches"][n, patch]
                target = (raw - raw.mean()) / (raw.var() + 1e-6).sqrt()
                errors.append((found["image"][n, patch] - target).square().mean().item())
                targets.append(target.square().mean().item())
        for place in range(config.context):
            if found["text_mask"][n, place]:
                right.append(bool(found["text"][n, place] == found["tokens"][n, place]))
    assert scores["image_loss"].mean() == pytest.approx(np.mean(errors), rel=1e-4)
    assert scores["image_loss"].chance == pytest.approx(np.mean(targets), rel=1e-4)
    assert scores["text_accuracy"].mean() == pytest.approx(np.mean(right))


# --- Evaluation: pictures -------------------------------------------------------------------------
def test_the_prediction_alone_has_the_mean_and_contrast_of_visible_patches(trained, tmp_path):
    model, tokenizer, config = mae_clip.load(trained["mae"])
    (dataset,) = evaluation.open_sets(str(captioned_shard(tmp_path / "dev.tar")))
    found = evaluation.reconstructions(model, tokenizer, dataset, 1)
    columns = pictures.panels(config, found)
    visible = [n for n in range(16) if not found["image_mask"][0, n]]
    means = [found["patches"][0, n].mean().item() for n in visible]
    contrasts = [found["patches"][0, n].std().item() for n in visible]
    for n in range(16):
        drawn = columns["prediction alone"][0, n]
        helped = columns["reconstruction"][0, n]
        truth = found["patches"][0, n]
        if n in visible:
            assert torch.equal(drawn, truth) and torch.equal(helped, truth)
        else:
            want = found["image"][0, n] * np.mean(contrasts) + np.mean(means)
            assert torch.allclose(drawn, want, atol=1e-4)
            assert torch.allclose(
                helped, found["image"][0, n] * truth.std() + truth.mean(), atol=1e-4
            )


def test_a_caption_shows_removed_tokens_in_brackets_and_other_letters_than_ascii_as_escapes():
    tokenizer = data.Tokenizer([(3 + ord(" "), 3 + ord("a"))])  # " a" is one token
    ids = tokenizer.encode("x a b")
    assert len(ids) == 4
    shown = pictures.caption_text(tokenizer, ids, ids[::-1], [False, True, False, True])
    assert shown == "x [a:] [b:x]"
    whole = data.Tokenizer([(3 + 0xC3, 3 + 0xA9)])
    halves = data.Tokenizer([])
    for tokenizer, want in ((whole, "\\xe9"), (halves, "\\xc3\\xa9")):
        ids = tokenizer.encode("é")
        assert pictures.caption_text(tokenizer, ids, ids, [False] * len(ids)) == want


def test_methods_without_text_or_without_images_to_predict_have_no_columns_for_them(tmp_path):
    (dataset,) = evaluation.open_sets(str(captioned_shard(tmp_path / "dev.tar")))
    wide = {}
    for name, changes in {
        "both": {},
        "image": {"text_weight": 0.0},
        "text": {"image_weight": 0.0},
        "raw": {"norm_pix": False},
    }.items():
        model = tiny("mae_clip", vocab_size=259, **changes).eval()
        found = evaluation.reconstructions(model, data.Tokenizer([]), dataset, 2)
        wide[name] = list(pictures.panels(model.config, found))
        wide[name] += ["caption"] * bool(found["text_mask"].any())
        evaluation.picture(model, data.Tokenizer([]), dataset, tmp_path / "a.png", 2)
    assert wide == {
        "both": ["original", "masked", "prediction alone", "reconstruction", "caption"],
        "image": ["original", "masked", "prediction alone", "reconstruction"],
        "text": ["original", "caption"],
        "raw": ["original", "masked", "reconstruction", "caption"],
    }


def test_a_long_caption_does_not_reach_the_next_row(trained, tmp_path):
    longer = tiny("mae_clip", vocab_size=259, context=400).eval()
    files = []
    for n in range(12):
        files += [(f"{n}.jpg", picture(seed=n)), (f"{n}.txt", b"word and word " * 40)]
    (dataset,) = evaluation.open_sets(str(tar_of(tmp_path / "long.tar", files)))
    evaluation.picture(longer, data.Tokenizer([]), dataset, tmp_path / "a.png", 2)
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    captions = sheet[:, -340:]  # right of all pictures
    assert (captions[40:60] < 128).any()  # the first row's begins here
    assert (captions[194:198] == 255).all()  # and ends above the second row's, at 200


# --- Evaluation: suite and command line -----------------------------------------------------------
def test_the_suite_sets_checkpoints_side_by_side_with_chance_and_intervals(
    trained, tmp_path, capsys
):
    folder = labelled_folder(labelled_folder(tmp_path / "set", 40), 24, split="train")
    paths = [trained["clip"], trained["mae"]]
    flags = ("--data", folder, "--untrained", "--format", "json")
    table = {row["task"]: row for row in json.loads(call(capsys, "suite", *paths, *flags))}
    names = [str(path) for path in paths]
    assert table.keys() == {"zero_shot", "linear_probe", "knn"}
    assert table["linear_probe"]["chance"] == 0.5 and table["linear_probe"]["images"] == 40
    lead = " less ".join(names)
    assert table["linear_probe"]["values"].keys() == {*names, "untrained", lead}


def test_checkpoints_are_named_as_they_were_typed_and_tables_may_be_markdown(
    trained, tmp_path, capsys
):
    folder = labelled_folder(labelled_folder(tmp_path / "set", 40), 24, split="train")
    paths = []
    for place in ("one", "two"):
        paths.append(tmp_path / place / "run" / "checkpoint-1.pt")
        paths[-1].parent.mkdir(parents=True)
        paths[-1].write_bytes(trained["clip"].read_bytes())
    runs = [path.parent for path in paths]
    rows = json.loads(call(capsys, "knn", *runs, "--data", folder, "--format", "json"))
    lead = f"{runs[0]} less {runs[1]}"
    assert list(rows[0]["values"]) == [str(runs[0]), str(runs[1]), lead]
    assert rows[0]["values"][lead] == [0, 0, 0]
    text = call(capsys, "knn", paths[0], "--data", folder, "--format", "markdown")
    assert text.splitlines()[0].startswith("set | task") or "| task" in text.splitlines()[0]


def test_a_set_that_a_single_task_does_not_fit_is_said_and_the_others_are_scored(
    trained, tmp_path, capsys
):
    folder = labelled_folder(labelled_folder(tmp_path / "set", 40), 24, split="train")
    shard = captioned_shard(tmp_path / "dev.tar")
    evaluation.main(["knn", str(trained["clip"]), "--data", f"{folder}::{shard}"])
    said = capsys.readouterr()
    assert (
        "dev.tar is no labelled folder, with classnames.txt, which knn needs" in said.err
        and "knn" in said.out
    )


def test_one_photo_is_classified_by_labels(trained, tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(picture())
    photo = tmp_path / "photo.jpg"
    said = call(capsys, "zero-shot", trained["clip"], photo, "--labels", "a dog, a cat,")
    assert said.split()[4:] and "a dog" in said and "a cat" in said
    shares = [float(line.split()[-2]) for line in said.splitlines()[2:]]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.2)
    assert said == call(
        capsys, "zero-shot", trained["clip"], photo, "--labels", "a dog,a cat,a dog"
    )


def test_what_eval_cannot_use_is_refused_in_one_line(trained, tmp_path, capsys):
    clip = trained["clip"]
    mae = trained["mae"]
    folder = labelled_folder(labelled_folder(tmp_path / "set", 8, "abc"), 8, "abc", "train")
    alone = labelled_folder(tmp_path / "alone")
    cut = labelled_folder(labelled_folder(tmp_path / "cut", 24, "abc"), 24, "abc", "train")
    (cut / "classnames.txt").write_text("a\nb")
    shard = captioned_shard(tmp_path / "dev.tar")
    few = captioned_shard(tmp_path / "few.tar", 9)
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(picture())
    bad = tmp_path / "bad.pt"
    bad.write_bytes(clip.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()

    def refused(says, *words):
        with pytest.raises(SystemExit) as end:
            evaluation.main([str(word) for word in words])
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if not line.startswith("usage: ")]
        assert end.value.code == 2 and len(said) == 1 and says in said[0], said

    refused("COMMAND", "")
    refused("no-such", "no-such", clip)
    refused("--color", "knn", clip, "--data", folder, "--color", "red")
    refused("needs --data", "zero-shot", clip)
    refused("contrastive loss", "zero-shot", mae, "--data", folder)
    refused("contrastive loss", "retrieval", mae, "--data", shard)
    refused("captioned shards", "retrieval", clip, "--data", folder)
    refused("labelled folder", "knn", clip, "--data", shard)
    refused("labelled folder", "zero-shot", clip, "--data", shard)
    refused("no train split", "linear-probe", clip, "--data", alone)
    refused("its class is 2, but there are 0 to 1", "linear-probe", clip, "--data", cut)
    refused("no reconstruction loss", "reconstruct", clip, "--data", shard)
    refused("number of training images, 8", "knn", clip, "--data", folder)
    refused("no task of the suite fits", "suite", mae, "--data", alone)
    refused("suite has no flag --out", "suite", mae, "--data", shard, "--out", "x")
    refused("10 images", "retrieval", clip, "--data", few)
    refused("for one photo: zero-shot with --labels", "zero-shot", clip, photo)
    refused("two labels", "zero-shot", clip, photo, "--labels", "a")
    refused("two labels", "zero-shot", clip, photo, "--labels", "")
    refused("retrieval has no flag --labels", "retrieval", clip, photo, "--labels", "a,b")
    refused("retrieval needs --data", "retrieval", clip)
    refused("contrastive loss", "zero-shot", mae, photo, "--labels", "a,b")
    refused("one CHECKPOINT and one PHOTO", "zero-shot", clip, "--labels", "a,b")
    refused("bad.pt", "zero-shot", clip, bad, "--labels", "a,b")
    refused("nothing.jpg", "zero-shot", clip, tmp_path / "nothing.jpg", "--labels", "a,b")
    refused("gone.pt", "knn", tmp_path / "gone.pt", "--data", folder)
    refused("empty: ", "knn", tmp_path / "empty", "--data", folder)
    refused("bad.pt", "knn", bad, "--data", folder)


def test_reconstruct_draws_into_the_runs_folder_and_says_so(trained, tmp_path, capsys):
    shard = captioned_shard(tmp_path / "dev.tar")
    evaluation.main(["reconstruct", str(trained["mae_clip"].parent), "--data", str(shard)])
    path = trained["mae_clip"].parent / "reconstruct.png"
    said = capsys.readouterr()
    assert str(path) in said.err and "image_loss" in said.out
    assert Image.open(path).height > 8 * 160
    nowhere = tmp_path / "nowhere" / "x.png"
    with pytest.raises(SystemExit) as end:
        evaluation.main(
            ["reconstruct", str(path.parent), "--data", str(shard), "--out", str(nowhere)]
        )
    assert end.value.code == 2 and str(nowhere) in capsys.readouterr().err


@pytest.mark.parametrize("name, says", [("x.psd", "no name of a picture"), ("no/x.png", "folder")])
def test_reconstruct_refuses_a_name_before_it_computes(trained, tmp_path, capsys, name, says):
    shard = captioned_shard(tmp_path / "dev.tar")
    words = ["reconstruct", trained["mae_clip"], "--data", shard, "--out", tmp_path / name]
    with mock.patch.object(evaluation, "suite", side_effect=AssertionError("it computes")):
        with pytest.raises(SystemExit) as end:
            evaluation.main([str(word) for word in words])
    assert end.value.code == 2 and says in capsys.readouterr().err


# --- Evaluation: benchmark ------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_the_counted_operations_are_those_of_a_real_pass(method):
    model = tiny(method, decoder_depth=2, batch_size=6)
    tokens = data.Tokenizer([]).batch(["a dog"] * 6, 16)
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    batch = (images, tokens, torch.rand(6, 16), torch.rand(6, 16), [images, images])
    math_alone = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_alone:
        model(*batch)
    assert evaluation.forward_flops(model, batch) == counter.get_total_flops()


def test_a_linear_layers_operations_are_two_a_multiply_add():
    assert evaluation.forward_flops(torch.nn.Linear(3, 5), [torch.zeros(7, 3)]) == 2 * 7 * 3 * 5


def test_the_benchmark_prints_its_figures_and_writes_them(tmp_path, capsys):
    flags = ("--scale", "tiny", "--batch-size", 8, "--out", tmp_path / "out")
    assert "TFLOP/s" in call(capsys, "benchmark", *flags)
    found = json.loads((tmp_path / "out").read_text())
    assert found["method"] == "mae_clip" and found["TFLOP/s"] > 0 and found["share"] > 0


def test_the_benchmark_feeds_a_method_from_shards(tmp_path, capsys):
    shard = captioned_shard(tmp_path / "train.tar", 24)
    flags = ["--scale", "tiny", "--method", "m3ae", "--batch-size", 8, "--workers", 0]
    call(capsys, "benchmark", *flags, "--data", shard, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out").read_text())
    assert found["method"] == "m3ae" and found["fed pairs/s"] > 0


def test_every_command_says_what_it_does():
    said = evaluation.make_parser().format_help()
    for name, (_, text) in evaluation.COMMANDS.items():
        assert name in said and text.split(",")[0] in " ".join(said.split())
    assert Path(evaluation.__file__).name in said


# --- The commands, as a user types them -----------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the tests' own, so that they find nothing that they did not make."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def run(*arguments, code=0):
    """What mae_clip.py prints, called in this process; checks its exit code."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            mae_clip.main([str(argument) for argument in arguments])
    assert (end.value.code or 0) == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def said_in_one_line(done):
    """The single line on stderr that says what was wrong, without a traceback."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def logged(out):
    """The records of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


TINY = ("--scale", "tiny", "--batch-size", 32, "--scenes", 400, "--workers", 0)


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory, cache):
    """A short run of each method: its name, its folder, what it printed."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    flags = ("--method", request.param, "--steps", 12, "--workers", 1, "--out", out)
    done = run(*TINY, *flags)
    return SimpleNamespace(method=request.param, out=out, said=done.stdout)


def test_a_run_says_before_training_what_will_happen(finished):
    for name in ("method", "loss", "data", "images", "device", "steps"):
        assert re.search(f"^{name} ", finished.said, re.MULTILINE), name
    contrasts = "contrastive" in METHODS[finished.method]
    assert ("\nchance      a contrastive loss of 3.466\n" in finished.said) == contrasts
    assert finished.method in finished.said


def test_lines_of_the_log_say_every_term_and_fit_80_columns(finished):
    lines = re.findall("^step .*", finished.said, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["10", "12"]
    for line in lines:
        assert len(line) <= 80 and "pairs/s" in line and "waiting" in line
        for term in METHODS[finished.method]:
            assert re.search(rf" {term} \d+[.]\d{{3}}", line)


def test_a_run_logs_every_term_and_figure_of_its_steps(finished):
    records = logged(finished.out)
    assert [record["step"] for record in records] == [10, 12]
    assert [record["pairs"] for record in records] == [320, 384]
    names = {"epoch", "loss", "lr", "grad_norm", "skipped", "pairs_per_second", "waiting"}
    for record in records:
        assert names | set(METHODS[finished.method]) <= set(record)
        if "contrastive" in record:
            assert 1 <= record["scale"] <= 100


def test_every_parameter_of_a_run_has_the_learning_rate_of_the_step(finished):
    state = torch.load(finished.out / "checkpoint-12.pt", weights_only=True)
    wanted = mae_clip.learning_rate(11, Config(**state["config"]))
    assert wanted > 0
    assert logged(finished.out)[-1]["lr"] == wanted
    for optimizer in state["optimizers"]:
        assert [group["lr"] for group in optimizer["param_groups"]] == [
            wanted for _ in optimizer["param_groups"]
        ]


def test_a_run_scores_what_its_method_can_do(finished):
    results = json.loads((finished.out / "results.json").read_text())
    assert results["steps"] == 12
    assert results["config"]["method"] == finished.method
    matches_text = finished.method in ("clip", "mae_clip", "slip")
    assert ("zero_shot" in results) == matches_text
    reconstructs = finished.method in ("mae", "m3ae", "mae_clip")
    assert (finished.out / "reconstructions.png").exists() == reconstructs


def test_what_a_run_trained_is_loaded_from_its_folder(finished):
    model, tokenizer, config = mae_clip.load(finished.out)
    assert config.method == finished.method
    assert (tokenizer is None) == (finished.method == "mae")
    assert not any("module." in name or "_orig_mod" in name for name in model.state_dict())


@pytest.mark.parametrize("method", ["mae_clip", "slip"])
def test_a_resumed_run_equals_one_in_a_single_piece_bit_for_bit(tmp_path, method):
    # There are 12 steps an epoch. Workers may differ between a run and its continuation.
    steps = (*TINY, "--method", method, "--steps", 6, "--log-every", 2)
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    run(*steps, "--out", whole)
    said = run(*steps, "--out", parts, "--stop-after", 3).stdout
    assert "--resume" in said
    assert [path.name for path in parts.glob("*.pt")] == ["checkpoint-3.pt"]
    run(*steps, "--out", parts, "--resume", "--workers", 1)
    wanted = torch.load(whole / "checkpoint-6.pt", weights_only=True)
    found = torch.load(parts / "checkpoint-6.pt", weights_only=True)
    assert_equal(dict(found["model"]), dict(wanted["model"]))
    assert_equal(found["optimizers"], wanted["optimizers"])
    scores = [json.loads((out / "results.json").read_text()) for out in (whole, parts)]
    assert scores[0]["zero_shot"] == scores[1]["zero_shot"]


def test_a_run_that_was_killed_after_its_checkpoint_logs_no_step_twice(tmp_path):
    steps = (*TINY, "--method", "clip", "--steps", 6, "--log-every", 1, "--save-every", 2)
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    run(*steps, "--out", whole)
    run(*steps, "--out", killed, "--stop-after", 4)
    (killed / "checkpoint-4.pt").unlink()  # as if it had been killed before this one was written
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 5, "epo')  # and while it wrote that
    run(*steps, "--out", killed, "--resume")
    for wanted, found in zip(logged(whole), logged(killed), strict=True):
        for name in ("step", "epoch", "pairs", "contrastive", "loss", "grad_norm", "lr", "scale"):
            assert found[name] == wanted[name]


def test_scoring_that_was_interrupted_is_done_again_by_resume(tmp_path):
    steps = (*TINY, "--method", "clip", "--steps", 4, "--log-every", 2, "--out", tmp_path / "run")
    with mock.patch("eval.evaluate", side_effect=KeyboardInterrupt):
        run(*steps, code=130)
    assert not (tmp_path / "run" / "results.json").exists()
    before = mae_clip.load(tmp_path / "run")[0].state_dict()
    run(*steps, "--resume")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 4
    assert_equal(dict(mae_clip.load(tmp_path / "run")[0].state_dict()), dict(before))
    assert [record["step"] for record in logged(tmp_path / "run")] == [2, 4]


def test_samples_trains_on_so_many_of_the_data_alone(tmp_path):
    flags = (*TINY, "--method", "clip", "--samples", 64, "--steps", 4, "--log-every", 2)
    run(*flags, "--out", tmp_path / "run")
    assert [record["epoch"] for record in logged(tmp_path / "run")] == [1, 2]


def test_a_finished_run_can_be_given_more_steps_and_goes_on_by_their_schedule(tmp_path):
    flags = (*TINY, "--method", "clip", "--warmup", 0, "--log-every", 1, "--out", tmp_path / "run")
    run(*flags, "--steps", 2)
    done = run(*flags, "--steps", 4, "--resume")
    assert "trained for 2 steps, and now for more" in done.stdout
    records = logged(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    config = mae_clip.load(tmp_path / "run")[2]
    assert config.steps == 4
    assert [record["lr"] for record in records[2:]] == [
        mae_clip.learning_rate(step, config) for step in (2, 3)
    ]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 4


def test_a_finished_run_is_not_made_shorter(tmp_path):
    flags = (*TINY, "--method", "clip", "--out", tmp_path / "run")
    run(*flags, "--steps", 4)
    refused = run(*flags, "--steps", 3, "--resume", code=2)
    assert "was trained with --steps 4" in said_in_one_line(refused)


def test_the_logit_scale_stays_between_1_and_100(tmp_path):
    flags = (*TINY, "--method", "clip", "--lr", 5.0, "--warmup", 0, "--steps", 3)
    run(*flags, "--stop-after", 2, "--out", tmp_path / "run")
    model = mae_clip.load(tmp_path / "run")[0]
    assert 0 <= model.logit_scale <= math.log(100)


def test_a_run_without_a_finite_loss_ends_and_says_what_to_do(tmp_path):
    flags = ("--method", "clip", "--lr", 1e30, "--warmup", 0, "--steps", 20, "--log-every", 2)
    done = run(*TINY, *flags, "--out", tmp_path / "run", code=2)
    said = said_in_one_line(done)
    assert "step 11: none of the last 10 was finite" in said
    assert "begin anew, with lower --lr and another --out" in said


def test_a_few_steps_that_are_not_finite_do_not_end_a_run(tmp_path, monkeypatch):
    step = mae_clip.train_step
    count = iter(range(12))

    def failing(*arguments):
        row = step(*arguments)
        return row if next(count) in (0, 3, 4, 10) else None

    monkeypatch.setattr(mae_clip, "train_step", failing)
    flags = ("--method", "clip", "--steps", 12, "--log-every", 1)
    said = run(*TINY, *flags, "--out", tmp_path / "run").stdout
    records = logged(tmp_path / "run")
    found = [(record["step"], record["skipped"]) for record in records]
    assert found == [(1, 0), (4, 2), (5, 0), (11, 5)]
    assert "step 10: the last 5 changed nothing: not finite" in said
    assert (tmp_path / "run" / "results.json").exists()
    state = torch.load(tmp_path / "run" / "checkpoint-12.pt", weights_only=True)
    assert state["step"] == 12  # a last step that was not finite loses nothing


@pytest.mark.parametrize("steps, lost", [(30, 10), (6, 3)])
def test_the_last_checkpoint_of_a_finite_loss_is_kept(tmp_path, monkeypatch, steps, lost):
    step = mae_clip.train_step
    count = iter(range(steps))
    monkeypatch.setattr(
        mae_clip, "train_step", lambda *inputs: step(*inputs) if next(count) < 3 else None
    )
    flags = ("--method", "clip", "--steps", steps, "--log-every", 50, "--save-every", 1)
    done = run(*TINY, *flags, "--out", tmp_path, code=2)
    assert f"step {3 + lost}: none of the last {lost} was finite" in said_in_one_line(done)
    assert sorted(tmp_path.glob("checkpoint-*")) == [
        tmp_path / f"checkpoint-{n}.pt" for n in (2, 3)
    ]
    assert not (tmp_path / "results.json").exists()


SIGNALS = [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)]  # names and exit codes


@pytest.fixture
def from_a_terminal():
    """Signals as a shell's foreground job has them; a background one, as the tests may be, ignores
    SIGINT, and one of nohup SIGHUP."""
    before = {}
    for name, _ in SIGNALS:
        number = getattr(signal, name)
        before[number] = signal.signal(number, lambda *_: None)  # a child has the default again
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name, code", SIGNALS)
def test_a_signal_saves_says_how_to_go_on_and_ends_with_its_code(
    tmp_path, from_a_terminal, name, code
):
    number = getattr(signal, name)
    out = tmp_path / "run"
    flags = [*TINY, "--steps", 5000, "--log-every", 1, "--out", out]
    command = [sys.executable, HERE / "mae_clip.py", *[str(word) for word in flags]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == code
    assert "--resume" in said
    assert list(out.glob("checkpoint-*.pt"))


def test_what_a_run_says_reaches_a_file_at_once_so_that_a_kill_loses_none_of_it(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--steps", 5000, "--log-every", 1, "--out", out]
    command = [sys.executable, HERE / "mae_clip.py", *[str(word) for word in flags]]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL, env=buffered)
    log = out / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert "\nstep 2 " in (tmp_path / "said").read_text()


def signal_before_each_step(monkeypatch, number):
    """Training raises the signal, as if it came from outside."""
    step = mae_clip.train_step

    def signalled(*arguments):
        signal.raise_signal(number)
        return step(*arguments)

    monkeypatch.setattr(mae_clip, "train_step", signalled)


def test_a_signal_that_the_run_was_started_to_ignore_does_not_stop_it(tmp_path, monkeypatch):
    signal_before_each_step(monkeypatch, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run(*TINY, "--method", "clip", "--steps", 2, "--out", tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "results.json").exists()


def test_a_signal_in_the_last_step_does_not_cost_the_scores(tmp_path, monkeypatch):
    signal_before_each_step(monkeypatch, signal.SIGTERM)
    run(*TINY, "--method", "clip", "--steps", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "results.json").exists()


def test_a_signal_while_the_run_is_scored_saves_the_steps_made_and_ends_the_scoring(
    tmp_path, monkeypatch
):
    def scoring(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the scoring goes on")

    monkeypatch.setattr(validation, "validation", scoring)
    flags = [*TINY, "--method", "clip", "--steps", 4, "--out", tmp_path / "run"]
    done = run(*flags, "--eval-every", 3, code=143)
    assert "saved: checkpoint-3.pt" in done.stdout
    monkeypatch.undo()
    run(*flags, "--eval-every", 3, "--resume")
    assert (tmp_path / "run" / "results.json").exists()


def test_a_closed_terminal_or_pipe_does_not_cost_the_steps_that_were_made(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(mae_clip.tqdm, "write", closed)
    flags = [*TINY, "--method", "clip", "--steps", 4, "--log-every", 3, "--out", tmp_path / "run"]
    assert "Broken pipe" in said_in_one_line(run(*flags, code=2))
    assert (tmp_path / "run" / "checkpoint-3.pt").exists()
    monkeypatch.undo()
    run(*flags, "--resume")
    assert [line["step"] for line in logged(tmp_path / "run")] == [3, 4]


def test_a_program_whose_terminal_was_closed_ends_without_a_traceback(monkeypatch):
    gone = mock.Mock()
    gone.write.side_effect = OSError(5, "Input/output error")
    monkeypatch.setattr(sys, "stderr", gone)
    machine.say_last("a line")
    assert gone.write.called


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sockets of files")
def test_a_run_leaves_nothing_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    flags = [*TINY, "--method", "clip", "--steps", 3, "--workers", 2, "--out", tmp_path / "run"]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        done = python(mae_clip.__file__, *flags)
        assert done.returncode == 0, done.stderr
        assert not list(Path(folder).glob("pymp-*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sockets of files")
def test_a_folder_too_long_for_sockets_is_refused_where_a_run_would_wait_for_ever(
    tmp_path, monkeypatch
):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    flags = [*TINY, "--method", "clip", "--steps", 3, "--workers", 2, "--out", tmp_path / "run"]
    done = python(mae_clip.__file__, *flags)
    assert done.returncode == 2 and "too long a path for sockets" in said_in_one_line(done)


def test_a_log_that_cannot_be_written_is_named_and_the_steps_made_are_saved(tmp_path, monkeypatch):
    def full(path, mode):
        if path == tmp_path / "run" / "log.jsonl":
            raise OSError(28, "No space left")
        return open(path, mode)

    monkeypatch.setattr(machine, "open", full, raising=False)
    flags = [*TINY, "--method", "clip", "--steps", 4, "--log-every", 3, "--out", tmp_path / "run"]
    said = said_in_one_line(run(*flags, code=2))
    assert f"{tmp_path}/run/log.jsonl: could not be written, with " in said
    assert "No space left" in said
    assert (tmp_path / "run" / "checkpoint-3.pt").exists()


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, cache):
    """The flags of a run of six steps, and its folder, where it was stopped after four."""
    flags = (*TINY, "--method", "clip", "--steps", 6)
    out = tmp_path_factory.mktemp("stopped") / "run"
    run(*flags, "--out", out, "--stop-after", 4, "--save-every", 2)
    return flags, out


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """The same, of a copy that a test may change."""
    flags, out = stopped_run
    shutil.copytree(out, tmp_path / "run")
    return (*flags, "--out", tmp_path / "run"), tmp_path / "run"


def test_a_run_is_not_resumed_on_other_data(stopped):
    flags, _ = stopped
    other = f"{scenes.builtin(400, 5)}/train-*.tar"
    done = run(*flags, "--resume", "--data", other, code=2)
    assert "not the samples that" in said_in_one_line(done)


@pytest.mark.parametrize("lost", ["checkpoint-*.pt", "config.json"])
def test_a_run_that_was_started_is_not_overwritten_whatever_is_left_of_it(stopped, lost):
    flags, out = stopped
    for path in out.glob(lost):
        path.unlink()
    assert "--resume" in said_in_one_line(run(*flags, code=2))


def test_a_run_that_is_complete_is_not_trained_again(stopped):
    flags, out = stopped
    run(*flags, "--resume")
    assert "--out" in said_in_one_line(run(*flags, code=2))
    before = mae_clip.load(out)[0].state_dict()
    run(*flags, "--resume")
    assert_equal(dict(mae_clip.load(out)[0].state_dict()), dict(before))


@pytest.mark.parametrize(
    "other, says",
    [
        (("--lr", 0.02), "--lr 0.01"),
        (("--steps", 8), "--steps 6"),  # only a finished run may be longer
        (("--samples", 100), "--samples 0"),
        (("--pool", "cls"), "--pool gap"),
        (("--data-seed", 5), "--data"),
    ],
)
def test_another_run_is_not_resumed_and_the_flag_that_differs_is_named(stopped, other, says):
    flags, _ = stopped
    assert says in said_in_one_line(run(*flags, "--resume", *other, code=2))


def test_a_damaged_checkpoint_is_named_and_the_run_not_begun_anew(stopped):
    flags, out = stopped
    newest = out / "checkpoint-4.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert "checkpoint-4.pt" in said_in_one_line(run(*flags, "--resume", code=2))


def test_of_a_checkpoint_with_unknown_settings_their_name_is_said(stopped):
    flags, out = stopped
    state = torch.load(out / "checkpoint-4.pt", weights_only=True)
    state["config"]["of_the_future"] = 1
    torch.save(state, out / "checkpoint-4.pt")
    assert "argument 'of_the_future'" in said_in_one_line(run(*flags, "--resume", code=2))


def test_a_run_goes_on_from_the_checkpoint_before_where_the_newest_one_is_removed(stopped):
    flags, out = stopped
    (out / "checkpoint-4.pt").unlink()
    run(*flags, "--resume")
    assert [record["step"] for record in logged(out)] == [6]  # as the log of that one goes on


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--colour", "red"), "--colour"),
        (("--decoder", "joint"), "--decoder"),
        (("--step", "5"), "--step"),
        (("--steps", "many"), "--steps"),
        (("--mask-ratio", "2"), "--mask-ratio"),
        (("--method", "dino"), "--method"),
        (("--patch-size", "7"), "--patch-size"),
        (("--data", "nowhere-*.tar"), "nowhere-*.tar"),
        (("--eval-data", "nowhere"), "nowhere"),
        (("--device", "cuda:7"), "--device"),
        (("--device", "meta"), "--device meta"),
        (("--out", "/proc/no/run"), "/proc/no"),
        (("--batch-size", "500"), "400 usable samples"),
        (("--scale", "huge"), "--scale"),
        (("--tokenizer", "none.json"), "none.json"),
        (("--accumulate", "0"), "--accumulate 0"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_exit_code_2(arguments, says, tmp_path):
    out = () if "--out" in arguments else ("--out", tmp_path / "run")
    assert says in said_in_one_line(run(*TINY, *out, *arguments, code=2))


def test_what_is_secret_in_a_command_is_neither_shown_nor_kept(tmp_path):
    flags = [*TINY, "--steps", 6, "--stop-after", 3, "--out", tmp_path / "run", "--data"]
    train = f"pipe:cat {captioned_shard(tmp_path / 'train.tar', 64)}"
    sets = f"pipe:cat {captioned_shard(tmp_path / 'dev.tar', 20)}"
    word = "t0ken"
    sets = ("--eval-data", f"{sets}; : {word}")
    done = [run(*flags, f"{train}; : {word}", *sets)]
    done += [run(*flags, f"{train}; : new {word}", *sets, "--resume", "--stop-after", 6)]
    done += [run(*flags, f"pipe:cat z.tar; : {word}", "--resume", code=2)]
    for typo in ("a.tar::\n\tpipe:", "a.tar: :pipe:", "pipe :"):
        done += [run(*flags, f"{typo}cat z.tar; : {word}", "--resume", code=2)]
    said = "".join(each.stdout + each.stderr for each in done)
    assert "recall@10" in said and "not the samples" in said and word not in said
    for path in (tmp_path / "run").iterdir():
        assert word.encode() not in path.read_bytes(), path
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["data"], kept["eval_data"]) == ("train.tar", "dev.tar")


def test_training_across_two_processes_in_pieces_equals_one(tmp_path):
    steps = (*TINY, "--steps", 4, "--log-every", 2, "--precision", "fp32")
    with mock.patch("eval.score_run"):
        run(*steps, "--out", tmp_path / "one")
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    flags = [*steps, "--accumulate", 2, "--out", tmp_path / "two"]
    words = [str(word) for word in flags]
    command = [sys.executable, *launcher, HERE / "mae_clip.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for name in ("contrastive", "image", "text", "loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)


def test_the_command_alone_makes_the_process_keep_its_memory():
    with mock.patch("ctypes.CDLL") as library:
        run("--help")
        assert not library.called or sys.platform == "linux"
    with mock.patch("ctypes.CDLL") as library:
        machine.keep_memory()
    assert library.return_value.mallopt.called == (sys.platform == "linux")


# --- The flags ------------------------------------------------------------------------------------


def test_help_names_every_field_with_its_comment_and_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    said = " ".join(run("--help").stdout.split())
    source = Path(mae_clip.__file__).read_text().splitlines()
    for field in dataclasses.fields(Config):
        (line,) = [line for line in source if line.startswith(f"    {field.name}: ")]
        _, text = line.split("  # ")
        flag = "--" + field.name.replace("_", "-")
        assert f" {flag}" in said
        assert f"{text} ({field.default})" in said, flag
    assert "share of patches removed (MAE: 0.75) (0.75)" in said
    assert "--scale" in said


def test_each_field_is_a_flag_that_sets_it():
    words = []
    wanted = {}
    for field in dataclasses.fields(Config):
        value = field.default
        flag = "--" + field.name.replace("_", "-")
        if field.type in (bool, bool | None):
            wanted[field.name] = not value
            words.append(flag if not value else flag.replace("--", "--no-", 1))
            continue
        if isinstance(value, str) and field.name not in mae_clip.CHOICES:
            value = f"{value}x"
        wanted[field.name] = value
        words += [flag, str(value)]
    assert dataclasses.asdict(mae_clip.parse(words)) == wanted


def test_a_flag_goes_before_the_scale():
    config = mae_clip.parse(["--scale", "base", "--depth", "3", "--method", "clip"])
    assert config == preset("base", depth=3, method="clip")


def test_small_is_the_default_scale():
    assert mae_clip.parse([]) == preset("small")


# --- The experiment -------------------------------------------------------------------------------

# Stands for mae_clip.py: its accuracy follows from method, pairs and seed. With --lr 9 it fails,
# and with --lr 8 it waits to be ended, unless it was begun before.
STAND_IN = """
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1:-1:2], sys.argv[2:-1:2]))
out = pathlib.Path(flags["--out"])
begun = out.exists()
out.mkdir(exist_ok=True)
print(*sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if flags.get("--lr") == "9":
    sys.exit("mae_clip.py: error: lower --lr")
while flags.get("--lr") == "8" and not begun:
    time.sleep(0.05)
gain = {"clip": 0.0, "mae_clip": 0.01}[flags["--method"]] * int(flags["--seed"])
acc1 = int(flags["--samples"]) / 10_000 + gain
task = {"acc1": acc1, "n": 10, "chance": {"acc1": 0.1}}
(out / "results.json").write_text(json.dumps({"zero_shot": task, "seconds": 1.2, "steps": 5}))
"""
GRID = ("--samples", "1000,2000", "--pool", "gap", "--seed", "1,2,3", "--scale", "tiny")


@pytest.fixture
def stand_in(monkeypatch, interrupt_raises):
    """The experiment runs a stand-in for mae_clip.py."""
    command = [sys.executable, "-c", STAND_IN]
    monkeypatch.setattr(experiment, "launch", lambda slot, jobs: (command, dict(os.environ)))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def rows_of(scores):
    """{(arm, pairs, pool, seed): share} -> rows of a table of runs that have zero-shot scores."""
    return {key: {"zero_shot acc1": str(share)} for key, share in scores.items()}


def test_an_arm_is_a_method_with_flags_of_its_own():
    key = ("clip@steps=7@batch_size=64", "100", "max", "3")
    config = mae_clip.parse(experiment.run_flags(key, ["--scale", "tiny", "--lr", "1e-3"]))
    other = mae_clip.parse(experiment.run_flags(("mae@no_norm_pix", "1", "gap", "1"), []))
    assert config.norm_pix and not other.norm_pix
    found = (config.method, config.steps, config.batch_size, config.lr)
    assert found == ("clip", 7, 64, 1e-3)
    assert (config.samples, config.pool, config.seed) == (100, "max", 3)


def test_runs_of_one_table_share_all_settings_but_the_axes_and_what_changes_no_result():
    first = experiment.settings(
        ("clip", "100", "max", "3"), ["--workers", "0", "--accumulate", "2"]
    )
    assert first == experiment.settings(("clip", "200", "gap", "4"), ["--log-every", "7"])
    other = experiment.settings(("clip", "100", "max", "3"), ["--data-seed", "5"])
    assert {name for name in first if first[name] != other[name]} == {"data_seed"}


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042)])
def test_students_t_is_that_of_the_printed_tables(freedom, t):
    assert experiment.student_t(freedom) == pytest.approx(t, abs=6e-4)


def test_an_interval_is_the_hand_worked_one():
    # Mean 2, standard deviation 1, three values: half an interval is 4.303 / sqrt(3).
    assert experiment.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2.484), abs=1e-3)


def test_a_gain_is_paired_by_seed_and_takes_the_seeds_that_both_have():
    scores = {("clip", "9", "gap", "1"): 0.5, ("clip", "9", "gap", "2"): 0.1}
    scores |= {("mae_clip", "9", "gap", "2"): 0.3, ("mae_clip", "9", "gap", "1"): 0.6}
    scores |= {("mae_clip", "9", "gap", "3"): 0.9, ("mae_clip", "8", "gap", "1"): 0.8}
    rows = rows_of(scores)
    found = experiment.gain(rows, "zero_shot acc1", "mae_clip", "clip", "9", "gap")
    assert sorted(found) == pytest.approx([10, 20])


def test_the_experiment_makes_every_run_of_its_grid_and_a_row_of_each(stand_in, tmp_path):
    table = experiment.run([*GRID, "--jobs", "3", "--out", str(tmp_path)])
    with (tmp_path / "experiment.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = itertools.product(["clip", "mae_clip"], ["1000", "2000"], ["gap"], ["1", "2", "3"])
    assert {tuple(row[axis] for axis in experiment.AXES) for row in rows} == set(wanted)
    for row in rows:
        gain = 0.01 * int(row["seed"]) if row["arm"] == "mae_clip" else 0
        assert float(row["zero_shot acc1"]) == int(row["samples"]) / 10_000 + gain
        assert row["lr"] == "0.01" and row["seconds"] == "1"
    # Leads of 1, 2 and 3 points: see the hand-worked interval.
    line = r"1,000 +gap +10.0 \(0.0\) +12.0 \(1.0\) +\+2.0 \[-0.5, \+4.5\] \(3\)"
    assert re.search(line, table)
    markdown = (tmp_path / "experiment.md").read_text()
    assert [cell.strip() for cell in markdown.splitlines()[-1].split("|")] == [
        *("zero-shot accuracy", "2,000", "gap", "20.0 (0.0)", "22.0 (1.0)"),
        "+2.0 [-0.5, +4.5] (3)",
    ]


def test_what_is_known_is_not_run_again_whether_here_or_in_another_table(stand_in, tmp_path):
    few = [*GRID[:5], "1,2", *GRID[6:], "--out", str(tmp_path / "a")]
    experiment.run(few)
    before = (tmp_path / "a" / "clip-1000-gap-1-60.log").read_text()
    experiment.run([*GRID, "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "clip-1000-gap-1-60.log").read_text() == before
    assert (tmp_path / "a" / "clip-1000-gap-3-60.log").exists()
    tables = ["--csv", str(tmp_path / "a" / "experiment.csv"), "--out", str(tmp_path / "b")]
    experiment.run([*GRID, *tables])
    assert not list((tmp_path / "b").glob("*.log"))
    assert len((tmp_path / "b" / "experiment.csv").read_text().splitlines()) == 1 + 12


def test_rows_of_other_arms_are_kept(stand_in, tmp_path):
    experiment.run([*GRID, "--out", str(tmp_path)])
    experiment.run(["--method", "mae_clip,clip@steps=9", *GRID, "--out", str(tmp_path)])
    with (tmp_path / "experiment.csv").open(newline="") as file:
        arms = [row["arm"] for row in csv.DictReader(file)]
    assert {arm: arms.count(arm) for arm in arms} == {"clip": 6, "mae_clip": 6, "clip@steps=9": 6}


def test_numbers_are_taken_however_they_are_written(stand_in, tmp_path):
    experiment.run([*GRID, "--out", str(tmp_path)])
    grid = ["--samples", "1000, 02000,1_000", "--pool", " gap", "--seed", "1, 2,3,3"]
    before = (tmp_path / "experiment.csv").read_text()
    table = experiment.run([*grid, "--scale", "tiny", "--out", str(tmp_path)])
    assert (tmp_path / "experiment.csv").read_text() == before
    assert table.count("zero-shot accuracy") == 2


def test_runs_of_other_settings_are_not_mixed_and_the_setting_is_named(stand_in, tmp_path):
    experiment.run([*GRID, "--out", str(tmp_path)])
    with pytest.raises(DataError, match=r"--lr 0.01.*another"):
        experiment.run([*GRID, "--lr", "0.001", "--out", str(tmp_path)])


def test_a_run_that_fails_is_named_and_the_others_go_on_and_the_exit_code_is_1(
    stand_in, tmp_path, capsys
):
    arms = ["--method", "clip,mae_clip@lr=9"]
    with pytest.raises(SystemExit) as end:
        experiment.run([*arms, *GRID, "--out", str(tmp_path)])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "failed: mae_clip@lr=9 1000 gap 2: exit code 1: mae_clip.py: error: lower --lr" in said
    assert len((tmp_path / "experiment.csv").read_text().splitlines()) == 1 + 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_experiment_that_is_interrupted_ends_its_runs_and_goes_on_with_them(
    stand_in, tmp_path, number
):
    grid = [*GRID, "--lr", "8", "--jobs", "2", "--out", str(tmp_path)]

    def interrupt():
        while len(list(tmp_path.glob("*-gap-1-60"))) < 2:  # two runs have begun
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        experiment.run(grid)
    thread.join()
    begun = {path.name for path in tmp_path.glob("*-gap-*") if path.is_dir()}
    assert begun == {"clip-1000-gap-1-60", "mae_clip-1000-gap-1-60"}
    for name in begun:  # so the next sitting resumes them
        assert (tmp_path / f"{name}.log").read_text().split()[-1] == "--resume"
    for key in itertools.product(["clip", "mae_clip"], ["1000", "2000"], "123"):
        (tmp_path / f"{key[0]}-{key[1]}-gap-{key[2]}-60").mkdir(exist_ok=True)
    experiment.run(grid)
    assert len((tmp_path / "experiment.csv").read_text().splitlines()) == 1 + 12


def test_a_sitting_waits_for_another_in_its_folder_and_for_runs_that_one_left_behind(
    stand_in, tmp_path, capsys
):
    folder = tmp_path / "clip-1000-gap-1-60"

    def sit():
        experiment.Runner(tmp_path, ["--scale", "tiny"], 1).run(("clip", "1000", "gap", "1"))

    first = experiment.Runner(tmp_path, ["--scale", "tiny"], 1)
    left_behind = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[first.lock.fileno()])
    second = threading.Thread(target=sit)
    second.start()
    second.join(timeout=0.3)
    assert second.is_alive() and "waits until another sitting" in capsys.readouterr().err
    first.lock.close()  # the first sitting is killed; its run goes on
    second.join(timeout=0.3)
    assert second.is_alive() and not folder.exists()
    left_behind.communicate()
    second.join()
    assert (folder / "results.json").exists()


def test_a_run_holds_the_lock_of_its_folder_and_says_its_own_error(stand_in, tmp_path, monkeypatch):
    show = "import os; print('Error:', os.fstat(0).st_ino, flush=True); raise SystemExit(1)"
    command = [sys.executable, "-c", show]
    monkeypatch.setattr(experiment, "launch", lambda slot, jobs: (command, dict(os.environ)))
    (tmp_path / "clip-1000-gap-1-60.log").write_text("Error: of an earlier sitting\n")
    runner = experiment.Runner(tmp_path, ["--scale", "tiny"], 1)
    with pytest.raises(DataError, match=f"Error: {(tmp_path / 'lock').stat().st_ino};"):
        runner.run(("clip", "1000", "gap", "1"))


def test_a_table_says_what_precision_was_used(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "bf16_speedup", lambda width: 1.5)
    experiment.run([*GRID, "--out", str(tmp_path), "--device", "cpu"])
    with (tmp_path / "experiment.csv").open(newline="") as file:
        assert {row["precision"] for row in csv.DictReader(file)} == {"bf16"}
    monkeypatch.setattr(machine, "bf16_speedup", lambda width: 0.5)
    with pytest.raises(DataError, match="was run with --precision bf16"):
        experiment.run([*GRID, "--out", str(tmp_path), "--device", "cpu"])


def test_a_run_of_which_nothing_was_scored_has_failed():
    results = {"seconds": 1.0, "steps": 5, "config": {"method": "clip"}}
    with pytest.raises(DataError, match="nothing was scored"):
        experiment.make_row(("clip", "1", "gap", "1"), [], results)


def test_cores_and_gpus_are_shared_out_among_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    command, environment = experiment.launch(1, 2)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,3,5,7"
    assert environment["OMP_NUM_THREADS"] == "16"
    assert command[1:3] == ["-m", "torch.distributed.run"] and command[-2] == "4"
    command, environment = experiment.launch(3, 8)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert command == [sys.executable, mae_clip.__file__]
    cards = [experiment.launch(slot, 3)[1]["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert cards == ["0,3", "1,4", "2,5"]  # as many for each run: the batch must be divisible
    _, environment = experiment.launch(9, 16)  # more runs than GPUs
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    _, environment = experiment.launch(1, 2)
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    command, environment = experiment.launch(1, 32)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert command == [sys.executable, mae_clip.__file__, "--workers", "0"]


def test_the_figure_shows_the_tables_numbers():
    scores = {}
    for seed, lead in enumerate([0.01, 0.02, 0.03]):
        for place, samples in enumerate(["1000", "10000", "100000"]):
            scores["clip", samples, "gap", str(seed)] = 0.5
            scores["mae_clip", samples, "gap", str(seed)] = 0.5 + lead - 0.02 * place
    drawing = experiment.draw_figure(rows_of(scores), ["clip", "mae_clip"])
    left = [shape for shape in drawing.shapes if shape[1][0][0] < 150]
    heights = {text: points[0][1] - 3 for kind, points, text, _ in left if kind == "words"}
    unit = (heights["-2"] - heights["2"]) / 4  # of a point

    def values(points):
        return [(heights["0"] - y) / unit for _, y in points]

    line = next(points for kind, points, _, width in left if kind == "line" and width == 1.2)
    assert values(line) == pytest.approx([2, 0, -2], abs=1e-6)
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0])  # a log axis
    band = next(points for kind, points, _, opacity in left if kind == "area" and opacity < 1)
    wanted = [2 + 2.484, 2.484, -2 + 2.484, -2 - 2.484, -2.484, 2 - 2.484]
    assert values(band) == pytest.approx(wanted, abs=1e-3)
    ends = [points for kind, points, _, width in left if kind == "line" and width == 0.8]
    assert sorted(values(end)[0] for end in ends) == pytest.approx(sorted(wanted), abs=1e-3)
    assert "bars: 95 % intervals, 3 seeds" in heights
    scores = [shape for shape in drawing.shapes if shape[0] == "line" and shape[1][0][0] > 150]
    colours = [colour for _, _, colour, width in scores if width == 1.2]
    assert len(set(colours)) == len(colours) == 2  # with one pooling colours tell the arms apart


def test_a_drawing_comes_out_as_svg_and_as_png(tmp_path):
    drawing = pictures.Drawing(40, 20)
    drawing.area([(0, 0), (10, 0), (10, 20), (0, 20)], "#0072b2")
    drawing.line([(20, 0), (20, 20)], "#d55e00", 4)
    drawing.words(30, 15, "a < b")
    drawing.save_svg(tmp_path / "drawing.svg")
    drawing.save_png(tmp_path / "drawing.png")
    root = xml.etree.ElementTree.parse(tmp_path / "drawing.svg").getroot()
    assert [element.tag.split("}")[1] for element in root] == [
        "rect",
        "polygon",
        "polyline",
        "text",
    ]
    assert root[-1].text == "a < b"
    with Image.open(tmp_path / "drawing.png") as image:
        assert image.size == (160, 80)
        assert image.getpixel((20, 40)) == (0, 0x72, 0xB2)
        assert image.getpixel((80, 40)) == (0xD5, 0x5E, 0)
        assert image.getpixel((60, 40)) == (255, 255, 255)


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (-1, 4, [-1, 0, 1, 2, 3, 4]),
        (0, 93, [0, 20, 40, 60, 80]),
        (-0.31, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (7, 7.03, [7, 7.01, 7.02, 7.03]),
    ],
)
def test_ticks_are_round_and_few(low, high, wanted):
    assert pictures.ticks(low, high).tolist() == pytest.approx(wanted)


def test_a_figure_of_many_arms_and_poolings_and_of_one_amount_is_drawn(tmp_path):
    scores = {}
    for number, arm in enumerate(["clip", "mae_clip", "mae_clip@lr=1", "slip", "clip@steps=2"]):
        for pool in ("gap", "max", "cls"):
            scores[arm, "1000", pool, "1"] = 0.1 * number
            scores[arm, "1000", pool, "2"] = 0.1 * number + 0.01
    del scores["clip", "1000", "gap", "1"]  # a hole
    arms = list(dict.fromkeys(arm for arm, *_ in scores))
    drawing = experiment.draw_figure(rows_of(scores), arms)
    drawing.save_png(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_a_single_seed_has_no_interval_and_so_no_figure():
    scores = {(arm, "9", "gap", "1"): 0.5 for arm in ("clip", "mae_clip")}
    assert experiment.draw_figure(rows_of(scores), ["clip", "mae_clip"]) is None
    table = experiment.make_table(rows_of(scores), ["clip", "mae_clip"], "text")
    assert "+0.0 (1)" in table and "[" not in table


def test_the_experiment_trains_and_scores_as_a_user_types_it(tmp_path):
    grid = ["--samples", 100, "--pool", "cls", "--seed", 7, "--jobs", 1, "--out", tmp_path]
    done = python(evaluation.__file__, "experiment", *TINY, "--steps", 2, *grid)
    assert done.returncode == 0, done.stderr
    assert "zero-shot accuracy" in done.stdout and "None" not in done.stdout
    results = json.loads((tmp_path / "clip-100-cls-7-2" / "results.json").read_text())
    assert results["config"]["samples"] == 100 and results["config"]["pool"] == "cls"
    with (tmp_path / "experiment.csv").open(newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert float(rows["clip"]["zero_shot acc1"]) == results["zero_shot"]["acc1"]
    assert rows["clip"]["reconstruction image_loss"] == ""
    assert float(rows["mae_clip"]["reconstruction image_loss"]) > 0


@pytest.mark.parametrize("row", ["clip,many,gap,3", ",,,"])
def test_a_row_that_is_no_run_is_named_before_any_run(row, stand_in, tmp_path):
    table = tmp_path / "edited.csv"
    table.write_text(f"arm,samples,pool,seed\nmae,100,gap,3\n\n{row}\n")
    with pytest.raises(DataError, match="edited.csv.*no run"):
        experiment.run([*GRID, "--csv", str(table), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new" / "experiment.csv").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--method", "clip"], "clip"),
        (["--method", "clip,clap"], "clap"),
        (["--samples", "1000,many"], "many"),
        (["--method", "clip,mae_clip@rate=3"], "--rate"),
        (["--method", "clip,mae_clip@seed=3"], "seed"),
        (["--samples", "0,1000"], "--samples"),
        (["--jobs", "0"], "--jobs"),
        (["--data", "nowhere.tar", "--eval-data", "nowhere.tar"], "nowhere.tar"),
        (["--data", str(HERE / "README.md")], "--eval-data"),
        (["--data", "pipe:cat a.tar", "--eval-data", str(HERE / "README.md")], "no stream"),
        (["--stop-after", "5"], "--stop-after"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused_before_any_run(
    arguments, named, stand_in, tmp_path, capsys
):
    with pytest.raises((SystemExit, ValueError)) as end:
        experiment.run([*arguments, "--scale", "tiny", "--out", str(tmp_path / "new")])
    assert named in capsys.readouterr().err + str(end.value)
    assert not (tmp_path / "new").exists()


# --- The documents --------------------------------------------------------------------------------
def blocks(name, language):
    """The code blocks of a document."""
    text = (HERE / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_of_the_readme_runs(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "photo.jpg").write_bytes(picture(40, 30))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mae_clip-small").symlink_to(trained["mae_clip"].parent)
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("README.md", "python")
    exec(text, {})
    assert len(capsys.readouterr().out.split(",")) == 2  # two cosines


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which applies patches")
@pytest.mark.parametrize("name", ["tokens", "siglip", "teacher", "cross"])
def test_the_patch_of_an_exercise_fits_and_trains(name, tmp_path):
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    patch = HERE / "docs" / "exercises" / f"{name}.patch"
    subprocess.run(["git", "apply", "--unidiff-zero", patch], cwd=tmp_path, check=True)
    assert (tmp_path / "mae_clip.py").read_text() != (HERE / "mae_clip.py").read_text()
    out = tmp_path / "run"
    flags = [*TINY, "--method", "mae_clip", "--steps", 3, "--log-every", 1, "--out", out]
    done = python(tmp_path / "mae_clip.py", *flags)
    assert done.returncode == 0, done.stderr
    first, *_ = logged(out)
    assert len(logged(out)) == 3 and all(math.isfinite(each["loss"]) for each in logged(out))
    if (
        name == "siglip"
    ):  # at first no pair is believed: each image pays for its own, about 10 - 10 cos
        assert 5 < first["contrastive"] < 16


def test_the_picture_of_patches_and_words_in_the_walkthrough_can_be_drawn(
    trained, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mae_clip-small").symlink_to(trained["mae_clip"].parent)
    folder = scenes.builtin(400, 0)
    monkeypatch.setattr(scenes, "builtin", lambda count, seed: folder)
    monkeypatch.chdir(tmp_path)
    (text,) = [block for block in blocks("docs/walkthrough.md", "python") if "patches.png" in block]
    exec(text, {})
    with Image.open("runs/patches.png") as page:
        assert page.size == (770, 672)


def test_the_recipes_of_the_photographs_make_sets_that_can_be_used(tmp_path, monkeypatch):
    captioned, flickr, tiny_imagenet = blocks("docs/data.md", "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Flickr8k.token.txt").write_text("a.jpg#0\ta dog\na.jpg#1\ta cat\nb.jpg#0\tit\n")
    for split, name in (("train", "a"), ("dev", "b")):
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(f"{name}.jpg\n")
        (tmp_path / "Flicker8k_Dataset").mkdir(exist_ok=True)
        (tmp_path / "Flicker8k_Dataset" / f"{name}.jpg").write_bytes(picture())
    exec(flickr, {})
    assert command("pack", "train.csv", "flickr8k-train")[0] == 0
    assert [data.captions(sample) for sample in packed(tmp_path / "flickr8k-train")] == [
        ["a dog", "a cat"]
    ]
    source = tmp_path / "tiny-imagenet-200"
    for wnid in ("n1", "n2"):
        (source / "train" / wnid / "images").mkdir(parents=True)
        for n in range(80):
            (source / "train" / wnid / "images" / f"{wnid}_{n}.JPEG").write_bytes(picture(8, 8))
    (source / "val" / "images").mkdir(parents=True)
    for n in range(4):
        (source / "val" / "images" / f"val_{n}.JPEG").write_bytes(picture(8, 8))
    (source / "wnids.txt").write_text("n2\nn1\n")
    (source / "words.txt").write_text("n1\ta dog, a hound\nn2\ta cat\nn3\tit\n")
    lines = [f"val_{n}.JPEG\tn{1 + n // 2}\t0\t0\t7\t7\n" for n in range(4)]
    (source / "val" / "val_annotations.txt").write_text("".join(lines))
    exec(tiny_imagenet, {})
    (dataset,) = evaluation.open_sets("tiny_imagenet")
    assert dataset.classes == ("a dog", "a cat")
    assert [label for *_, label in dataset.samples("test")] == [0, 1]
    assert len(list(dataset.samples("train"))) == 160
    assert len(loader_of("tiny_imagenet", 20)) == 8
    (tmp_path / "tiny_imagenet").rename("labelled")
    exec(captioned, {})
    found = [data.captions(sample) for sample in data.read_samples("captioned.tar")]
    assert found == [["a photo of a a dog"]] * 80 + [["a photo of a a cat"]] * 80


@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/data.md", "docs/results.md", "docs/weights.md", "docs/walkthrough.md"],
)
def test_every_flag_of_a_command_in_the_documents_is_one_that_is_there(name):
    text = (HERE / name).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(mae_clip|eval|data)\.py ([^`\n|]*)", text)
    assert commands
    known = {"--help", "--scale", "--quick", "--csv", "--jobs"}
    known |= {mae_clip.flag(field.name) for field in dataclasses.fields(Config)}
    known |= {"--no-compile", "--no-norm-pix"}
    for action in evaluation.make_parser()._subparsers._group_actions[0].choices.values():
        known |= set(action._option_string_actions)
    known |= {"--size", "--test", "--shard", "--scenes"}
    for _, words in commands:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", words.split("'pipe:")[0])) <= known, words


@pytest.mark.parametrize("name", ["experiment.csv", "sweep.csv"])
def test_the_tables_of_runs_in_docs_can_be_used(name):
    with (HERE / "docs" / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = {row["arm"] for row in rows}
    flags = ["--precision", "fp32"]
    if name == "sweep.csv":
        flags += "--lr 6e-3 --image-weight 0.1 --text-weight 0.05 --data-seed 1".split()
    _, flags = experiment.parse(flags)
    assert len(experiment.read_rows(HERE / "docs" / name, arms, flags)) == len(rows) > 0


# --- Scores while training ------------------------------------------------------------------------


def test_scores_while_training_change_no_bit_of_the_training(tmp_path):
    states = []
    for every in (0, 2):
        out = tmp_path / str(every)
        run(*TINY, "--method", "slip", "--steps", 5, "--eval-every", every, "--out", out)
        states.append(torch.load(out / "checkpoint-5.pt", weights_only=True))
    for name in ("model", "optimizers"):
        assert_equal(states[0][name], states[1][name])
    plain, scored = logged(tmp_path / "0"), logged(tmp_path / "2")
    assert [record["loss"] for record in scored if "loss" in record] == [
        record["loss"] for record in plain
    ]


def test_scores_while_training_are_lines_of_the_log_and_survive_a_resume(tmp_path):
    flags = [*TINY, "--method", "mae_clip", "--steps", 6, "--eval-every", 2, "--out", tmp_path]
    said = run(*flags, "--stop-after", 4).stdout
    run(*flags, "--resume")
    found = [record for record in logged(tmp_path) if "validation" in record]
    assert [record["step"] for record in found] == [2, 4, 6]
    names = {
        "contrastive",
        "image",
        "text",
        "loss",
        "zero_shot acc1",
        "retrieval image_retrieval_recall@10",
        "retrieval text_retrieval_recall@10",
    }
    assert [set(record["validation"]) for record in found] == [names] * 3
    results = json.loads((tmp_path / "results.json").read_text())
    last = found[-1]["validation"]
    assert last["zero_shot acc1"] == results["zero_shot"]["acc1"]
    assert (
        last["retrieval image_retrieval_recall@10"]
        == (results["retrieval"]["image_retrieval_recall@10"])
    )
    assert all(len(line) <= 80 for line in said.splitlines() if "validation" in line)


def validated(model, tokenizer, config):
    """What validation finds of a run with such a model."""
    loader = SimpleNamespace(tokenizer=tokenizer)
    run = mae_clip.Run(config, model, [], loader)
    return validation.validation(run, torch.device("cpu"), FLOAT32)


@pytest.mark.parametrize("method", METHODS)
def test_validation_losses_are_the_models_own_on_whole_batches_of_the_set(tmp_path, method):
    shard = captioned_shard(tmp_path / "dev.tar", 11)
    model = tiny(method, vocab_size=259)
    config = dataclasses.replace(model.config, eval_data=str(shard), batch_size=4)
    tokenizer = Tokenizer([])
    found = validated(model, tokenizer, config)
    losses = []
    with torch.no_grad():
        for number in range(2):  # of 11 pairs two whole batches of 4
            images = []
            texts = []
            for n in range(4 * number, 4 * number + 4):
                content = picture(40, 40, seed=n)
                images.append(data.preprocess(data.decode(content), config.image_size))
                texts.append(f"number {n}")
            tokens = tokenizer.batch(texts, config.context)
            batch = data.Batch(torch.stack(images), tokens, ())
            given = mae_clip.training_batch(config, number, batch, torch.device("cpu"))
            losses.append(model(*given))
    for name in losses[0]:
        wanted = (losses[0][name] + losses[1][name]).item() / 2
        assert found[name] == pytest.approx(wanted, rel=1e-5), name


def test_validation_on_fewer_pairs_than_a_batch_is_of_them_all(tmp_path):
    shard = captioned_shard(tmp_path / "dev.tar", 5)
    model = tiny("clip", vocab_size=259)
    config = dataclasses.replace(model.config, eval_data=str(shard), batch_size=64)
    found = validated(model, Tokenizer([]), config)
    assert 0 < found["contrastive"] < 2 * math.log(5)


def test_with_scores_while_training_a_damaged_test_image_is_told_before_the_first_step(tmp_path):
    shard = captioned_shard(tmp_path / "dev.tar", 4, broken=[2])
    flags = [*TINY, "--method", "clip", "--steps", 2, "--eval-data", shard, "--out", tmp_path / "a"]
    assert "002" in said_in_one_line(run(*flags, "--eval-every", 1, code=2))
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_scores_while_training_that_are_none_are_said_once(tmp_path):
    folder = labelled_folder(tmp_path / "set", 4)
    flags = [*TINY, "--method", "mae", "--steps", 2, "--eval-every", 1, "--eval-data", folder]
    done = run(*flags, "--out", tmp_path / "run")
    assert done.stderr.count("no set of --eval-data has scores for this method") == 1


# --- Weights in and out ---------------------------------------------------------------------------


def changed(model):
    """The model with other weights, biases and norms included, than any new one has."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("first, then", [("mae", "clip"), ("clip", "mae_clip"), ("m3ae", "slip")])
def test_a_run_starts_from_the_weights_of_another_method(tmp_path, first, then):
    source = changed(tiny(first))
    config = dataclasses.replace(source.config, out=str(tmp_path))
    loader = SimpleNamespace(identity=[], tokenizer=None if first == "mae" else Tokenizer([]))
    mae_clip.save_checkpoint(mae_clip.Run(config, source, [], loader))
    model = tiny(then, seed=3)
    before = copy.deepcopy(model.state_dict())
    said = weights.start_from(model, weights.read_weights(str(tmp_path)), [])
    given = source.state_dict()
    shared = 0
    for name, tensor in model.state_dict().items():
        fits = name in given and given[name].shape == tensor.shape
        shared += fits
        assert torch.equal(tensor, given[name] if fits else before[name]), name
    assert shared >= 29  # the image tower at least
    for name in ("taken", "left", "begun anew"):
        assert name in said


def test_the_words_of_another_tokenizer_are_not_taken(tmp_path):
    source = changed(tiny("mae_clip", vocab_size=300))
    found = {"path": tmp_path, "model": source.state_dict(), "merges": [(104, 105)]}
    found["config"] = None
    for merges in ([(104, 105)], [(105, 104)]):
        model = tiny("mae_clip", seed=3, vocab_size=300)
        weights.start_from(model, found, merges)
        same = merges == found["merges"]
        assert (
            torch.equal(
                model.text_encoder.embed.token.weight, source.text_encoder.embed.token.weight
            )
            == same
        )
        assert torch.equal(model.decoder.text.head.weight, source.decoder.text.head.weight) == same
        assert torch.equal(model.text_proj.weight, source.text_proj.weight)


def test_a_run_from_a_checkpoint_has_its_tokenizer_and_says_what_it_took(tmp_path):
    run(*TINY, "--method", "clip", "--steps", 2, "--out", tmp_path / "a")
    flags = [*TINY, "--method", "mae_clip", "--data-seed", 1, "--init", tmp_path / "a"]
    done = run(*flags, "--steps", 2, "--stop-after", 1, "--out", tmp_path / "b")
    assert re.search("^init .*taken .*image_encoder.*begun anew decoder", done.stdout, re.MULTILINE)
    _, first, _ = mae_clip.load(tmp_path / "a")
    _, then, _ = mae_clip.load(tmp_path / "b")
    assert then.merges == first.merges
    done = run(*flags, "--steps", 2, "--out", tmp_path / "b", "--resume")
    assert not re.search("^init ", done.stdout, re.MULTILINE)  # --resume goes before it


def timm_weights(**changes):
    """An image tower's weights under timm's names, from a model of this project, and the model."""
    model = changed(tiny("mae_clip", **changes))
    return dict(model.image_encoder.state_dict()), model


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_an_image_tower_is_read_bare_or_wrapped_and_a_foreign_decoder_is_left(tmp_path, wrapper):
    tower, source = timm_weights()
    tower |= {"decoder_embed.weight": torch.ones(3, 3), "mask_token": torch.ones(1, 1, 3)}
    file = tmp_path / "vit.pth"
    # The official MAE's training checkpoints hold their command line, too.
    inside = {wrapper: tower, "args": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(inside if wrapper else tower, file)
    model = tiny("mae_clip", seed=3)
    said = weights.start_from(model, weights.read_weights(str(file)))
    assert_equal(dict(model.image_encoder.state_dict()), dict(source.image_encoder.state_dict()))
    assert re.search(r"left .*decoder_embed \(1\).*begun anew", said)
    images = example()[0]
    assert torch.equal(model.image_encoder(images), source.image_encoder(images))


def test_positions_of_another_grid_are_resized_and_that_is_said():
    tower, _ = timm_weights()
    rows = torch.arange(8.0)[:, None].expand(8, 8)  # a plane, which bicubic weights keep
    grid = (rows + 10 * rows.T)[..., None].repeat(1, 1, 64)
    cls = torch.full((1, 1, 64), 7.0)
    tower["pos_embed"] = torch.cat([cls, grid.reshape(1, 64, 64)], dim=1)
    model = tiny("clip")  # 4 x 4 patches
    named = {f"image_encoder.{name}": tensor for name, tensor in tower.items()}
    said = weights.start_from(model, {"path": "x", "model": named, "merges": None, "config": None})
    assert "resized: pos_embed, from (1, 65, 64) to (1, 17, 64)" in said
    assert model.image_encoder.pos_embed[0, 0].eq(7).all()
    finer = weights.resize_positions(tower["pos_embed"], 256)[0, 1:, 0].view(16, 16)
    # Where the kernel does not reach over the edge; pixel centres lie at n + 0.5.
    place = (torch.arange(4, 12) + 0.5) / 2 - 0.5
    assert torch.allclose(finer[4:12, 4:12], place[:, None] + 10 * place[None], atol=1e-4)
    without = weights.resize_positions(grid.reshape(1, 64, 64), 64)
    assert without[0, 0].eq(0).all() and torch.equal(without[0, 1:], grid.reshape(64, 64))
    for shape in ((1, 63, 64), (17, 64), (1, 4, 4, 64)):
        assert weights.resize_positions(torch.ones(shape), 16) is None


def test_heads_which_show_in_no_shape_are_compared(tmp_path):
    source = tiny("clip")
    config = dataclasses.replace(source.config, out=str(tmp_path))
    loader = SimpleNamespace(identity=[], tokenizer=Tokenizer([]))
    mae_clip.save_checkpoint(mae_clip.Run(config, source, [], loader))
    with pytest.raises(DataError, match=f"--init {tmp_path}.*: has --heads 2; give it"):
        weights.start_from(tiny("clip", heads=4), weights.read_weights(str(tmp_path)), [])


def test_weights_of_which_nothing_fits_and_files_that_hold_none_are_refused(tmp_path):
    torch.save({"head.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "some.safetensors").write_bytes(b"x")
    for name, reason in {
        "other.pt": "nothing in it has a name and shape of this model's; it has head.weight",
        "list.pt": "holds no weights",
        "text.pt": "cannot be read as weights",
        "missing.pt": "cannot be read as weights",
        "some.safetensors": "needs the package safetensors|cannot be read as weights",
    }.items():
        file = tmp_path / name
        flags = [*TINY, "--method", "clip", "--init", file, "--out", tmp_path / "run"]
        said = said_in_one_line(run(*flags, code=2))
        assert str(file) in said and re.search(reason, said), said


def test_safetensors_without_the_package_are_refused_in_one_line(tmp_path, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(DataError, match="needs the package safetensors"):
        weights.read_weights(str(tmp_path / "x.safetensors"))
    with pytest.raises(DataError, match="needs the package safetensors"):
        weights.export_tower(trained["clip"], str(tmp_path / "x.safetensors"))


def test_safetensors_are_written_and_read(tmp_path, trained):
    pytest.importorskip("safetensors")
    file = tmp_path / "tower.safetensors"
    weights.export_tower(trained["clip"], str(file))
    model = tiny("clip", seed=9)
    weights.start_from(model, weights.read_weights(str(file)))
    wanted = mae_clip.load(trained["clip"])[0].image_encoder.state_dict()
    assert_equal(dict(model.image_encoder.state_dict()), dict(wanted))


def test_an_exported_tower_is_what_a_run_can_start_from(tmp_path, trained, capsys):
    file = tmp_path / "tower.pt"
    said = call(capsys, "export", trained["mae_clip"], file)
    assert "timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=64" in said
    with pytest.raises(DataError, match="exists already"):  # it might be a checkpoint
        weights.export_tower(trained["mae_clip"], file)
    model = tiny("clip", seed=9)
    weights.start_from(model, weights.read_weights(str(file)))
    wanted = mae_clip.load(trained["mae_clip"])[0].image_encoder
    images = example()[0]
    assert torch.equal(model.image_encoder(images), wanted(images))


@pytest.mark.parametrize("pool", ["gap", "max", "cls"])
def test_timm_computes_the_same_features_with_an_exported_tower(tmp_path, pool):
    timm = pytest.importorskip("timm")
    model = changed(tiny("clip", pool=pool)).eval()
    config = dataclasses.replace(model.config, out=str(tmp_path))
    loader = SimpleNamespace(identity=[], tokenizer=Tokenizer([]))
    mae_clip.save_checkpoint(mae_clip.Run(config, model, [], loader))
    file = tmp_path / "tower.pt"
    names = {"timm": timm, "torch": torch}
    exec(weights.export_tower(str(tmp_path), str(file)), names)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = mae_clip.pool(model.image_encoder(images), pool)
        found = names["tower"].eval()(images)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("pool, theirs", [("gap", "avg"), ("cls", "token")])
def test_the_weights_of_a_timm_vit_compute_the_same_features_here(tmp_path, pool, theirs):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    peer = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=5,
        global_pool=theirs,
        fc_norm=False,
    )
    changed(peer).eval()
    torch.save(peer.state_dict(), tmp_path / "vit.pth")
    model = tiny("mae", seed=3, pool=pool)
    said = weights.start_from(model, weights.read_weights(str(tmp_path / "vit.pth")))
    assert "left head (2)" in said
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = peer.forward_head(peer.forward_features(images), pre_logits=True)
        found = mae_clip.pool(model.image_encoder(images), pool)
    assert torch.allclose(found, wanted, atol=1e-5)


# --- Embeddings, search, curves -------------------------------------------------------------------


def test_embed_writes_the_features_of_all_sets_with_their_keys(trained, tmp_path, capsys):
    shard = captioned_shard(tmp_path / "dev.tar", 5)
    folder = labelled_folder(tmp_path / "set", 6)
    file = tmp_path / "features.npz"
    call(capsys, "embed", trained["clip"], "--data", f"{shard}::{folder}", "--out", file)
    found = np.load(file)
    (captioned,) = evaluation.open_sets(str(shard))
    (labelled,) = evaluation.open_sets(str(folder))
    samples = [*captioned.samples("test"), *labelled.samples("test")]
    assert found["keys"].tolist() == [key for key, _, _ in samples]
    assert found["labels"].tolist() == [-1] * 5 + [target for _, _, target in samples[5:]]
    model, tokenizer, config = mae_clip.load(trained["clip"])
    with torch.no_grad():
        for n, (_, content, _) in enumerate(samples):
            image = data.preprocess(data.decode(content), config.image_size)[None]
            feature = model.encode_image(image)[0].numpy()
            assert np.allclose(found["image_features"][n], feature, atol=1e-5)
        for n, text in enumerate(found["texts"].tolist()):
            tokens = tokenizer.batch([text], config.context)
            assert np.allclose(found["text_features"][n], model.encode_text(tokens)[0], atol=1e-5)
            assert text in samples[found["image_of_text"][n]][2]
    assert len(found["texts"]) == 10


def test_embed_of_a_model_without_a_text_tower_writes_image_features_alone(
    trained, tmp_path, capsys
):
    shard = captioned_shard(tmp_path / "dev.tar", 5)
    file = tmp_path / "features.npz"
    call(capsys, "embed", trained["mae"], "--data", shard, "--out", file)
    assert set(np.load(file)) == {"keys", "labels", "image_features"}


@pytest.mark.parametrize("kind", ["shards", "photos"])
def test_search_shows_the_images_of_largest_cosine_first(trained, tmp_path, capsys, kind):
    contents = [picture(40, 30, seed=n) for n in range(20)]
    if kind == "shards":
        files = []
        for n, content in enumerate(contents):
            files += [(f"{n:02d}.jpg", content), (f"{n:02d}.txt", b"words")]
        source = tar_of(tmp_path / "dev.tar", files)
    else:
        source = tmp_path / "photos"
        for n, content in enumerate(contents):
            path = source / f"{n % 3}" / f"{n:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (source / "notes.txt").write_text("no photo")
        (source / "._00.jpg").write_bytes(b"of a Mac")
        (source / "broken.jpg").write_bytes(b"")
        (source / "folder.jpg").mkdir()
        (source / ".trash").mkdir()
        (source / ".trash" / "99.jpg").write_bytes(picture(40, 30, seed=99))
    page = tmp_path / "page.png"
    said = call(capsys, "search", trained["clip"], "a dog", "--data", source, "--out", page)
    model, tokenizer, config = mae_clip.load(trained["clip"])
    cosines = []
    with torch.no_grad():
        text = model.encode_text(tokenizer.batch(["a dog"], config.context))[0]
        for content in contents:
            image = data.preprocess(data.decode(content), config.image_size)[None]
            cosines.append((model.encode_image(image)[0] @ text).item())
    wanted = sorted(range(20), key=lambda n: -cosines[n])[:12]
    rows = said.splitlines()[2:]
    assert [int(re.findall(r"(\d\d)(?:[.]jpg)?$", row)[0]) for row in rows] == wanted
    with Image.open(page) as image:
        assert image.size == (4 * 212 + 12, 3 * 230 + 36)


def test_search_needs_a_text_tower_and_images(trained, tmp_path, capsys):
    shard = captioned_shard(tmp_path / "dev.tar", 2)
    (tmp_path / "empty").mkdir()
    for words, reason in {
        (trained["mae"], "a dog", "--data", shard): "has no contrastive loss",
        (trained["clip"], "a dog", "--data", tmp_path / "empty"): "empty",
        (trained["clip"], "a dog", "--data", tmp_path / "missing"): "missing",
        (trained["clip"], "a dog", "--data", ""): "names no set",
        (trained["clip"], "a dog", "--data", shard, "--out", tmp_path / "page"): "ends in .png",
        (trained["clip"], "a dog", "--data", shard, "--out", tmp_path / "no" / "a.png"): "no such",
    }.items():
        with pytest.raises(SystemExit) as end:
            call(capsys, "search", *words)
        assert end.value.code == 2
        assert reason in capsys.readouterr().err


def test_curves_draw_every_term_chance_and_validation_of_all_runs(finished, tmp_path, capsys):
    scored = tmp_path / "scored"
    run(
        *TINY,
        "--method",
        "clip",
        "--steps",
        4,
        "--log-every",
        1,
        "--eval-every",
        2,
        "--out",
        scored,
    )
    curves = pictures.read_log(scored)
    assert [step for step, _ in curves["contrastive"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["validation contrastive"]] == [2, 4]
    assert {value for _, value in curves["chance"]} == {math.log(32)}
    call(capsys, "curves", finished.out, "--out", tmp_path / "alone")  # mae's has no chance
    call(capsys, "curves", finished.out, scored, "--out", tmp_path / "chart")
    root = xml.etree.ElementTree.parse(tmp_path / "chart.svg").getroot()
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    for name in {*METHODS[finished.method], "contrastive", "zero_shot acc1"}:
        assert words.count(name) == 1
    assert str(finished.out)[-70:] in words and str(scored)[-70:] in words
    with Image.open(tmp_path / "chart.png") as image:
        assert image.width == 420 * 4


def test_a_curve_passes_through_the_logged_values():
    drawing = pictures.Drawing(300, 200)
    points = [(10, 4.0), (20, 3.0), (40, 2.0)]
    pictures.draw_chart(drawing, 30, 20, "loss", 40, [(points, "#0072b2", 1.2, True)])
    lines = [shape for shape in drawing.shapes if shape[0] == "line" and shape[2] == "#0072b2"]
    ((_, places, _, _),) = lines
    assert [x for x, _ in places] == pytest.approx([30 + 165 / 4, 30 + 165 / 2, 30 + 165])
    heights = [y for _, y in places]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    assert heights[0] < heights[1] < heights[2]  # y downwards: a falling loss
    assert len([shape for shape in drawing.shapes if shape[0] == "area"]) == 3


def test_curves_of_what_is_no_run_or_has_no_step_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "log.jsonl").write_text("")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"batch_size": 4}')
    (tmp_path / "odd" / "log.jsonl").write_text("[1]\n")
    reasons = {
        "missing": "is no run's folder",
        "empty": "is no run's folder",
        "odd": "its log is damaged",
    }
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"batch_size": 4}')
    (tmp_path / "new" / "log.jsonl").write_text("")
    reasons["new"] = "holds no step yet"
    for name, reason in reasons.items():
        with pytest.raises(SystemExit) as end:
            call(capsys, "curves", tmp_path / name, "--out", tmp_path / "chart")
        assert end.value.code == 2
        assert reason in capsys.readouterr().err


# --- Signals, folders, ranks ----------------------------------------------------------------------


def test_a_signal_while_a_run_waits_for_data_is_answered_at_once(tmp_path, from_a_terminal):
    # Of this seed's order the second shard, which never comes, is the last.
    assert np.random.default_rng([0, 0, 0]).permutation(2).tolist() == [0, 1]
    stalls = f"{captioned_shard(tmp_path / 'a.tar', 64)}::pipe:sleep 600"
    out = tmp_path / "run"
    flags = "--scale tiny --batch-size 16 --steps 50 --log-every 1 --workers 1 --method mae".split()
    command = [sys.executable, HERE / "mae_clip.py", *flags, "--data", stalls, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    said, errors = process.communicate()
    assert process.returncode == 143, errors
    assert "--resume" in said and "Traceback" not in errors
    assert list(out.glob("checkpoint-*.pt"))


def test_the_death_of_a_worker_is_one_line_and_a_whole_step_is_saved(tmp_path, monkeypatch):
    step = mae_clip.train_step

    def deadly(*arguments):
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        return step(*arguments)

    monkeypatch.setattr(mae_clip, "train_step", deadly)
    flags = [*TINY, "--method", "clip", "--steps", 50, "--workers", 1, "--out", tmp_path]
    said = said_in_one_line(run(*flags, code=2))
    assert "a worker that loads data failed" in said
    (path,) = tmp_path.glob("checkpoint-*.pt")
    state = torch.load(path, weights_only=True)
    assert 1 <= state["step"] < 50
    for optimizer in state["optimizers"]:
        for values in optimizer["state"].values():
            assert values.get("step", state["step"]) == state["step"]


def test_a_worker_that_a_signal_ended_too_is_no_fault_where_ranks_stop_together():
    with machine.Signals() as signals:
        signals.alone = False
        with pytest.raises(DataError, match="worker that loads data failed"):
            with signals.interruptible():
                raise RuntimeError("DataLoader worker exited unexpectedly")
        signal.raise_signal(signal.SIGTERM)
        for error in (RuntimeError, EOFError, ConnectionResetError):
            with signals.interruptible():
                raise error
        assert signals.came == signal.SIGTERM


def test_the_same_signal_a_second_time_ends_the_program():
    code = (
        "import machine, signal, time\n"
        "with machine.Signals() as signals:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    assert signals.came == signal.SIGTERM\n"
        "    signal.raise_signal(signal.SIGHUP)\n"  # another one
        "    print('goes on', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('not reached')\n"
    )
    done = python("-c", code)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "goes on\n" and done.stderr == ""


def test_weights_in_the_middle_of_a_step_are_not_saved(tmp_path, monkeypatch):
    step = mae_clip.train_step
    count = []

    def failing(*arguments):
        count.append(1)
        if len(count) == 3:
            raise ValueError("in the middle")
        return step(*arguments)

    monkeypatch.setattr(mae_clip, "train_step", failing)
    flags = [*TINY, "--method", "clip", "--steps", 5, "--save-every", 2, "--out", tmp_path]
    run(*flags, code=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2.pt"]


def test_weights_that_give_no_finite_loss_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(mae_clip, "train_step", lambda *_: None)
    flags = [*TINY, "--method", "clip", "--steps", 20, "--log-every", 10, "--out", tmp_path]
    assert "step 10: none of the last 10 was finite" in said_in_one_line(run(*flags, code=2))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_folder_that_another_run_is_in_is_refused_with_its_process(tmp_path):
    with machine.own_folder(tmp_path):
        said = said_in_one_line(run(*TINY, "--steps", 1, "--out", tmp_path, code=2))
    assert f"process {os.getpid()} on " in said
    with machine.own_folder(tmp_path):  # it is free again
        pass


def test_the_failure_of_another_rank_is_told_in_one_line_and_ones_own_as_it_is(tmp_path):
    with (
        pytest.raises(DataError, match="^another process of this run has ended"),
        machine.process_group(),
    ):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="own"), machine.process_group():
        raise RuntimeError("own")


def test_want_of_memory_is_told_in_one_line_with_what_to_do(tmp_path):
    flags = [*TINY, "--method", "clip", "--steps", 1]

    def large(*_):
        return torch.empty(2**60, dtype=torch.uint8)

    with mock.patch.object(mae_clip, "train_step", large):
        said = said_in_one_line(run(*flags, "--out", tmp_path, code=2))
    assert "out of memory: raise --accumulate, or lower --batch-size" in said


def test_an_empty_name_of_the_folder_is_refused():
    assert "--out: names no folder" in said_in_one_line(run(*TINY, "--out", "", code=2))


def processes_of(flags, world=2):
    """mae_clip.py as that many ranks with their own flags, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        command = [sys.executable, str(HERE / "mae_clip.py"), *map(str, flags[rank])]
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
            )
        )
    return started


@pytest.mark.parametrize("wrong", [("--lr", "abc"), ("--device", "cuda:99")])
def test_a_rank_that_fails_before_it_trains_ends_the_others(tmp_path, wrong):
    flags = [*TINY, "--method", "clip", "--steps", 500, "--out", tmp_path / "run"]
    good, bad = processes_of([flags, [*flags, *wrong]])
    assert bad.wait() == good.wait() == 2
    assert "another process of this run has ended" in good.stderr.read()
    assert str(wrong[1]) in bad.stderr.read()


def test_a_signal_saves_though_the_data_of_several_ranks_stall(tmp_path, from_a_terminal):
    shard = captioned_shard(tmp_path / "a.tar", 64)
    stall = tmp_path / "stall"
    data_flag = f"pipe:[ -e {stall} ] && sleep 600; cat {shard}"
    tokenizer = tmp_path / "tokenizer.json"
    assert command("tokenizer", shard, tokenizer)[0] == 0
    flags = "--scale tiny --batch-size 16 --steps 5000 --log-every 1 --workers 1 --resample".split()
    flags += ["--method", "clip", "--tokenizer", tokenizer, "--data", data_flag]
    ranks = processes_of([[*flags, "--out", tmp_path / "run"]] * 2)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert ranks[0].poll() is None, ranks[0].communicate()
        time.sleep(0.05)
    stall.touch()
    size = -1
    while size != log.stat().st_size:  # until it stalls
        size = log.stat().st_size
        time.sleep(3)
    for process in ranks:
        process.send_signal(signal.SIGINT)
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode in (2, 130), errors
        assert "Traceback" not in errors
    steps = log.read_text().count("\n")
    assert (tmp_path / "run" / f"checkpoint-{steps}.pt").exists()


def begins_after_its_parents_end(begun, ended):
    """A child of a child of this test: it begins its work when its parent has been killed."""
    begun.touch()
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    data.end_with_parent(0)
    ended.touch()


def test_a_worker_whose_parent_was_killed_before_it_began_ends(tmp_path):
    begun, ended = tmp_path / "begun", tmp_path / "ended"

    def parent():
        child = multiprocessing.Process(target=begins_after_its_parents_end, args=(begun, ended))
        child.start()
        (tmp_path / "child").write_text(str(child.pid))
        child.join()

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    while not begun.exists() or not (tmp_path / "child").exists():
        time.sleep(0.01)
    child = int((tmp_path / "child").read_text())
    process.kill()
    process.join()
    for _ in range(1000):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        with contextlib.suppress(OSError):  # a zombie, where nobody takes it in, has ended
            if Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                break
        time.sleep(0.01)
    else:
        pytest.fail("it goes on")
    assert not ended.exists()


def test_a_lock_that_a_worker_ended_with_is_not_waited_for():
    loader = torch.utils.data.DataLoader(range(4), num_workers=1)
    with data.workers_of(loader) as results:
        assert next(results) == 0
        results._workers_done_event._cond.acquire()  # as if the worker had
    results._shutdown_workers()  # torch's own end, which would take it
    assert results._workers_done_event.is_set()


def test_a_worker_that_was_stopped_ends_with_its_loader(tmp_path):
    loader = loader_of(shards_of(tmp_path / "s", [40]), workers=1)
    batches = loader.batches(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    batches.close()
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


WHOLE = "model optimizers step seconds logged config data position merges".split()


@pytest.mark.parametrize("lacking", [*WHOLE, "a tensor", "an optimiser"])
def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(tmp_path, cache, lacking):
    flags = [*TINY, "--method", "clip", "--steps", 2, "--out", tmp_path]
    run(*flags, "--stop-after", 1)
    path = tmp_path / "checkpoint-1.pt"
    state = torch.load(path, weights_only=True)
    if lacking == "a tensor":
        del state["model"]["logit_scale"]
    elif lacking == "an optimiser":
        state["optimizers"].pop()
    else:
        del state[lacking]
    torch.save(state, path)
    said = said_in_one_line(run(*flags, "--resume", code=2))
    assert str(tmp_path) in said and "no checkpoint that this version can use" in said
    if lacking in ("model", "config", "merges", "a tensor"):
        with pytest.raises(DataError, match="no checkpoint that this version can use"):
            mae_clip.load(path)


def test_a_checkpoint_of_which_one_byte_has_changed_is_not_used(stopped):
    flags, out = stopped
    newest = out / "checkpoint-4.pt"
    content = bytearray(newest.read_bytes())
    weights = torch.load(newest, weights_only=True)["model"]["image_encoder.cls_token"]
    content[content.index(weights.numpy().tobytes())] ^= 1
    newest.write_bytes(content)
    said = said_in_one_line(run(*flags, "--resume", code=2))
    assert f"{newest}: is no checkpoint that this version can use" in said
    assert "not as it was written" in said
    newest.unlink()
    run(*flags, "--resume")


@pytest.mark.parametrize(
    "value, first, said",
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "x[b] is 2, but 3 on rank 0"),
        ({"a": [1, 2]}, {"a": [1, 5]}, "x[a][1] is 2, but 5 on rank 0"),
        ({"a": [1, 2]}, {"a": [1]}, "x[a] has 2 parts, but 1 on rank 0"),
        ({"a": 1}, {"a": 1, "b": 3}, "x has 1 parts, but 2 on rank 0"),
        ({"a": 1}, {"b": 1}, "x[a] is 1, but None on rank 0"),
        ({"a": 1}, [1], "x is {'a': 1}, but [1] on rank 0"),
        ([1], 5, "x is [1], but 5 on rank 0"),
        ([["t", "h"]], [["t", "o"]], "x[0][1] is h, but o on rank 0"),
        ([1], None, "x is [1], but None on rank 0"),
        (None, [1], "x is None, but [1] on rank 0"),
    ],
)
def test_what_differs_between_ranks_is_named_down_to_the_part(value, first, said):
    assert machine.difference("x", value, first) == said


def test_a_signal_that_one_of_several_ranks_answers_in_time_leaves_no_alarm_behind(monkeypatch):
    with machine.Signals() as signals:
        signals.alone = False
        with signals.heeded():
            signal.raise_signal(signal.SIGTERM)
            remaining = signal.alarm(5)
            assert 0 < remaining <= 5
        assert signal.alarm(0) == 0
        with signals.heeded():  # a wait that begins after the signal
            assert signal.alarm(5) > 0


def test_a_signal_while_an_image_is_decoded_does_not_make_it_a_damaged_one():
    def signalled(image):
        signal.raise_signal(signal.SIGTERM)

    with machine.Signals() as signals, pytest.raises(machine.Interrupted):
        with mock.patch("PIL.JpegImagePlugin.JpegImageFile.load", signalled), signals.heeded():
            data.decode(picture())


def test_the_cause_of_a_failed_write_is_its_own_while_another_error_is_on_its_way(tmp_path):
    with pytest.raises(OSError, match=r"could not be written.*No space left"):
        try:
            raise DataError("most samples are of no use")
        finally:
            with machine.whole_file(tmp_path / "file", "part"):
                raise OSError(28, "No space left on device")


def test_the_cause_of_a_failed_write_is_the_systems_not_torchs(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"could not be written.*File too large"):
        with machine.whole_file(path, "part"):
            try:
                raise OSError(27, "File too large")
            except OSError:
                raise RuntimeError("unexpected pos 64 vs 0") from None
    assert not any(tmp_path.iterdir())


def test_files_beside_a_runs_checkpoints_are_not_taken_for_such(tmp_path):
    for name in ("checkpoint-3.pt", "checkpoint-20.pt", "checkpoint-best.pt", "checkpoint-20 x.pt"):
        (tmp_path / name).touch()
    found = [path.name for path in mae_clip.checkpoints(tmp_path)]
    assert found == ["checkpoint-20.pt", "checkpoint-3.pt"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    machine.write_whole(path, "ü")
    assert path.read_bytes() == "ü".encode()
    with pytest.raises(OSError, match=f"{path}: could not be written, with "):
        with machine.whole_file(path, "part") as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")
    assert path.read_bytes() == "ü".encode() and os.listdir(tmp_path) == ["file"]
    machine.write_whole("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    link = tmp_path / "link"
    link.symlink_to(path)
    machine.write_whole(link, "through it")
    assert link.is_symlink() and path.read_text() == "through it"
    machine.save_whole({"x": 1}, link)
    assert link.is_symlink() and torch.load(path) == {"x": 1}
    with pytest.raises(DataError, match="there is no such folder"):
        machine.write_whole(tmp_path / "nowhere" / "file", "x")


@pytest.mark.parametrize(
    "wrong, says",
    [
        (("--eval-data", "nowhere-*.tar"), "nowhere-*.tar: no such shard"),
        (("--colour", "red"), "unrecognized arguments: --colour red"),
    ],
)
def test_the_report_of_torchrun_ends_with_the_line_of_the_rank_that_failed(wrong, says, tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    flags = ("--scale", "tiny", "--out", tmp_path / "run", *wrong)
    report = python(*command, HERE / "mae_clip.py", *flags).stderr.split("Root Cause")[1]
    assert f"mae_clip.py: error: {says}" in report


def test_resume_without_a_checkpoint_says_that_the_run_begins(tmp_path):
    done = run(*TINY, "--method", "clip", "--steps", 1, "--resume", "--out", tmp_path)
    assert "holds no checkpoint, so this run starts at step 0" in done.stdout


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_no_part(
    tmp_path, monkeypatch
):
    path = tmp_path / "checkpoint-1.pt"
    machine.save_whole({"a": 1}, path)

    def full(state, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=f"{path}: could not be written"):
        machine.save_whole({"a": 2}, path)
    assert torch.load(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    def without(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(machine.fcntl, "flock", without)
    with machine.own_folder(tmp_path):
        assert (tmp_path / ".lock").exists()


def on_each_rank(rank, port, folder):
    """What two ranks find that agree, that do not, and that hear of a failure on the first one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    machine.agree({"--lr": 0.1, "data": ["a", 5]})
    said = []
    for facts in ({"--lr": 0.1 * (1 + rank)}, {"--lr": 0.1, "data": [rank]}):
        with pytest.raises(DataError) as raised:
            machine.agree(facts)
        said.append(str(raised.value))

    def fail():
        raise DataError("on the first rank")

    with pytest.raises(DataError, match="on the first rank"):
        machine.from_first(fail)
    value = machine.from_first(lambda: rank)
    shard = f"{folder}/dev.tar"
    model = tiny("mae_clip", vocab_size=259)
    config = dataclasses.replace(model.config, eval_data=shard, batch_size=4)
    losses = validated(model, Tokenizer([]), config)
    torch.save({"said": said, "value": value, "losses": losses}, f"{folder}/{rank}.pt")
    machine.end_group()


def test_ranks_that_differ_stop_with_the_rank_and_the_thing_and_validate_as_one(tmp_path):
    shard = captioned_shard(tmp_path / "dev.tar", 11)
    port = 20_000 + (os.getpid() + 7_000) % 20_000
    torch.multiprocessing.spawn(on_each_rank, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in found:
        assert rank["said"] == [
            "rank 1: --lr is 0.2, but 0.1 on rank 0",
            "rank 1: data[0] is 1, but 0 on rank 0",
        ]
        assert rank["value"] == 0
    model = tiny("mae_clip", vocab_size=259)
    config = dataclasses.replace(model.config, eval_data=str(shard), batch_size=4)
    wanted = validated(model, Tokenizer([]), config)
    assert found[0]["losses"] == pytest.approx(wanted, rel=1e-5)
    assert found[1]["losses"] == pytest.approx(
        {name: wanted[name] for name in found[1]["losses"]}, rel=1e-5
    )
    assert set(found[1]["losses"]) == {"contrastive", "image", "text", "loss"}
