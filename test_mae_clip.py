"""The specification of MAE-CLIP: one sentence a test, its oracle a plain loop or a number worked by hand."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
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
import mae_clip
from eval import fit_linear, retrieval, zero_shot
from mae_clip import MAECLIP, METHODS, SCALES, Config, random_mask, random_text_mask

HERE = Path(__file__).parent
PAD, SOT, EOT = 0, 1, 2
OFF = torch.autocast("cpu", enabled=False)

def tiny(method="mae_clip", seed=0, **changes):
    """A model of scale tiny with 300 tokens, from a seed."""
    torch.manual_seed(seed)
    return MAECLIP(Config(**(SCALES["tiny"] | {"method": method, "vocab_size": 300} | changes)))

def captions(*lengths, context=16, seed=0):
    """Token ids (B,T) of random captions of so many words."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        words = torch.randint(3, 300, (length,), generator=rng).tolist()
        rows.append([SOT, *words, EOT] + [PAD] * (context - length - 2))
    return torch.tensor(rows)

def example(B=6, seed=0):
    """Images uint8, tokens, the noise of both masks and two views, as the training loop passes them."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, 3, 32, 32), generator=rng, dtype=torch.uint8)
    views = [torch.randint(0, 256, (B, 3, 32, 32), generator=rng, dtype=torch.uint8) for _ in range(2)]
    tokens = captions(*[(3 * i) % 15 for i in range(B)])
    return images, tokens, torch.rand(B, 16, generator=rng), torch.rand(B, 16, generator=rng), views

# --- Patches, positions, masks -----------------------------------------------------------------------------
def test_patchify_lists_patches_row_by_row_and_in_each_rows_columns_channels():
    image = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6)  # 2 x 3 patches of side 2
    patches = mae_clip.patchify(image, 2)
    assert patches.shape == (1, 6, 12)
    # The patch in row 1, column 2 starts at pixel (2, 4), number 2 * 6 + 4 = 16 of each channel's 24.
    assert patches[0, 5].tolist() == [16, 40, 64, 17, 41, 65, 22, 46, 70, 23, 47, 71]
    for n in range(6):
        want = [
            image[0, c, n // 3 * 2 + y, n % 3 * 2 + x].item()
            for y in range(2)
            for x in range(2)
            for c in range(3)
        ]
        assert patches[0, n].tolist() == want
    assert torch.equal(mae_clip.unpatchify(patches, 2, 4, 6), image)

def test_sincos_positions_follow_the_formula_with_columns_in_the_first_half():
    width, rows, cols = 16, 3, 5
    table = mae_clip.sincos_2d(width, rows, cols)
    for r in range(rows):
        for c in range(cols):
            want = []
            for position in (c, r):
                angles = [position / 10000 ** (k / 4) for k in range(4)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert torch.allclose(table[r * cols + c], torch.tensor(want), atol=1e-6)

@pytest.mark.parametrize("count, ratio, keeps", [
    (196, 0.75, 49), (100, 0.9, 10), (10, 0.9, 1), (20, 0.9, 2), (100, 0.8, 20), (16, 0, 16), (16, 1, 1),
    (2, 0.75, 1),
])
def test_random_mask_keeps_the_rounded_number_of_patches(count, ratio, keeps):
    keep, mask = random_mask(torch.rand(3, count), ratio)
    assert keep.shape == (3, keeps)
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [count - keeps] * 3

def test_random_mask_keeps_the_smallest_noise_of_each_sample_and_true_means_removed():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.7, 0.4]])
    keep, mask = random_mask(noise, 0.5)
    assert [sorted(row) for row in keep.tolist()] == [[1, 3], [0, 3]]
    assert mask.tolist() == [[True, False, True, False], [False, True, True, False]]

def test_random_mask_removes_every_position_equally_often_and_independently_of_the_sample():
    _, mask = random_mask(torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 0.03  # 4.4 standard deviations
    assert len({tuple(row) for row in mask[:100].tolist()}) > 90

@pytest.mark.parametrize("ratio", [0, 0.15, 0.5, 0.75, 0.9, 1])
def test_random_text_mask_agrees_with_a_loop_for_captions_of_every_length(ratio):
    T = 16
    tokens = captions(*range(T - 1))
    noise = torch.rand(T - 1, T, generator=torch.Generator().manual_seed(1))
    keep, mask = random_text_mask(noise, tokens, ratio)
    assert keep.shape == (T - 1, 2 + int((T - 2) * (1 - ratio) + 0.5))
    for length in range(T - 1):
        words = sorted(range(1, length + 1), key=lambda t, row=noise[length]: row[t].item())
        stay = words[: int(length * (1 - ratio) + 0.5)]
        assert mask[length].nonzero().flatten().tolist() == sorted(set(words) - set(stay))
        slots = keep[length].tolist()
        assert len(set(slots)) == len(slots)
        assert set(slots[: 2 + len(stay)]) == {0, length + 1, *stay}
        assert all(slot > length + 1 for slot in slots[2 + len(stay) :])  # the rest is padding

def test_what_follows_eot_is_padding_whatever_ids_stand_there():
    tokens = captions(4, 9)
    other = tokens.clone()
    other[0, 6:] = 77
    noise = torch.rand(2, 16)
    for a, b in zip(random_text_mask(noise, tokens, 0.5), random_text_mask(noise, other, 0.5), strict=True):
        assert torch.equal(a, b)

# --- Losses ------------------------------------------------------------------------------------------------
def unit(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)

def test_contrastive_loss_agrees_with_a_loop_over_both_directions():
    image, text, scale, B = unit(5, 7, seed=1), unit(5, 7, seed=2), 11.0, 5
    total = 0.0
    for i in range(B):
        row = [math.exp(scale * sum(image[i] * text[j])) for j in range(B)]
        column = [math.exp(scale * sum(image[j] * text[i])) for j in range(B)]
        total -= math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    loss = mae_clip.contrastive_loss(image, text, torch.tensor(scale, dtype=torch.float64))
    assert loss.item() == pytest.approx(total / (2 * B), abs=1e-12)
    eye = torch.eye(2)  # two orthogonal pairs, worked by hand
    assert mae_clip.contrastive_loss(eye, eye, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert mae_clip.contrastive_loss(eye, eye.flip(0), 1.0).item() == pytest.approx(math.log(1 + math.e))

def test_image_loss_agrees_with_a_loop_over_removed_patches_and_the_unbiased_variance():
    rng = torch.Generator().manual_seed(0)
    prediction, patches = (torch.randn(2, 3, 12, generator=rng, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    total = 0.0
    for b, n in mask.nonzero().tolist():
        target = patches[b, n]
        mean = sum(target) / 12
        variance = sum((x - mean) ** 2 for x in target) / 11
        for p, x in zip(prediction[b, n], target, strict=True):
            total += (p - (x - mean) / math.sqrt(variance + 1e-6)) ** 2 / 12
    loss = mae_clip.image_loss(prediction, patches, mask)
    assert loss.item() == pytest.approx((total / 3).item(), rel=1e-12)
    plain = sum(((prediction[b, n] - patches[b, n]) ** 2).mean() for b, n in mask.nonzero().tolist()) / 3
    loss = mae_clip.image_loss(prediction, patches, mask, normalise=False)
    assert loss.item() == pytest.approx(plain.item())

def test_image_loss_of_predicting_zero_is_just_under_one_and_a_flat_patch_stays_finite():
    patches = torch.randn(4, 9, 768, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 9, dtype=torch.bool)
    loss = mae_clip.image_loss(torch.zeros_like(patches), patches, mask)
    assert loss.item() == pytest.approx(767 / 768, abs=1e-4)
    flat = torch.full((1, 1, 768), 0.9337, dtype=torch.bfloat16)
    assert mae_clip.image_loss(torch.zeros(1, 1, 768), flat, torch.tensor([[True]])).item() < 1e-4

def test_text_loss_agrees_with_a_loop_over_removed_tokens_and_asks_only_the_mask():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([[1, 5, 0, 2], [1, 7, 2, 0]])
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    total = 0.0
    for b, t in mask.nonzero().tolist():
        total -= logits[b, t, tokens[b, t]] - math.log(sum(math.exp(x) for x in logits[b, t]))
    assert mae_clip.text_loss(logits, tokens, mask).item() == pytest.approx((total / 3).item(), rel=1e-12)

def test_what_is_visible_carries_no_loss():
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 8, generator=rng) < 0.5
    prediction = torch.randn(3, 8, 12, generator=rng, requires_grad=True)
    patches = torch.randn(3, 8, 12, generator=rng)
    mae_clip.image_loss(prediction, patches, mask).backward()
    assert torch.equal(prediction.grad.abs().sum(dim=-1) > 0, mask)
    logits = torch.randn(3, 8, 20, generator=rng, requires_grad=True)
    mae_clip.text_loss(logits, torch.randint(0, 20, (3, 8), generator=rng), mask).backward()
    assert torch.equal(logits.grad.abs().sum(dim=-1) > 0, mask)

def test_both_reconstruction_losses_are_zero_with_zero_gradient_where_nothing_is_removed():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    patches, tokens = torch.randn(2, 3, 12), torch.zeros(2, 3, dtype=torch.int64)
    for loss, x in ((mae_clip.image_loss, patches), (mae_clip.text_loss, tokens)):
        guess = torch.randn(2, 3, 12, requires_grad=True)
        value = loss(guess, x, nothing)
        value.backward()
        assert value.item() == 0 and not guess.grad.any()

def test_simclr_loss_agrees_with_a_loop_over_all_views():
    a, b, temperature = 3 * unit(4, 6, seed=1), 2 * unit(4, 6, seed=2), 0.1
    views = [v / v.norm() for v in [*a, *b]]
    total = 0.0
    for i in range(8):
        others = {j: math.exp(torch.dot(views[i], views[j]) / temperature) for j in range(8) if j != i}
        total -= math.log(others[(i + 4) % 8] / sum(others.values()))
    assert mae_clip.simclr_loss(a, b, temperature).item() == pytest.approx(total / 8, rel=1e-10)

# --- Encoders and decoder ----------------------------------------------------------------------------------
def test_a_removed_patch_or_token_cannot_influence_what_any_encoder_gives():
    images, tokens, *noise, _ = example()
    for method, decoder in itertools.product(("mae", "m3ae", "mae_clip"), ("joint", "cross")):
        model, got = tiny(method, decoder=decoder), []
        model.decoder.register_forward_pre_hook(lambda _, given, to=got: to.append(given[2:]))
        image, text, seen = model.masked_pass(images, tokens, *noise)
        hidden = mae_clip.unpatchify(image.mask[..., None].expand(-1, -1, 192), 8, 32, 32)
        other = torch.where(hidden, 255 - images, images)
        masked = torch.where(text.mask, 99, tokens) if text else tokens
        assert (other != images).any() and (text is None or (masked != tokens).any())
        image2, text2, seen2 = model.masked_pass(other, masked, *noise)
        assert torch.equal(seen, seen2) and torch.equal(image.predicted, image2.predicted)
        pairs = [(got[0][1], got[1][1]), (text.predicted, text2.predicted)] if text else []
        assert all(torch.equal(a, b) for a, b in pairs)
        other = torch.where(hidden, images, 255 - images)
        assert not torch.allclose(seen, model.masked_pass(other, tokens, *noise)[2])  # what is visible does

def test_removed_ones_see_each_other_in_the_joint_decoder_and_not_in_the_cross_one():
    images, tokens, *noise, _ = example()
    for decoder in ("joint", "cross"):
        model = tiny(decoder=decoder, decoder_depth=2)
        before = model.masked_pass(images, tokens, *noise)[0].predicted
        model.decoder.text.mask_token.data += 1
        after = model.masked_pass(images, tokens, *noise)[0].predicted
        assert torch.equal(before, after) == (decoder == "cross")

def test_padding_changes_nothing():
    images, tokens, image_noise, text_noise, _ = example()
    other = torch.where(torch.arange(16) > mae_clip.caption_end(tokens), 55, tokens)
    assert not torch.equal(tokens, other)
    model = tiny()
    assert torch.equal(model.encode_text(tokens), model.encode_text(other))
    shorter = captions(3, 5, context=9)
    longer = F.pad(shorter, (0, 7))
    assert torch.allclose(model.encode_text(shorter), model.encode_text(longer), atol=1e-6)
    for method in ("m3ae", "mae_clip"):
        model = tiny(method)
        a = model(images, tokens, image_noise, text_noise)
        b = model(images, other, image_noise, text_noise)
        assert all(torch.equal(a[name], b[name]) for name in a)

def test_attention_in_bfloat16_on_a_cpu_is_sdpas():
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.bfloat16)
    for valid in (None, torch.arange(7) < torch.tensor([[7], [4]])):
        want = mae_clip.attention(*(x.double() for x in (q, k, v)), valid)
        assert torch.allclose(mae_clip.attention(q, k, v, valid).double(), want, atol=0.03)

def test_a_block_with_a_query_gives_those_rows_of_the_whole():
    torch.manual_seed(0)
    block, x = mae_clip.Block(32, 4), torch.randn(2, 7, 32)
    valid = torch.arange(7) < torch.tensor([[7], [4]])
    assert torch.allclose(block(x, valid)[:, 2:4], block(x, valid, x[:, 2:4]), atol=1e-6)

@pytest.mark.parametrize("pool", ["gap", "max", "cls"])
def test_the_image_feature_is_pooled_as_asked_and_the_text_feature_is_eots(pool):
    images, tokens, *_ = example()
    model = tiny("clip", pool=pool)
    x = model.image_encoder(images)
    by_hand = {"gap": x[:, 1:].sum(dim=1) / 16, "max": x[:, 1:].max(dim=1).values, "cls": x[:, 0]}[pool]
    want = F.normalize(by_hand @ model.image_proj.weight.T, dim=-1)
    assert torch.allclose(model.encode_image(images), want, atol=1e-6)
    y = model.text_encoder(tokens)
    eot = torch.stack([y[i, tokens[i].tolist().index(EOT)] for i in range(len(y))])
    want = F.normalize(eot @ model.text_proj.weight.T, dim=-1)
    assert torch.allclose(model.encode_text(tokens), want, atol=1e-6)

def test_the_text_tower_looks_both_ways():
    model, tokens = tiny("clip"), captions(8)
    other = tokens.clone()
    other[0, 8] = 3 if tokens[0, 8] != 3 else 4
    assert not torch.allclose(model.text_encoder(tokens)[0, 1], model.text_encoder(other)[0, 1])

def test_uint8_images_are_normalised_inside_and_float_images_are_not():
    images = example()[0]
    mean, std = torch.tensor(mae_clip.IMAGE_MEAN), torch.tensor(mae_clip.IMAGE_STD)
    by_hand = ((images.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    model = tiny("clip")
    assert torch.allclose(model.image_encoder(images), model.image_encoder(by_hand), atol=1e-5)

@pytest.mark.parametrize("method", ["mae", "m3ae", "mae_clip"])
def test_reconstruct_shows_the_truth_where_visible_and_elsewhere_what_the_losses_saw(method):
    images, tokens, image_noise, text_noise, _ = example()
    model = tiny(method).eval()
    terms = model(images, tokens, image_noise, text_noise)
    out = model.reconstruct(images, tokens, image_noise, text_noise)
    patches = mae_clip.patchify(mae_clip.normalise(images), 8)
    truth = mae_clip.patch_targets(patches)
    assert torch.equal(out["image_mask"], random_mask(image_noise, 0.75)[1])
    assert torch.equal(out["image"][~out["image_mask"]], truth[~out["image_mask"]])
    loss = mae_clip.image_loss(out["image"], patches, out["image_mask"])
    assert torch.allclose(loss, terms["image"], atol=1e-5)
    assert torch.equal(out["text"][~out["text_mask"]], tokens[~out["text_mask"]])
    assert out["text_mask"].any() == (method != "mae")

def test_a_method_says_so_when_it_has_no_text_tower_or_no_decoder():
    images, tokens, *_ = example()
    for method in METHODS:
        model = tiny(method)
        if method in ("mae", "m3ae"):
            with pytest.raises(ValueError, match="no text tower"):
                model.encode_text(tokens)
            assert model.encode_image(images).shape == (6, 64)
        if method in ("clip", "slip"):
            with pytest.raises(ValueError, match="no decoder"):
                model.reconstruct(images, tokens)

# --- The methods -------------------------------------------------------------------------------------------
ENCODER = {"image_encoder"}
CONTRAST = ENCODER | {"text_encoder", "image_proj", "text_proj", "logit_scale"}

@pytest.mark.parametrize("method, changes, parts", [
    ("clip", {}, CONTRAST), ("mae", {}, ENCODER | {"decoder"}),
    ("m3ae", {}, ENCODER | {"text_embed", "decoder"}), ("mae_clip", {}, CONTRAST | {"decoder"}),
    ("slip", {}, CONTRAST | {"simclr_head"}),
    ("mae_clip", {"image_weight": 0.0, "text_weight": 0.0}, CONTRAST),
    ("mae_clip", {"contrastive_weight": 0.0}, ENCODER | {"text_encoder", "decoder"}),
    ("slip", {"contrastive_weight": 0.0}, ENCODER | {"simclr_head"}),
    ("slip", {"simclr_weight": 0.0}, CONTRAST),
])
def test_each_method_gives_gradient_to_exactly_the_parts_that_it_trains(method, changes, parts):
    model = tiny(method, **changes)
    model(*example())["loss"].backward()
    for name, parameter in model.named_parameters():
        trained = name.split(".")[0] in parts
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name

@pytest.mark.parametrize("off, frozen", [("image_weight", "decoder.image"), ("text_weight", "decoder.text")])
def test_one_reconstruction_alone_leaves_the_other_modality_out(off, frozen):
    model = tiny(**{off: 0.0})
    terms = model(*example())
    assert off.removesuffix("_weight") not in terms
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name

def test_the_loss_is_the_weighted_sum_of_the_unweighted_terms_in_training_and_evaluation_mode_alike():
    for method, names in METHODS.items():
        weights = {"contrastive": 0.7, "image": 0.3, "text": 0.2, "simclr": 0.5}
        model = tiny(method, **{name + "_weight": w for name, w in weights.items()})
        terms = model.train()(*example())
        assert all(torch.equal(x, terms[name]) for name, x in model.eval()(*example()).items())
        assert tuple(terms) == (*names, "loss")
        total = sum(weights[name] * terms[name].item() for name in names)
        assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
        assert all(term.ndim == 0 for term in terms.values())

def test_mae_clip_without_reconstruction_follows_clip_bit_for_bit():
    followed = []
    for method, off in (("clip", ()), ("mae_clip", ("image", "text")), ("slip", ("simclr",))):
        model = tiny(method, **{f"{term}_weight": 0.0 for term in off})
        optimizer = mae_clip.make_optimizer(model, model.config)
        losses = [mae_clip.train_step(model, optimizer, OFF, example(seed=step))[0] for step in range(4)]
        followed.append((losses, model.state_dict()))
    for losses, weights in followed[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses, followed[0][0], strict=True))
        assert all(torch.equal(weights[name], x) for name, x in followed[0][1].items())

def test_methods_start_from_the_same_weights_in_what_they_share():
    base = tiny("mae_clip").state_dict()
    for method in METHODS:
        for name, x in tiny(method).state_dict().items():
            if name in base and base[name].shape == x.shape:
                assert torch.equal(base[name], x), (method, name)
    assert not torch.equal(tiny("mae", seed=1).image_encoder.cls_token, tiny("mae").image_encoder.cls_token)

def test_equal_ratios_share_one_masked_image_pass_which_gives_what_two_would():
    batch = example()
    shared, calls = tiny(contrastive_mask_ratio=0.75), []
    shared.image_encoder.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    terms = shared(*batch)
    assert calls == [5]  # CLS and a quarter of 16 patches
    alone = tiny("clip", contrastive_mask_ratio=0.75)(*batch)
    assert torch.equal(terms["contrastive"], alone["contrastive"])
    assert torch.equal(terms["image"], tiny()(*batch)["image"])

def test_a_masked_contrastive_pass_does_not_see_what_is_removed():
    images, tokens, noise, text_noise, _ = example()
    model = tiny("clip", contrastive_mask_ratio=0.5)
    hidden = mae_clip.unpatchify(random_mask(noise, 0.5)[1][..., None].expand(-1, -1, 192), 8, 32, 32)
    a = model(images, tokens, noise, text_noise)
    b = model(torch.where(hidden, 255 - images, images), tokens, noise, text_noise)
    assert torch.equal(a["loss"], b["loss"])

def test_captions_without_a_word_left_give_a_zero_text_term_with_zero_gradient():
    images, _, image_noise, text_noise, _ = example()
    for method in ("m3ae", "mae_clip"):
        model = tiny(method)
        terms = model(images, captions(*[0] * 6), image_noise, text_noise)
        assert terms["text"].item() == 0
        terms["text"].backward(retain_graph=True)
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
        terms["loss"].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize("method", METHODS)
def test_each_method_overfits_32_pairs(method):
    model = tiny(method, lr=3e-3, steps=250, warmup=5, mask_ratio=0.5, text_mask_ratio=0.5, weight_decay=0.0,
                 image_weight=1.0, text_weight=1.0)
    optimizer = mae_clip.make_optimizer(model, model.config)
    torch.manual_seed(1)
    images = torch.randint(0, 256, (32, 3, 4, 4), dtype=torch.uint8)
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    batch = (images, captions(*[5] * 32), torch.rand(32, 16), torch.rand(32, 16), (images, images.flip(3)))
    before = model(*batch)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = mae_clip.learning_rate(step, model.config)
        mae_clip.train_step(model, optimizer, OFF, batch)
    after = model(*batch)
    for name in METHODS[method]:
        assert after[name] < 0.35 * before[name], (name, before[name].item(), after[name].item())

@pytest.mark.parametrize("method", METHODS)
def test_each_method_compiles_as_one_graph_that_no_mask_or_caption_makes_anew(method):
    torch._dynamo.reset()
    net = torch.compile(tiny(method), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(20):
            images, _, *rest = example(seed=seed)
            net(images, captions(*[seed % 15] * 6, seed=seed), *rest)["loss"].backward()

def fake(config):
    """A model under FakeTensorMode: shapes without arithmetic. The seed of its weights is drawn outside."""
    with mock.patch("torch.randint", return_value=0):
        return MAECLIP(config)

def test_base_and_large_have_the_sizes_of_vit_b_16_and_vit_l_16_and_work_follows_the_visible_tokens():
    with torch.device("meta"):
        sizes = [mae_clip.ImageEncoder(Config(**SCALES[scale])) for scale in ("base", "large")]
    assert [sum(x.numel() for x in s.state_dict().values()) for s in sizes] == [85_798_656, 303_301_632]
    flops = {}
    for name, changes in {"clip": {"method": "clip"}, "mae": {"method": "mae"}, "two": {},
                          "one": {"contrastive_mask_ratio": 0.75}, "cross": {"decoder": "cross"}}.items():
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            model = fake(Config(**SCALES["base"] | changes))
            tokens = torch.zeros(1, 77, dtype=torch.int64)
            model(torch.zeros(1, 3, 224, 224), tokens, torch.rand(1, 196), torch.rand(1, 77))
        flops[name] = counter.get_total_flops()
    limits = {"two": 1.70, "one": 0.85, "mae": 0.48, "cross": 1.55}
    assert all(flops[name] <= limit * flops["clip"] for name, limit in limits.items()), flops

@pytest.mark.parametrize("method", METHODS)
def test_a_step_runs_on_fake_tensors_so_nothing_in_it_waits_for_the_device(method):
    with FakeTensorMode():
        batch = [torch.zeros(6, 3, 32, 32), torch.zeros(6, 16).long(), torch.rand(6, 16), torch.rand(6, 16)]
        for pieces in (1, 2):
            model = fake(Config(**SCALES["tiny"], method=method, accumulate=pieces))
            optimizer = mae_clip.make_optimizer(model, model.config)
            mae_clip.train_step(model, optimizer, OFF, [*batch, (batch[0], batch[0])])

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, {"contrastive_mask_ratio": 0.75, "grad_checkpoint": True}])
def test_accumulated_pieces_give_the_gradient_of_the_whole_batch(method, changes):
    for dtype, pieces, limit in ((torch.float32, 2, 1e-6), (torch.float64, 4, 1e-10)):
        images, *rest, views = example(8)
        batch = mae_clip.normalise(images).to(dtype), *rest, [mae_clip.normalise(v).to(dtype) for v in views]
        found = []
        for count in (1, pieces):
            model = tiny(method, accumulate=count, **changes).to(dtype)
            terms = model(*batch)
            terms["loss"].backward()
            found.append((terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (terms, want), (same, got) = found
        assert all(same[name].item() == pytest.approx(terms[name].item(), rel=limit) for name in terms)
        assert want.keys() == got.keys()
        norm = torch.cat([x.flatten() for x in want.values()]).norm()
        assert torch.cat([(got[n] - x).flatten() for n, x in want.items()]).norm() <= limit * norm
        if "logit_scale" in want:
            assert (got["logit_scale"] - want["logit_scale"]).abs() <= limit * want["logit_scale"].abs()

def test_checkpointed_blocks_and_pieces_give_the_same_gradients_and_save_less():
    found = []
    for again in ({}, {"grad_checkpoint": True}, {"accumulate": 3}):
        model, saved = tiny(depth=4, **again), []
        count = lambda x, n=saved: n.append(x.nbytes) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model(*example())["loss"]
        kept = sum(saved)
        loss.backward()
        found.append((kept, [p.grad for p in model.parameters() if p.grad is not None]))
    assert max(found[1][0], found[2][0]) < 0.5 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))

# --- Across ranks ------------------------------------------------------------------------------------------
def one_rank(rank, world, port, folder):
    """Losses and averaged gradients of one gloo rank's share of a batch, as DDP would average them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    result = {}
    for method in METHODS:
        for pieces in (1, 2):
            model = torch.nn.parallel.DistributedDataParallel(tiny(method, accumulate=pieces))
            *rows, views = example(8)
            mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
            batch = [*(x[mine] for x in rows), [v[mine] for v in views]]
            terms = model(*batch)
            terms["loss"].backward()
            gradients = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
            with torch.no_grad():
                if rank == 0:
                    model.module(*batch)  # one rank evaluates alone: no collective may wait for the other
            result[method, pieces] = ({name: term.detach() for name, term in terms.items()}, gradients)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

def test_two_gloo_ranks_give_the_losses_and_gradients_of_one_process_in_pieces_too(tmp_path):
    port = 20_000 + os.getpid() % 20_000
    torch.multiprocessing.spawn(one_rank, (2, port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method, pieces in ranks[0]:
        model = tiny(method)
        whole = model(*example(8))
        whole["loss"].backward()
        for terms, gradients in (rank[method, pieces] for rank in ranks):
            for name, term in terms.items():
                assert term.item() == pytest.approx(whole[name].item(), rel=1e-6), (method, name)
            pairs = [(gradients[n], p.grad) for n, p in model.named_parameters() if p.grad is not None]
            error, norm = (torch.cat([x.flatten() for x in each]).norm()
                           for each in ([a - b for a, b in pairs], [b for _, b in pairs]))
            assert error < 1e-6 * norm, (method, pieces, error / norm)
            for a, b in pairs:
                assert (a - b).norm() < 1e-5 * (b.norm() + 1e-6), (method, pieces)

# --- Optimiser, schedule, checkpoints ----------------------------------------------------------------------
def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine():
    config = Config(lr=0.8, warmup=4, steps=12)
    rates = [mae_clip.learning_rate(step, config) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(9)])

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer):
    model = tiny(optimizer=optimizer)
    blocks, others, free = mae_clip.make_optimizer(model, model.config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert blocks["weight_decay"] == others["weight_decay"] == 0.1 and free["weight_decay"] == 0
    decaying = blocks["params"] + others["params"]
    assert {names[id(p)].split(".")[-1] for p in decaying} == {"weight"}
    assert all(p.ndim > 1 for p in decaying) and all(p.ndim == 2 for p in blocks["params"])
    others, free = ({names[id(p)] for p in group["params"]} for group in (others, free))
    assert others == {"image_encoder.patch_embed.proj.weight", "text_encoder.embed.token.weight"}
    assert {"logit_scale", "image_encoder.cls_token", "text_encoder.embed.position"} <= free
    assert len(decaying) + len(free) == len(names)

def test_muon_moves_a_matrix_by_its_orthogonalised_momentum_and_decays_it():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    before, momentum = weight.detach().clone(), torch.zeros(6, 4)
    optimizer = mae_clip.Muon([{"params": [weight]}], lr=0.1, weight_decay=0.5, fused=True)
    for _ in range(3):
        gradient = torch.randn(6, 4)
        weight.grad, optimizer.found_inf = gradient.clone(), torch.tensor(0.0)
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        u, _, v = torch.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
        moved = (weight.detach() - before * (1 - 0.1 * 0.5)) / (-5 * 0.1 * math.sqrt(6 / 4))
        singular = torch.linalg.svdvals(u.T @ moved @ v.T)  # in the momentum's own directions, all near 1
        assert 0.6 < singular.min() and singular.max() < 1.3
        assert (u.T @ moved @ v.T).diagonal().min() > 0.6
        before = weight.detach().clone()

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(optimizer):
    optimizer = mae_clip.make_optimizer(model := tiny("clip", optimizer=optimizer), model.config)
    row, finite = mae_clip.train_step(model, optimizer, OFF, example())
    assert finite and row[-1] == 1
    before = {name: x.clone() for name, x in model.state_dict().items()}
    images, *rest = example()
    row, finite = mae_clip.train_step(model, optimizer, OFF, (images / 0.0, *rest))
    assert not finite and not row.any()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())

# --- Bad values --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes, says", [
    ({"method": "dino"}, "--method dino"), ({"mask_ratio": 1.5}, "--mask-ratio 1.5"),
    ({"text_mask_ratio": -0.1}, "--text-mask-ratio"), ({"patch_size": 7}, "--patch-size 7"),
    ({"width": 98}, "--width 98"), ({"heads": 5}, "--width 96"), ({"steps": 0}, "--steps 0"),
    ({"batch_size": 1}, "--batch-size 1"), ({"lr": -1.0}, "--lr"),
    ({"method": "mae", "image_weight": 0.0}, "--method mae"), ({"lr": math.nan}, "--lr nan"),
    ({"pool": "sum"}, "--pool sum"), ({"decoder_width": 6}, "--decoder-width 6"),
    ({"crop": 0.0}, "--crop 0"),
])
def test_a_value_that_does_not_fit_is_named(changes, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}[^\n]*$"):
        Config(**changes)

# --- Parity, where the peer is installed --------------------------------------------------------------------
def test_contrastive_loss_equals_transformers_clip_loss():
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    image, text = unit(6, 8, seed=1), unit(6, 8, seed=2)
    theirs = clip.image_text_contrastive_loss(14.3 * text @ image.T)
    assert mae_clip.contrastive_loss(image, text, 14.3).item() == pytest.approx(theirs.item(), abs=1e-10)

def from_transformers(blocks, layers):
    """Copies the layers of transformers' ViT into our blocks."""
    for block, layer in zip(blocks, layers, strict=True):
        qkv = [getattr(layer.attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        for kind in ("weight", "bias"):
            getattr(block.attn.qkv, kind).data = torch.cat([getattr(part, kind) for part in qkv])
        block.attn.proj.load_state_dict(layer.attention.o_proj.state_dict())
        block.mlp.load_state_dict(layer.mlp.state_dict())
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())

def test_the_encoder_equals_transformers_vit_and_the_losses_its_mae():
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 256, "layer_norm_eps": 1e-6}
    small = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 1,
             "decoder_intermediate_size": 128, "norm_pix_loss": True, "mask_ratio": 0.75}
    peer = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **small)).eval()
    model = tiny("mae", decoder_depth=2).eval()
    encoder, decoder = peer.vit, peer.decoder
    ours = model.image_encoder
    ours.patch_embed.proj.load_state_dict(encoder.embeddings.patch_embeddings.projection.state_dict())
    ours.cls_token.data = encoder.embeddings.cls_token.data
    from_transformers(ours.blocks, encoder.layers)
    ours.norm.load_state_dict(encoder.layernorm.state_dict())
    model.decoder.image.embed.load_state_dict(decoder.decoder_embed.state_dict())
    model.decoder.image.mask_token.data = decoder.mask_token.data
    from_transformers(model.decoder.blocks, decoder.decoder_layers)
    model.decoder.norm.load_state_dict(decoder.decoder_norm.state_dict())
    model.decoder.image.head.load_state_dict(decoder.decoder_pred.state_dict())
    encoder.embeddings.position_embeddings.data = ours.pos_embed
    decoder.decoder_pos_embed.data = F.pad(model.decoder.patch_position, (0, 0, 1, 0))
    images, tokens, noise, *_ = example()
    images = mae_clip.normalise(images)
    with torch.no_grad():
        theirs = peer(images, noise=noise)
        loss = model(images, tokens, noise)["image"]
        assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        keep = random_mask(noise, 0.75)[0]
        hidden = encoder(images, noise=noise).last_hidden_state
        assert torch.allclose(ours(images, keep), hidden, atol=1e-5)
        vit = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False).eval()
        ours.patch_embed.proj.load_state_dict(vit.embeddings.patch_embeddings.projection.state_dict())
        ours.cls_token.data = vit.embeddings.cls_token.data
        ours.pos_embed = vit.embeddings.position_embeddings.data
        from_transformers(ours.blocks, vit.layers)
        ours.norm.load_state_dict(vit.layernorm.state_dict())
        assert torch.allclose(ours(images), vit(images).last_hidden_state, atol=1e-5)

# --- Data: shards, loader, tokenizer ------------------------------------------------------------------
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
            else:
                info.type, info.linkname = (tarfile.SYMTYPE, content) if content else (tarfile.DIRTYPE, "")
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return str(path)

def shards_of(folder, sizes):
    """Shards of that many samples; sample n of all is named and captioned n."""
    folder.mkdir()
    numbers = iter(range(sum(sizes)))
    def files(size):
        for n in (next(numbers) for _ in range(size)):
            yield from ((f"{n:03d}.jpg", picture(seed=n)), (f"{n:03d}.txt", b"number %d" % n))
    return [tar_of(folder / f"{shard}.tar", files(size)) for shard, size in enumerate(sizes)]

def python(*arguments):
    """Runs Python with these arguments."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)

def loader_of(shards, batch=2, **options):
    return data.Loader(shards, batch, 8, data.Tokenizer([]), 16, **options)

def test_a_source_names_shards_by_paths_globs_and_numbers(tmp_path):
    shards = shards_of(tmp_path / "a", [1] * 12)
    assert data.expand(f"{tmp_path}/a/{{9..11}}.tar::{tmp_path}/a/1?.tar") == shards[9:12] + shards[10:12]
    assert data.expand("pipe:cat x{08..10}.tar") == [f"pipe:cat x{n}.tar" for n in ("08", "09", "10")]
    for wrong in (f"{tmp_path}/b-*.tar", f"{tmp_path}/a/{{11..12}}.tar", ""):
        with pytest.raises(data.DataError, match="no such shard"):
            data.expand(wrong)

ODD = [("a/b.c/x.y/one.JPG", picture()), ("a/b.c/x.y/one.seg.png", b"png"), ("folder", None),
       ("link.jpg", "one"), ("__meta__/x.txt", b"skipped"), ("n" * 180 + ".jpg", picture()),
       ("n" * 180 + ".txt", b""), ("no_suffix", b"x"), ("deep/" * 60 + "k.txt", b"\xff\xfe broken"),
       ("p\u00e4.txt", b"umlaut"), (".hidden", b"h"), ("q/.hidden", b"h")]

@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_those_of_the_webdataset_package(kind, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tar_of(tmp_path / "odd.tar", ODD, kind)
    theirs = [{k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")}
              for sample in webdataset.WebDataset(path, shardshuffle=False)]
    assert list(data.read_samples(path)) == theirs and len(theirs) == 5
    assert list(data.read_samples(f"pipe:cat {path}")) == theirs

@pytest.mark.parametrize("seed", range(6))
def test_an_epoch_is_a_plain_list_whatever_the_shards_ranks_workers_and_interruptions(seed, tmp_path):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, rng.integers(1, 5)).tolist()
    world, batch, start = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(0, 5))
    sizes[0] += world * batch
    shards, steps = shards_of(tmp_path / "s", sizes), sum(sizes) // (world * batch)
    whole = loader_of(shards, seed=seed, batch=1)  # the model: one process, a sample a batch
    epochs = [[(each.keys[0], each.images[0].tolist(), each.tokens[0].tolist()) for each in whole.epoch(n)]
              for n in (0, 1)]
    assert sorted(key for key, *_ in epochs[0]) == [f"{n:03d}" for n in range(sum(sizes))]
    assert [key for key, *_ in epochs[0]] != [key for key, *_ in epochs[1]] or sum(sizes) < 4
    for rank in range(world):
        part = loader_of(shards, batch, seed=seed, rank=rank, world=world, workers=seed % 3)
        assert len(part) == steps
        stream = part.batches(start)
        for step in range(start, min(start + steps + 1, 2 * steps)):  # into the next epoch
            epoch, number = divmod(step, steps)
            first = (number * world + rank) * batch
            expected, found = epochs[epoch][first : first + batch], next(stream)
            assert found.keys == [key for key, *_ in expected]
            assert found.images.tolist() == [pixels for _, pixels, _ in expected]
            assert found.tokens.tolist() == [tokens for *_, tokens in expected]
        stream.close()
        skipped = [each.keys for each in part.epoch(1, skip=steps - 1)]
        assert skipped == [[key for key, *_ in epochs[1][((steps - 1) * world + rank) * batch :][:batch]]]

def test_spawned_workers_give_what_forked_ones_give(tmp_path):
    shards = shards_of(tmp_path / "s", [9])
    code = ("import data, multiprocessing, sys\n"
            "if __name__ == '__main__':\n"
            "    multiprocessing.set_start_method(sys.argv[1])\n"
            "    loader = data.Loader(sys.argv[2:], 2, 8, data.Tokenizer([]), 16, workers=2, crop=0.5)\n"
            "    print([(b.keys, b.images.sum().item()) for b in loader.epoch(0)])\n")
    (tmp_path / "use.py").write_text(code)
    (tmp_path / "data.py").write_text(Path(data.__file__).read_text())  # alone in a folder
    said = {python(tmp_path / "use.py", how, *shards).stdout for how in ("fork", "spawn")}
    assert len(said) == 1 and said != {""}

def test_damaged_samples_are_skipped_logged_and_counted_by_cause(tmp_path, capsys):
    good, png = picture(), picture(kind="PNG")
    bomb = bytearray(png)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    inside = png[:60] + bytes(20) + png[80:]  # its header and its end are there
    bad = {"image incomplete": good[:-40], "image header unreadable, or image too large": bytes(bomb),
           "no image": b""}
    images = {f"good{n}": good for n in range(9)} | {f"bad{n}": each for n, each in enumerate(bad.values())}
    both = (((f"{key}.jpg", image), (f"{key}.txt", b"fine")) for key, image in images.items())
    files = list(itertools.chain(*both))
    files += [("empty.jpg", good), ("empty.txt", b" \n\n"), ("inside.jpg", inside), ("inside.txt", b"fine")]
    path = tar_of(tmp_path / "x.tar", files)
    for source, workers in ((path, 0), (path, 2), (f"pipe:cat {path}", 0), (f"pipe:cat {path}", 2)):
        loader = loader_of(source, 5, workers=workers)
        keys = [key for each in loader.epoch(0) for key in each.keys]
        assert set(keys) <= {f"good{n}" for n in range(9)}
        assert loader.bad == {**dict.fromkeys(bad, 1), "no caption": 1, "image does not decode": 1}
        assert "1 x no caption" in loader.report()
        assert "skipped: x.tar bad0: image incomplete" in capsys.readouterr().err

@pytest.mark.parametrize("files, says", [
    ([("a.jpg", picture())], "1 x no caption"), ([("a.txt", b"words")], "1 x no image"),
    ([], "tar without samples"), ([("a.jpg", picture()), ("a.txt", b"few")], "1 usable samples")])
def test_shards_with_nothing_to_train_on_are_named_in_one_line(files, says, tmp_path):
    with pytest.raises(data.DataError, match=says) as error:
        loader_of(tar_of(tmp_path / "x.tar", files))
    assert "\n" not in str(error.value)

def test_a_truncated_tar_gives_its_whole_samples_and_the_loss_is_counted(tmp_path, capsys):
    whole = Path(shards_of(tmp_path / "s", [6])[0]).read_bytes()
    with tarfile.open(tmp_path / "s" / "0.tar") as tar:
        ends = [-(-(info.offset_data + info.size) // 512) * 512 for info in tar]  # of its files
    for length in [*range(ends[5], ends[-1], 700), *ends[5:]]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        samples = list(data.read_samples(str(tmp_path / "cut.tar")))
        found = [sample["__key__"] for sample in samples if "txt" in sample]
        there = sum(end <= length for end in ends[1::2])
        assert found in ([f"{n:03d}" for n in range(count)] for count in (there - 1, there))
        assert "cut.tar: tar breaks off" in capsys.readouterr().err
        for source in (str(tmp_path / "cut.tar"), f"pipe:cat {tmp_path}/cut.tar"):
            loader = loader_of(source, 1)
            assert sorted(key for each in loader.epoch(0) for key in each.keys) == found
            assert any("tar breaks off" in cause for cause in loader.bad)

def test_a_command_that_fails_or_hangs_stops_the_run_and_its_secrets_are_not_printed(tmp_path, monkeypatch):
    path = shards_of(tmp_path / "s", [4])[0]
    monkeypatch.setattr(data, "PIPE_SECONDS", 0.3)
    ends = {"exit 7": "exit code 7", "sleep 60": "silent for 0.3 s", "exec >&-; sleep 60": "silent for 0.3 s"}
    for end, says in ends.items():
        for workers in (0, 1):
            command = f"cat {path}; : token=abc http://me:word@host/x-000.tar?key=def; {end}"
            with pytest.raises(data.DataError, match=says) as error:
                list(loader_of(f"pipe:{command}", workers=workers).epoch(0))
            said = data.one_line(error.value)
            assert said.startswith("x-000.tar: ") and not re.search("abc|def|me:|word", said)

def test_a_stream_gives_each_shard_to_one_worker_and_goes_on_at_the_next(tmp_path):
    source = [f"pipe:cat {shard}" for shard in shards_of(tmp_path / "s", [5, 3, 4, 6])]
    for workers in (0, 2, 8):
        loader = loader_of(source, 1, workers=workers)
        keys = [key for each in loader.epoch(0) for key in each.keys]
        assert sorted(keys) == [f"{n:03d}" for n in range(18)] and loader.position == 4
        assert sorted(each.keys[0] for each in loader.batches(3, 5)) not in (keys, [])
    loader = loader_of(source, 4)
    endless = loader.batches(0)
    assert [len(next(endless).keys) for _ in range(9)] == [4] * 9 and loader.position == 8
    cut = loader_of(f"pipe:head -c 1500 {tmp_path}/s/0.tar", 4)
    assert not list(cut.epoch(0)) and sum(cut.bad.values()) == 1
    with pytest.raises(data.DataError, match="--steps"):
        len(loader)
    with pytest.raises(data.DataError, match="--resample"):
        loader_of(source, world=2)

def test_resampled_shards_differ_by_rank_and_come_without_end(tmp_path):
    shards = shards_of(tmp_path / "s", [5, 3, 4, 6])
    loaders = [loader_of(shards, 1, resample=True, rank=rank, world=2, seed=1) for rank in (0, 1)]
    drawn = [[each.keys[0] for each in itertools.islice(loader.batches(0), 40)] for loader in loaders]
    assert drawn[0] != drawn[1] and all(len(set(keys)) < 40 == len(keys) for keys in drawn)

MODES = [picture(mode="CMYK"), picture(mode="L"), picture(kind="WEBP"), picture(kind="PNG", mode="I;16")]
MODES += [picture(kind="PNG", mode="LA"), picture(kind="PNG", mode="1"), picture(1, 10_000)]
MODES += [picture(10_000, 1), picture(kind="PNG", mode="P", transparency=3)]
MODES += [picture(kind="GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))])]

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

def test_the_tokenizer_is_lossless_on_any_bytes_and_cuts_long_captions_before_eot():
    rng = random.Random(0)
    tokenizer = data.Tokenizer.train(["a small dog runs", "a big dog sleeps", "the dog"] * 3, 300)
    assert 259 < tokenizer.vocab_size <= 300
    for content in (bytes(range(256)), b"", rng.randbytes(999), b"dog" * 999, " a  dog\n\u4f60".encode()):
        assert tokenizer.decode(tokenizer.encode(content)) == content
    for text in ("dog " * 30_000, "d" * 100_000, "", "\ud800"):
        ids = tokenizer.encode(text)[:14]
        row = [1, *ids, 2] + [0] * (14 - len(ids))
        assert tokenizer.batch([text], 16).tolist() == [row]

def test_the_tokenizer_merges_what_a_loop_over_all_pairs_would(tmp_path):
    texts = ["the cat sat on the mat", "a cat and a hat", "that that", "the hat sat"]
    words = [list(piece) for text in texts for piece in data.Tokenizer.pieces.findall(text.encode())]
    words, merges = [[byte + 3 for byte in word] for word in words], []
    while len(merges) < 8:
        pairs = [pair for word in words for pair in zip(word, word[1:], strict=False)]
        best = min(set(pairs), key=lambda pair: (-pairs.count(pair), pair))
        for word in words:
            for n in range(len(word) - 1):
                if tuple(word[n : n + 2]) == best:
                    word[n : n + 2] = [259 + len(merges)]
        merges.append(best)
    assert data.Tokenizer.train(texts, 267).merges == merges
    shards = tar_of(tmp_path / "x.tar", [file for n, text in enumerate(texts)
                                         for file in ((f"{n}.jpg", picture()), (f"{n}.txt", text.encode()))])
    assert command("tokenizer", shards, tmp_path / "t.json", "--vocab-size", 267)[0] == 0
    assert data.Tokenizer.load(tmp_path / "t.json").merges == merges

def command(*arguments):
    """data.py as a user calls it -> exit code, stdout, stderr."""
    done = python(data.__file__, *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr

def test_pack_makes_shards_of_tables_and_class_folders_and_names_broken_rows(tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(picture(64, 48, seed=n))
    rows = [f"{n % 5}.jpg,caption {n}" for n in range(10)] + ["gone.jpg,lost", "1.jpg"]
    (tmp_path / "t.csv").write_text("path,caption\n" + "\n".join(rows))
    for out in ("a", "b"):
        code, said, err = command("pack", tmp_path / "t.csv", tmp_path / out, "--size", 20, "--test", 0.4)
        assert code == 0 and "gone.jpg: No such file" in err and "2 left out" in said
    assert (tmp_path / "a/train/0.tar").read_bytes() == (tmp_path / "b/train/0.tar").read_bytes()
    samples = list(data.read_samples(f"{tmp_path}/a/t*/0.tar"))
    assert len(samples) == 5 and all(len(data.captions(sample)) == 2 for sample in samples)
    assert {data.decode(sample["jpg"]).size for sample in samples} == {(27, 20)}
    code, _, err = command("pack", tmp_path / "t.csv", tmp_path / "a")
    assert code == 2 and "exists already" in err
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "classes" / name / f"{n}.png").write_bytes(picture(kind="PNG", seed=n))
    assert command("pack", tmp_path / "classes", tmp_path / "set", "--templates", "a {c}::one {c}")[0] == 0
    assert sorted(label for *_, label in data.labelled(tmp_path / "set", "train")) == [0, 0, 0, 1, 1, 1]
    texts = {tuple(data.captions(sample)) for sample in data.read_samples(f"{tmp_path}/set/train/0.tar")}
    assert texts == {("a cat", "one cat"), ("a dog", "one dog")}

def test_inspect_reports_and_its_exit_code_says_whether_something_is_wrong(tmp_path):
    shards_of(tmp_path / "s", [4, 3])
    bad, sheet = tar_of(tmp_path / "bad.tar", [("x.jpg", b"bad")]), tmp_path / "sheet.png"
    code, said, _ = command("inspect", f"{tmp_path}/s/*.tar", "--sheet", sheet)
    assert code == 0 and "7 usable samples" in said and Image.open(sheet).width > 100
    code, said, _ = command("inspect", f"{tmp_path}/s/*.tar::{bad}", "--sheet", sheet)
    assert code == 1 and "1 x no caption" in said
    for source in (bad, tmp_path / "none.tar"):
        assert command("inspect", source, "--sheet", sheet)[0] == 2

# --- Evaluation: features in, numbers out -------------------------------------------------------------------
evaluation = sys.modules["eval"]  # a name that is a builtin's

def tied(*shape, seed):  # so few values that scores tie
    return F.normalize(torch.randint(-2, 3, shape, generator=torch.manual_seed(seed)) + 1e-3, dim=1)

def labelled_folder(folder, count=8, classes="ab", split="test"):
    """Writes a set in CLIP_benchmark's layout, image n of class n mod C -> it, and its shard."""
    (folder / split).mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(classes))
    (folder / split / "nshards.txt").write_text("1\n")
    files = [(f"{n:03d}.{field}", content) for n in range(count) for field, content in
             (("jpg", picture(8, 8 + n, seed=n)), ("cls", b"%d" % (n % len(classes))))]
    return folder, tar_of(folder / split / "0.tar", files)

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of new tiny models, clip and mae, with a tokenizer of bytes alone."""
    paths = [tmp_path_factory.mktemp(method) / "checkpoint-1.pt" for method in ("clip", "mae")]
    for seed, (path, method, merges) in enumerate(zip(paths, ("clip", "mae"), ([], None), strict=True)):
        model = tiny(method, seed, vocab_size=259)
        torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config),
                    "tokenizer": merges}, path)
    return paths

def test_zero_shot_counts_as_clip_benchmark_does_ties_and_absent_classes_included():
    x, c, y = tied(40, 4, seed=1), tied(7, 4, seed=2), torch.arange(40) % 6
    found, logits = zero_shot(x, c, y), 100.0 * x @ c.T
    top, best = logits.topk(5, dim=1).indices.tolist(), logits.argmax(dim=1)
    for k in (1, 5):
        hits = [label in row[:k] for row, label in zip(top, y.tolist(), strict=True)]
        assert found[f"acc{k}"] == sum(hits) / 40
    recalls = [(best[y == k] == k).double().mean().item() for k in range(6)]
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / 6, abs=1e-12)
    assert math.isnan(zero_shot(x, c[:4], y % 4)["acc5"])

def test_retrieval_counts_as_clip_benchmark_does_with_ties_and_several_captions():
    images, texts, owner = tied(12, 3, seed=1), tied(18, 3, seed=2), torch.arange(18) * 7 % 12
    found, scores = retrieval(images, texts, owner), texts @ images.T
    for k in (1, 5, 10):
        of_texts = [owner[n] in scores[n : n + 1].topk(k, dim=1)[1] for n in range(18)]
        of_images = [n in owner[scores.T[n : n + 1].topk(k, dim=1)[1]] for n in range(12)]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(sum(of_texts) / 18)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(sum(of_images) / 12)

def test_knn_is_the_weighted_vote_of_the_nearest_whatever_the_blocks(monkeypatch):
    x, test_x, y = tied(30, 3, seed=1), tied(15, 3, seed=2), torch.arange(30) % 4
    weight = [[math.exp(float(x[i] @ row) / 0.07) for i in range(30)] for row in test_x]
    votes = [[sum(row[k::4]) for k in range(4)] for row in weight]
    right = sum(row.index(max(row)) == n % 4 for n, row in enumerate(votes))
    monkeypatch.setattr(evaluation, "BLOCK", 64)
    assert evaluation.knn(x, y, 7 * test_x.double(), y[:15], k=30)["acc1"] == right / 15

@pytest.mark.parametrize("kind", ["plain", "scales", "rank", "few", "separable", "absent", "unit", "huge"])
def test_fit_linear_reaches_the_objective_of_scikit_learn(kind):
    linear_model, rng = pytest.importorskip("sklearn.linear_model"), np.random.default_rng(0)
    y = np.arange(12 if kind == "few" else 150) % 4
    x = rng.normal(size=(len(y), 16)) + rng.normal(size=(4, 16))[y] * (9 if kind == "separable" else 0.4)
    x *= {"scales": 10.0 ** rng.uniform(-3, 3, 16), "huge": 1e4}.get(kind, 1)
    x = x[:, :3] @ rng.normal(size=(3, 16)) if kind == "rank" else x
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if kind == "unit" else x
    for l2 in (1e-1, 1e-4, 1e-7):
        peer = linear_model.LogisticRegression(C=1 / len(y) / l2, solver="newton-cholesky", tol=1e-10)
        pairs = fit_linear(x, y, 6 if kind == "absent" else 4, l2), (peer.fit(x, y).coef_, peer.intercept_)
        losses = []
        for weight, bias in (map(torch.as_tensor, pair) for pair in pairs):
            loss = F.cross_entropy(torch.tensor(x) @ weight.T + bias, torch.tensor(y))
            losses.append((loss + l2 / 2 * weight.square().sum()).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

def test_the_linear_probe_chooses_on_train_alone_and_is_as_good_as_scikit_learns():
    linear_model, rng = pytest.importorskip("sklearn.linear_model"), np.random.default_rng(0)
    y = rng.integers(0, 5, 3000)
    x = rng.normal(size=(3000, 24)) + 0.5 * rng.normal(size=(5, 24))[y]
    held, rest = np.split(np.random.default_rng(0).permutation(1000), [200])
    def score(C, fit, test):
        return linear_model.LogisticRegression(C=C, max_iter=1000).fit(x[fit], y[fit]).score(x[test], y[test])
    best = max((10.0**k for k in range(-5, 3)), key=lambda C: score(C, rest, held))
    found = evaluation.linear_probe(x[:1000], y[:1000], x[1000:], y[1000:])
    assert abs(found["acc1"] - score(best, slice(1000), slice(1000, None))) < 0.005

def test_intervals_resample_images_and_a_lead_is_on_the_same_images():
    hits = np.arange(400) % 4 == 0
    score, worse = (evaluation.Score(hits & (np.arange(400) >= n), hits >= 0, 0.1) for n in (0, 1))
    _, low, high = evaluation.spread([score])
    assert low < 0.25 < high and abs(high - low - 2 * 1.96 * math.sqrt(0.25 * 0.75 / 400)) < 0.01
    lead, low, high = evaluation.spread([score], [worse])
    assert 0 <= low <= lead <= high < 5 / 400 and lead == pytest.approx(1 / 400)
    seeds = [evaluation.Score([x], [1], 0) for x in (0.2, 0.3, 0.7)]
    half = 4.303 * np.std([0.2, 0.3, 0.7], ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert evaluation.spread(seeds) == pytest.approx([0.4, 0.4 - half, 0.4 + half], abs=1e-3)

def test_a_cached_feature_never_outlives_its_input(trained, tmp_path):
    (folder, shard), path = labelled_folder(tmp_path / "set"), tmp_path / "copy.pt"
    def extract():
        return evaluation.features(*mae_clip.load(path)[:2], *evaluation.open_sets(folder), "test", path)
    path.write_bytes(trained[0].read_bytes())
    first, about, content = extract(), os.stat(shard), Path(shard).read_bytes()
    assert all(map(torch.equal, extract().values(), first.values()))
    Path(shard).write_bytes(content.replace(b"0" + bytes(511), b"1" + bytes(511)))  # a block, a label
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert extract()["labels"].tolist() == [1] * 8 != first["labels"].tolist()
    path.write_bytes(trained[1].read_bytes())
    assert not extract()["pooled"].equal(first["pooled"])

def test_the_suite_sets_checkpoints_side_by_side_with_chance_and_intervals(trained, tmp_path, capsys):
    folder, _ = labelled_folder(labelled_folder(tmp_path / "set", 40)[0], 24, split="train")
    evaluation.main(["suite", *map(str, [*trained, "--data", folder]), "--untrained", "--format", "json"])
    table = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    probe, names = table["linear_probe"], [path.parent.name for path in trained]
    assert table.keys() == {"zero_shot", "linear_probe", "knn"} and probe["chance"] == 0.5
    assert probe["values"].keys() == {*names, "untrained", " less ".join(names)}
    (tmp_path / f"{names[0]}-1").mkdir()
    twin, state = tmp_path / f"{names[0]}-1" / trained[0].name, torch.load(trained[0])
    torch.save(state | {"config": state["config"] | {"seed": 1}}, twin)  # so the two share a column
    evaluation.main(["knn", *map(str, [twin, *trained, "--data", folder])])
    assert capsys.readouterr().out.splitlines()[0].split("  ")[5] == f"{names[0]}-1 + {names[0]}"

def test_what_eval_cannot_use_is_refused_in_one_line(trained, tmp_path, capsys):
    (clip, mae), bad = trained, tmp_path / "bad.pt"
    bad.write_bytes(clip.read_bytes()[:5000])
    folder, shard = labelled_folder(labelled_folder(tmp_path / "set", 8, "abc", "train")[0], 8, "abc")
    def refused(says, *words):
        with pytest.raises(SystemExit) as end:
            evaluation.main([str(word) for word in words])
        said = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(said) == 1 and says in said[0], said
    refused("text tower", "zero-shot", mae, "--data", folder)
    refused("bad.pt", "knn", bad, "--data", folder)
    refused("bad.pt", "zero-shot", clip, bad, "--labels", "a,b")
    torch.save(torch.load(clip) | {"model": torch.load(mae)["model"]}, bad)
    refused("do not fit", "knn", bad, "--data", folder)
    refused("1 ... 8", "knn", clip, "--data", folder)
    refused("caption", "retrieval", clip, "--data", shard)
    for file, content, says in (("classnames.txt", "a\nb", "0 ... 1"), ("test/nshards.txt", "2", "1.tar"),
                                ("zeroshot_classification_templates.txt", "a {c}\na", "{c}"),
                                ("classnames.txt", "a", "classnames.txt")):
        (folder / file).write_text(content)
        refused(says, "knn", clip, "--data", folder)

@pytest.mark.parametrize("method, decoder", [*((each, "joint") for each in METHODS), ("mae_clip", "cross")])
def test_the_counted_flops_are_those_of_pytorchs_counter(method, decoder):
    model = tiny(method, decoder=decoder, decoder_depth=2, batch_size=6)
    math_alone = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_alone:
        model(*example(6))
    assert counter.get_total_flops() == 6 * evaluation.flops(model.config)

def test_the_benchmark_prints_its_figures_and_writes_them(tmp_path, capsys):
    evaluation.main(["benchmark", "--scale", "tiny", "--batch-size", "8", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out").read_text())
    assert "matrix TFLOP/s" in capsys.readouterr().out
    assert found["method"] == "mae_clip" and found["GFLOP a pair"] > 0 and found["share"] > 0

# --- The commands, as a user types them --------------------------------------------------------------------
def run(*arguments, code=0):
    """What mae_clip.py prints when called with these arguments, in this process; checks its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        mae_clip.main([str(argument) for argument in arguments])
    assert (end.value.code or 0) == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())

@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the tests' own, so that they find nothing that they did not make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"])

TINY = ("--scale", "tiny", "--batch-size", 32, "--scenes", 400)

@pytest.mark.parametrize("method", METHODS)
def test_the_command_trains_evaluates_and_reports_each_method(method, tmp_path):
    out = run(*TINY, "--method", method, "--steps", 12, "--out", tmp_path / "run").stdout
    assert "parameters" in out and "expected" in out
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 12]
    names = {"loss", "lr", "grad_norm", "pairs_per_second", "waiting", *METHODS[method]}
    assert names <= set(records[0])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 12 and results["config"]["method"] == method
    assert ("zero_shot" in results) == (method in ("clip", "mae_clip", "slip"))
    assert (tmp_path / "run" / "reconstructions.png").exists() == (method in ("mae", "m3ae", "mae_clip"))
    model, tokenizer, config = mae_clip.load(tmp_path / "run" / "checkpoint-12.pt")
    assert not model.training and config.method == method and (tokenizer is None) == (method == "mae")
    assert not any("module." in name or "_orig_mod" in name for name in model.state_dict())

def test_a_resumed_run_equals_one_in_a_single_piece_bit_for_bit_in_the_middle_of_an_epoch_too(tmp_path):
    for method in ("mae_clip", "slip"):
        steps = (*TINY, "--method", method, "--steps", 6, "--log-every", 2)  # 12 steps an epoch
        whole, parts = tmp_path / f"{method}-whole", tmp_path / f"{method}-parts"
        run(*steps, "--out", whole)
        said = run(*steps, "--out", parts, "--stop-after", 3).stdout
        assert "--resume" in said
        assert [path.name for path in parts.glob("*.pt")] == ["checkpoint-3.pt"]
        run(*steps, "--out", parts, "--resume")
        a, b = (torch.load(folder / "checkpoint-6.pt", weights_only=True) for folder in (whole, parts))
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        for n, state in a["optimizer"]["state"].items():
            assert all(torch.equal(state[key], b["optimizer"]["state"][n][key]) for key in state)
        results = [json.loads((folder / "results.json").read_text()) for folder in (whole, parts)]
        assert results[0]["zero_shot"] == results[1]["zero_shot"]

def test_ctrl_c_saves_says_how_to_go_on_and_ends_with_130(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--steps", 5000, "--log-every", 1, "--out", out]
    command = [sys.executable, HERE / "mae_clip.py", *map(str, flags)]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, "--resume"], **pipes)
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") > 2):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        said, _ = process.communicate()
        assert process.returncode == code and "--resume" in said
        assert list(out.glob("checkpoint-*.pt"))
        (out / "log.jsonl").unlink()

def one_line(done):
    """The single line on stderr that says what was wrong, without a traceback."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]

def test_nothing_is_overwritten_and_another_run_is_not_resumed(tmp_path):
    steps = (*TINY, "--steps", 6, "--out", tmp_path / "run")
    run(*steps, "--stop-after", 4, "--save-every", 2)
    assert "--resume" in one_line(run(*steps, code=2))
    assert "--lr 0.003" in one_line(run(*steps, "--lr", 0.01, "--resume", code=2))
    assert "--steps 6" in one_line(run(*TINY, "--steps", 8, "--out", tmp_path / "run", "--resume", code=2))
    assert "--data" in one_line(run(*steps, "--resume", "--data-seed", 5, code=2))
    newest = tmp_path / "run" / "checkpoint-4.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    done = run(*steps, "--resume")  # falls back to step 2, and says so
    assert "checkpoint-4.pt" in done.stderr
    assert "complete" in one_line(run(*steps, "--resume", code=2))
    for path in (tmp_path / "run").glob("*.pt"):
        path.write_bytes(b"damaged")
    (tmp_path / "run" / "results.json").unlink()
    assert "none of its checkpoints" in one_line(run(*steps, "--resume", code=2))

@pytest.mark.parametrize("arguments, says", [
    (("--colour", "red"), "--colour"), (("--steps", "many"), "--steps"),
    (("--mask-ratio", "2"), "--mask-ratio"), (("--method", "dino"), "--method"),
    (("--patch-size", "7"), "--patch-size"), (("--data", "nowhere-*.tar"), "nowhere-*.tar"),
    (("--device", "cuda:7"), "--device"), (("--out", "/proc/no/run"), "/proc/no"),
    (("--batch-size", "500"), "400 usable samples"), (("--scale", "huge"), "--scale"),
    (("--tokenizer", "none.json"), "none.json"), (("--accumulate", "0"), "--accumulate 0"),
])
def test_bad_input_gets_one_line_that_names_it_and_exit_code_2(arguments, says, tmp_path):
    out = () if "--out" in arguments else ("--out", tmp_path / "run")
    assert says in one_line(run(*TINY, *out, *arguments, code=2))

def test_training_across_two_processes_in_pieces_equals_one(tmp_path):
    steps = (*TINY, "--steps", 4, "--log-every", 2, "--precision", "fp32")
    run(*steps, "--out", tmp_path / "one")
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(),
               HERE / "mae_clip.py", *map(str, steps), "--accumulate", "2", "--out", tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line) for line in log] for log in logs)
    for a, b in zip(one, two, strict=True):
        for name in ("contrastive", "image", "text", "loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)

def test_every_flag_is_in_the_readmes_table_and_the_other_way_round():
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    first = re.findall(r"^\| .*? \|", (HERE / "README.md").read_text().split("## Flags")[1], re.MULTILINE)
    assert sorted(re.findall(r"`--([a-z-]+)`", " ".join(first))) == sorted(fields)
    said = run("--help").stdout
    assert all(f"--{field}" in said for field in fields)
