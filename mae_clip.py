# ruff: noqa: E402
"""MAE-CLIP, the method in one file: CLIP with masked autoencoding.

Weers et al., "Masked Autoencoding Does Not Help Natural Language Supervision at Scale" (CVPR 2023),
ask whether reconstructing removed patches and words helps CLIP. This file trains five methods from
one set of parts, so that mae_clip differs from clip in nothing but the reconstruction: clip
(Radford et al. 2021), mae (He et al. 2021), m3ae (Geng et al. 2022), mae_clip and slip (Mu et al.
2021).

    python mae_clip.py --scale small                                  built-in data, minutes, no GPU
    python mae_clip.py --method clip --data 'pairs-{000..123}.tar'    your own shards
    torchrun --nproc-per-node 8 mae_clip.py --scale base --accumulate 4 --data ...    eight GPUs
    python mae_clip.py --help                                         every flag

By default mae_clip sends each image and its caption through the same weights twice:

    pass 1, whole    all patches -----> image encoder --> pool ----> projection --+
                                                                                  +--> contrastive
                     all tokens ------> text encoder ---> at EOT --> projection --+    loss

    pass 2, masked   visible patches -> image encoder -+             +-> removed patches: image loss
                                                       +-> decoder --+
                     visible tokens --> text encoder --+             +-> removed tokens: text loss

By default a quarter of the patches is visible in pass 2 and, beside the tokens that begin and end a
caption (SOT and EOT), a quarter of its tokens. There no removed patch or token reaches a block of
an encoder; the decoder gets a mask token in its place. clip is pass 1 alone, mae the image half of
pass 2. In m3ae one trunk encodes visible patches and visible tokens together. slip is pass 1 and
two augmented views that must find each other.

Letters for shapes: B batch (G over all ranks), H and W an image's height and width, P a patch's
side, N patches, T tokens, K kept and R the rest (of patches or of tokens), D width, E embedding, V
vocabulary. In a mask of patches or tokens True means removed. All down to the double line is the
method and needs torch alone; below it stands its training.
"""

import math
import os
import zlib
from dataclasses import dataclass
from typing import NamedTuple

# To be set before torch is imported. Waiting threads of GNU OpenMP spin, for milliseconds by
# default. If other programs run too, spinning threads hold the cores that working threads need.
# With this a busy machine was measured to train 20 times as fast (docs/results.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.utils.checkpoint import checkpoint

# --- Configuration of the model -------------------------------------------------------------------

# Each method's loss terms. The loss is their sum, each times the weight of its name.
METHODS = {
    "clip": ("contrastive",),
    "mae": ("image",),
    "m3ae": ("image", "text"),
    "mae_clip": ("contrastive", "image", "text"),
    "slip": ("contrastive", "simclr"),
}


@dataclass(frozen=True)
class ModelConfig:
    """What the model is, and its loss. The defaults are those of the scale `small`; --help shows
    these comments."""

    method: str = "mae_clip"  # what is trained: clip, mae, m3ae, mae_clip or slip
    image_size: int = 32  # pixels a side
    patch_size: int = 8  # pixels a side
    width: int = 96  # of the image tower's tokens
    depth: int = 3  # blocks of the image tower
    heads: int = 3  # attention heads of the image tower
    pool: str = "gap"  # image feature: mean (gap) or max of patch tokens, or CLS (cls)
    text_width: int = 96  # of the text tower's tokens; m3ae uses --width
    text_depth: int = 1  # blocks of the text tower
    text_heads: int = 3  # attention heads of the text tower
    context: int = 16  # tokens a caption, SOT and EOT included
    vocab_size: int = 512  # token ids to learn at most; a given tokenizer has its own number
    embed: int = 64  # width of the space that images and captions share
    decoder_width: int = 64  # of the decoder's tokens (MAE: 512)
    decoder_depth: int = 1  # blocks of the decoder (MAE: 8)
    decoder_heads: int = 2  # attention heads of the decoder (MAE: 16)
    mask_ratio: float = 0.75  # share of patches removed (MAE: 0.75)
    text_mask_ratio: float = 0.75  # share of tokens (but SOT, EOT) removed (M3AE: 0.75)
    contrastive_mask_ratio: float = 0.0  # share of patches removed in pass 1 (FLIP: 0.5)
    norm_pix: bool = True  # predict patches normalised by their own mean and variance (MAE)
    contrastive_weight: float = 1.0  # of the contrastive loss
    image_weight: float = 0.3  # of the image reconstruction
    text_weight: float = 0.15  # of the text reconstruction
    simclr_weight: float = 1.0  # of SimCLR's loss (SLIP: 1)
    accumulate: int = 1  # pieces to compute a batch in: less memory, same losses and gradient

    def side(self):
        """Patches a side."""
        return self.image_size // self.patch_size

    def weights(self):
        """{term: weight}: the method's terms of weight above 0. No others are computed."""
        weights = {term: getattr(self, f"{term}_weight") for term in METHODS[self.method]}
        return {term: weight for term, weight in weights.items() if weight > 0}


# --- Patches and positions ------------------------------------------------------------------------

IMAGE_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's, as in MAE and SLIP
IMAGE_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise_images(images):
    """uint8 (B,3,H,W) -> float32 by ImageNet's mean and deviation; float images stay as they
    are."""
    if images.dtype != torch.uint8:
        return images
    x = images.float() / 255
    return (x - IMAGE_MEAN.to(x)) / IMAGE_STD.to(x)


def patchify(images, patch):
    """(B,3,H,W) -> (B,N,P*P*3): patches row by row; the values of each in the order (row,
    column, channel), as in MAE."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, H/P, P, W/P, P)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/P, W/P, P, P, 3)
    return x.flatten(3).flatten(1, 2)


def unpatchify(patches, patch, height, width):
    """(B,N,P*P*3) -> (B,3,H,W): the inverse of patchify."""
    x = patches.unflatten(2, (patch, patch, -1))  # (B, N, P, P, 3)
    x = x.unflatten(1, (height // patch, width // patch))  # (B, H/P, W/P, P, P, 3)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, 3, H/P, P, W/P, P)
    return x.flatten(4).flatten(2, 3)


def sincos_2d(width, rows, cols):
    """Fixed positions (rows*cols, width), which are not trained.

    The first half of the width codes the column and the second the row, which is MAE's order. Each
    half holds sines, then cosines, of position / 10000^(k / (width/4)) for k = 0 ... width/4 - 1.
    """
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    # row[n], column[n]: where patch n stands.
    row, column = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).T
    codes = []
    for where in (column, row):
        angle = where[:, None] / 10000**exponent  # (rows*cols, width/4)
        codes += [angle.sin(), angle.cos()]
    return torch.cat(codes, dim=1).float()


def take(x, index):
    """x (B or 1, N, D), index (B,K) -> (B,K,D): the rows of each sample that index names."""
    return torch.take_along_dim(x, index[..., None], dim=1)  # index stretches over D


# --- Masks ----------------------------------------------------------------------------------------

# A mask splits the N positions of a sample, patches or tokens, in two groups: K go to the encoder
# (keep), the others, R = N - K, do not (rest). K and R are the same for all samples, enough for a
# caption that fills all T places. A shorter one leaves places over, which padding takes. Padding in
# rest is called spare: mask is False there, and no loss counts it. All else in rest is removed: the
# decoder predicts it. Patches have no padding, so none of them is spare.

# A caption is SOT (1), its tokens (3 and up), EOT, padding (0): see Tokenizer in data.py.
EOT = 2


def kept_count(length, ratio):
    """How many of `length` stay when `ratio` is removed, rounded to the nearest. int alone would
    not do: in floats 100 * (1 - 0.9) is a little less than 10, and int makes that 9."""
    return int(length * (1 - ratio) + 0.5)


def random_mask(noise, ratio):
    """Removes patches at random (MAE): in each sample those of smallest noise stay, at least one.

    noise (B,N) -> keep (B,K) positions that stay, mask (B,N) bool, True where removed.
    """
    keep = noise.argsort(dim=1)[:, : max(1, kept_count(noise.shape[1], ratio))]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)
    return keep, mask


def caption_end(tokens):
    """tokens (B,T), each with an EOT -> (B,1): where it stands. All after it is padding, whatever
    ids stand there."""
    return (tokens == EOT).int().argmax(dim=1, keepdim=True)


def kept_first(mask):
    """mask (B,N) -> (B,N), an order of the positions: first all where mask is False, then all where
    it is True (removed), both in rising order."""
    return mask.int().argsort(dim=1, stable=True)


def random_text_mask(noise, tokens, ratio):
    """Removes tokens between SOT and EOT at random; captions of all lengths share one static shape.

    noise (B,T) in 0..1, tokens (B,T) -> keep (B,K), always K positions: SOT, what stays, EOT, and
    padding to fill K; mask (B,T) bool, True where removed, which SOT, EOT and padding never are.

    For example, with T = 16 and ratio 0.75:

        position    0    1     2     3     4    5 to 15
        token       SOT  a     b     c     EOT  padding
        noise            0.1   0.8   0.5
        rank             0     2     1
        mask             -     True  True

    Of three tokens one stays, that of rank 0. Of a full caption's fourteen tokens four stay, so
    with SOT and EOT K is 6, for every caption. keep is the first K positions of

        kept_first(mask)    0 1 4 5 6 7 | 8 9 10 11 12 13 14 15 2 3

    The padding 5, 6 and 7 fills keep. The rest is the padding 8 to 15 (spare), and 2 and 3, which
    are removed.
    """
    T = tokens.shape[1]
    position = torch.arange(T, device=tokens.device)
    end = caption_end(tokens)
    between = (position > 0) & (position < end)  # (B,T): True strictly between SOT and EOT
    # Positions by their noise. SOT, EOT and padding get 2, above all noise, and so come last.
    by_noise = noise.masked_fill(~between, 2).argsort(dim=1)
    # The inverse permutation, (B,T): the place of each position in by_noise.
    rank = by_noise.argsort(dim=1)
    # kept_of_length[n]: how many of n tokens stay, n from 0 to T - 2. The table is made in Python,
    # since the device's float32 might round otherwise than kept_count.
    kept_of_length = [kept_count(length, ratio) for length in range(T - 1)]
    # Between SOT, at 0, and EOT, at `end`, stand end - 1 tokens.
    kept = torch.tensor(kept_of_length, device=tokens.device)[end - 1]  # (B,1)
    mask = between & (rank >= kept)
    # Of a full caption K positions stay, SOT and EOT among them, and R = T - K are removed. With
    # each token more, either one more stays or one more is removed. So no caption keeps more than
    # the full one or removes more: the first K of kept_first(mask) hold all that stays, and the
    # last R all that is removed.
    K = 2 + kept_of_length[-1]
    return kept_first(mask)[:, :K], mask


class Masked(NamedTuple):
    """What the masked pass knows of one modality (N stands for patches or tokens).

    keep and rest are together all N positions. rest begins with the spare ones, where mask is
    False, and ends with the removed ones, where mask is True. In keep mask is False.
    """

    keep: torch.Tensor  # (B,K) positions that the encoder gets
    rest: torch.Tensor  # (B,R) all other positions, R = N - K: spare or removed
    real: torch.Tensor  # (B,N) bool, False at padding; None for patches, which have none
    mask: torch.Tensor  # (B,N) bool, True where removed


def record_mask(keep, mask, real):
    """keep (B,K), mask (B,N), real (B,N) or None -> Masked."""
    K = keep.shape[1]
    # The first K of kept_first(mask) are the positions of keep (of patches in another order), so
    # the others are the rest.
    return Masked(keep, kept_first(mask)[:, K:], real, mask)


# --- Transformer block ----------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, with timm's parameter names."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, real):
        """x (B,T,D), real (B,T) bool: what may be attended to, or None for all -> (B,T,D)."""
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))  # (B,T,3*heads,D/heads)
        # The heads of q, then those of k, then those of v: each (B,heads,T,D/heads).
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)
        # (B,1,1,T): nothing attends to padding.
        attendable = None if real is None else real[:, None, None]
        if q.is_cpu:
            # The same as SDPA below, in plain products: on a CPU SDPA is no faster, except for long
            # sequences in float32 (docs/results.md).
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            if attendable is not None:
                scores = scores.masked_fill(~attendable, -math.inf)
            y = scores.softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attendable)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        """(B,T,D) -> (B,T,D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, the same for images, text and decoder."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x, real):
        """x (B,T,D), real (B,T) bool or None -> (B,T,D)."""
        x = x + self.attn(self.norm1(x), real)
        return x + self.mlp(self.norm2(x))


def make_blocks(width, heads, depth):
    """So many blocks, as a ModuleList."""
    return nn.ModuleList([Block(width, heads) for _ in range(depth)])


# --- Encoders -------------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """Vision transformer with timm's parameter names. Removed patches never reach its blocks."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        patch = config.patch_size
        side = config.side()
        self.patch_size = patch
        # Timm's name and shape; never called, since forward makes a matrix product of it.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # The position of CLS is zero (weights of a timm ViT, by --init, may have another one).
        position = torch.cat([torch.zeros(1, width), sincos_2d(width, side, side)])
        self.pos_embed = nn.Buffer(position[None])  # (1,1+N,D)
        self.blocks = make_blocks(width, config.heads, config.depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images, keep=None, text=None, text_real=None):
        """images (B,3,H,W) uint8 or normalised float; keep (B,K) positions of the patches that
        are seen, None for all N -> (B,1+K,D) after the final norm, CLS first.

        m3ae adds text (B,M,D), the M embedded tokens that are seen, and text_real (B,M), False
        where they are padding -> (B,1+K+M,D).
        """
        proj = self.patch_embed["proj"]
        x = patchify(normalise_images(images), self.patch_size)  # (B,N,P*P*3)
        position = self.pos_embed[:, 1:]
        if keep is not None:  # here a removed patch leaves, before it is projected
            x = take(x, keep)  # (B,K,P*P*3)
            position = take(position, keep)
        # The weight's values in the order of patchify's: so the product is the convolution.
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D,P*P*3), channel fastest
        x = F.linear(x, weight, proj.bias) + position  # (B,K,D)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B,1+K,D)
        real = None
        if text is not None:
            # True before the text, for CLS and patches: these are never padding.
            real = F.pad(text_real, (x.shape[1], 0), value=True)  # (B,1+K+M)
            x = torch.cat([x, text], dim=1)
        for block in self.blocks:
            x = block(x, real)
        return self.norm(x)


class TextEmbedding(nn.Module):
    """Token and position embeddings, both learned."""

    def __init__(self, config, width):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, width)
        self.position = nn.Parameter(torch.zeros(1, config.context, width))

    def forward(self, tokens, keep=None):
        """tokens (B,T), keep (B,K) positions that are seen, or None for all -> (B,T or K,D)."""
        x = self.token(tokens) + self.position[:, : tokens.shape[1]]
        if keep is not None:  # here a removed token leaves (looking it up was cheap)
            x = take(x, keep)
        return x


def no_padding(tokens, position=None):
    """tokens (B,T), position (B,K) or None for all T -> (B,K) or (B,T) bool, False where a position
    is padding, that is after EOT."""
    if position is None:
        position = torch.arange(tokens.shape[1], device=tokens.device)
    return position <= caption_end(tokens)  # caption_end: (B,1)


class TextEncoder(nn.Module):
    """Text transformer that is not causal: in a causal one a token would not see the kept tokens
    that come after it."""

    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.embed = TextEmbedding(config, width)
        self.blocks = make_blocks(width, config.text_heads, config.text_depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens, keep=None):
        """tokens (B,T), keep (B,K) positions that are seen, or None for all -> (B,T or K,D)."""
        x = self.embed(tokens, keep)
        real = no_padding(tokens, keep)
        for block in self.blocks:
            x = block(x, real)
        return self.norm(x)


# --- Decoder --------------------------------------------------------------------------------------


class Modality(nn.Module):
    """What the decoder has of one modality beside its blocks: embedding, mask token, positions, and
    a head that predicts `values` numbers at each position of rest."""

    def __init__(self, encoder_width, width, values, position):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        # Each modality has its own embed and mask token. So the decoder can tell them apart without
        # an embedding of the modality.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = position  # (1,N,width): a fixed buffer for patches, learned for text
        self.head = nn.Linear(width, values)

    def enter(self, encoded, masked):
        """encoded (B,K,D) -> (B,N,width): each in its place, mask tokens in all others, and
        the positions added."""
        N = masked.mask.shape[1]
        kept = self.embed(encoded)
        # Mask tokens everywhere; then scatter writes the kept tokens into their places. It needs
        # one type, and under autocast kept is in bfloat16.
        x = self.mask_token.to(kept.dtype).expand(len(kept), N, -1)
        index = masked.keep.unsqueeze(-1).expand_as(kept)
        # [:, :N]: a batch of texts may be shorter than the context.
        return x.scatter(1, index, kept) + self.position[:, :N]


class Decoder(nn.Module):
    """Predicts what was removed, by attention among all patches and all tokens (MAE, M3AE)."""

    def __init__(self, config):
        super().__init__()
        width = config.decoder_width
        if "image" in config.weights():
            position = sincos_2d(width, config.side(), config.side())
            position = nn.Buffer(position[None], persistent=False)
            self.image = Modality(config.width, width, config.patch_size**2 * 3, position)
        if "text" in config.weights():
            text_width = config.width if config.method == "m3ae" else config.text_width
            position = nn.Parameter(torch.zeros(1, config.context, width))
            self.text = Modality(text_width, width, config.vocab_size, position)
        self.blocks = make_blocks(width, config.decoder_heads, config.decoder_depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image_masked, encoded_image, text_masked, encoded_text):
        """image_masked: Masked, of patches;
        encoded_image: (B,1+K,D), CLS first;
        text_masked: Masked, of tokens;
        encoded_text: (B,K,D), where K and D are the text's own
        -> pixels (B,R,P*P*3), logits (B,R,V): predictions for the positions in `rest`.
        For a modality that is not decoded its two arguments and its prediction are None."""
        parts = []
        if image_masked is not None:
            parts.append(self.image.embed(encoded_image[:, :1]))  # CLS, which has no position
            parts.append(self.image.enter(encoded_image[:, 1:], image_masked))
        text_start = sum(part.shape[1] for part in parts)  # CLS and patches stand before the text
        real = None
        if text_masked is not None:
            parts.append(self.text.enter(encoded_text, text_masked))
            # True before the text, for CLS and patches: these are never padding.
            real = F.pad(text_masked.real, (text_start, 0), value=True)
        x = torch.cat(parts, dim=1)  # (B,1+N+T,width) with images and text
        for block in self.blocks:
            x = block(x, real)
        x = self.norm(x)
        # Only the R positions of rest go through the heads: what was kept needs no prediction.
        pixels = logits = None
        if image_masked is not None:
            # x[:, 1:] begins with the N patches, in order.
            pixels = self.image.head(take(x[:, 1:], image_masked.rest))
        if text_masked is not None:
            logits = self.text.head(take(x[:, text_start:], text_masked.rest))
        return pixels, logits


# --- Losses ---------------------------------------------------------------------------------------


def at_least_float32(x):
    """x in float32, or as it is where it is wider. Features, softmax and pixel statistics need
    more than the two or three digits of bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_norm(x):
    """(...,E) -> (...,E) of length 1, in float32 or wider."""
    return F.normalize(at_least_float32(x), dim=-1)


def contrastive_loss(image_features, text_features, scale):
    """Symmetric InfoNCE (CLIP): each image must find its caption among all, and each caption its
    image.

    image_features, text_features (B,E) of unit norm; scale: the factor on the cosine, a float or a
    0-d tensor -> 0-d: the mean of both directions, over the pairs of all ranks.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images = at_least_float32(image_features)
        texts = at_least_float32(text_features)
        own = own_rows(images)  # where this rank's pairs stand among those of all ranks
        image_to_text = F.cross_entropy(scale * images @ gather(texts).T, own)
        text_to_image = F.cross_entropy(scale * texts @ gather(images).T, own)
    # A mean over ranks, each of which has a part of the rows; why two GPUs then give the loss and
    # the gradient of one is shown below, before `gather`.
    return of_all_ranks((image_to_text + text_to_image) / 2).mean()


def patch_targets(patches, normalise=True):
    """The target of the image loss: patches (...,P*P*3) -> the same shape. MAE normalises each
    patch by its own mean and unbiased variance (+1e-6).

    To predict something else of the same shape, change this and, for pictures, its inverse, panels
    in pictures.py. For a target of another width see docs/exercises/teacher.patch."""
    patches = at_least_float32(patches)
    if not normalise:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def image_error(prediction, patches, normalise=True):
    """Mean squared error of each patch (MAE): prediction, patches (...,P*P*3) -> (...)."""
    return (at_least_float32(prediction) - patch_targets(patches, normalise)).square().mean(dim=-1)


def text_error(logits, tokens):
    """Cross-entropy of each token: logits (...,V), tokens (...) -> (...)."""
    logits = at_least_float32(logits).flatten(0, -2)
    return F.cross_entropy(logits, tokens.flatten(), reduction="none").view_as(tokens)


def masked_mean(errors, mask):
    """Mean of errors (...) where mask (...) is True, over all ranks -> 0-d; 0 where no mask is
    True."""
    total = of_all_ranks(errors.where(mask, 0).sum()).sum()
    count = of_all_ranks(mask.sum()).sum()
    return total / count.clamp(min=1)


def simclr_loss(a, b, temperature=0.1):
    """NT-Xent (SimCLR): among the 2G views of all ranks' images each view must find the other view
    of the same image.

    a, b (B,any): features of the first and the second views, normalised here -> 0-d.
    """
    with torch.autocast(a.device.type, enabled=False):
        # Views 2i and 2i + 1 are of one image.
        views = unit_norm(torch.stack([a, b], dim=1).flatten(0, 1))  # (2B,any)
        own = own_rows(views)
        logits = views @ gather(views).T / temperature  # (2B,2G)
        logits = logits.scatter(1, own.unsqueeze(1), -math.inf)  # a view may not find itself
        other = own ^ 1  # the last bit flipped: 2i <-> 2i + 1
        loss = F.cross_entropy(logits, other)
    return of_all_ranks(loss).mean()


# Why n GPUs give the loss and the gradient of one, if each has as many rows as the others.
# Forward. Each rank computes its own rows' part of the loss; where rows must find each other, it
# gathers those of all ranks. of_all_ranks gathers the parts. Their mean is the loss L of the whole
# batch, one number on all ranks. (masked_mean divides the sum of all errors by that of all counts.)
# Backward. p_r is rank r's copy of a parameter p, equal to all others; L depends on all copies,
# through the gathers. The backward pass of a gather sums what comes from all ranks.
#     dL/dp = sum over r of dL/dp_r             the gradient of one GPU with all rows
#     p_r.grad = d(L + ... + L)/dp_r = n dL/dp_r      since all n ranks call backward on L
#     mean over r of p_r.grad = sum over r of dL/dp_r = dL/dp
# That mean is what DistributedDataParallel takes.
# All ranks must call a loss together. encode_image, encode_text and reconstruct call none of this.


# torch 2.13 deprecates the all_gather of torch.distributed.nn, and calls all_gather_single_autograd
# what was all_gather_tensor_autograd before.
all_gather = getattr(collectives, "all_gather_single_autograd", None)
all_gather = all_gather or collectives.all_gather_tensor_autograd


def gather(x):
    """(B,...) -> (G,...): the rows of all ranks, in their order, with gradient."""
    if not dist.is_initialized():
        return x
    # chunk(1)[0] changes nothing in the forward pass. In the backward pass it makes the gradient
    # contiguous, which all_gather needs before torch 2.13.
    return all_gather(x, 0, dist.group.WORLD).chunk(1)[0]


def own_rows(x):
    """x (B,...) -> (B,): where this rank's rows stand in gather(x)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(x), device=x.device) + rank * len(x)


def of_all_ranks(x):
    """x (), one number on each rank -> (ranks,): all of them, in order, with gradient."""
    return gather(x.view(1))


# --- The model ------------------------------------------------------------------------------------


def pool(encoded, how):
    """Encoded image (B,1+K,D), CLS first -> (B,D)."""
    if how == "cls":
        return encoded[:, 0]
    if how == "max":
        return encoded[:, 1:].amax(dim=1)
    return encoded[:, 1:].mean(dim=1)


def simclr_head(width):
    """SLIP's head of three layers, with three changes: hidden layers of width 4 D instead of 4096,
    GELU instead of ReLU, and LayerNorm instead of SyncBatchNorm, which would couple the samples of
    a batch."""
    hidden = 4 * width
    layers = []
    for inputs in (width, hidden):
        layers += [nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 256))


class MAECLIP(nn.Module):
    """The five methods over one set of parts.

    A term of weight 0 is not computed, and a part that only such terms need is not built. The image
    encoder is always built. Weights are drawn by name, and masks are decided by the noise that is
    passed in. So what is not built changes neither the weights nor the masks of the rest: mae_clip
    with both reconstruction weights 0 is clip, on a CPU bit for bit.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        terms = config.weights()
        self.terms = terms  # {term: weight} of what is computed
        self.one_trunk = config.method == "m3ae" and "text" in terms  # without text it is mae
        self.has_decoder = "image" in terms or "text" in terms
        # The seed of all weights is drawn before any layer is made: making layers draws random
        # numbers too, and how many depends on the method.
        seed = torch.randint(2**31, (), device="cpu").item()
        self.image_encoder = ImageEncoder(config)
        if self.one_trunk:
            self.text_embed = TextEmbedding(config, config.width)
        elif "contrastive" in terms or "text" in terms:
            self.text_encoder = TextEncoder(config)
        if "contrastive" in terms:
            self.image_proj = nn.Linear(config.width, config.embed, bias=False)
            self.text_proj = nn.Linear(config.text_width, config.embed, bias=False)
            # CLIP's first temperature is 0.07; what is learned is the logarithm of its inverse.
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if self.has_decoder:
            self.decoder = Decoder(config)
        if "simclr" in terms:
            self.simclr_head = simclr_head(config.width)
        self.initialise(seed)

    def initialise(self, seed):
        """Draws weights much as MAE does, each by the seed and its own name: what two methods
        share starts equal."""
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            # CLS and mask tokens, the table of text tokens, learned positions.
            if name.endswith(("_token", "token.weight", "position")):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.ndim > 1:
                # flatten makes a matrix of the patch convolution too: a view, so this fills
                # the parameter itself.
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            # Norms' weights stay 1, and the logit scale stays as it was made.

    def image_feature(self, encoded):
        """Encoded image (B,1+K,D) -> (B,E) of unit norm, float32 or wider; (B,D), of unit norm too,
        where there is no projection."""
        feature = pool(encoded, self.config.pool)
        if "contrastive" in self.terms:
            feature = self.image_proj(feature)
        return unit_norm(feature)

    def encode_image(self, images):
        """images (B,3,H,W), nothing removed -> (B,E) of unit norm; (B,D) where no contrastive loss
        is trained, as in mae and m3ae."""
        return self.image_feature(self.image_encoder(images))

    def encode_text(self, tokens):
        """tokens (B,T), nothing removed -> (B,E) of unit norm, read at EOT; ValueError without
        contrastive loss."""
        if "contrastive" not in self.terms:
            raise ValueError(
                f"this {self.config.method} has no contrastive loss: it matches no texts"
            )
        at_end = take(self.text_encoder(tokens), caption_end(tokens)).squeeze(1)  # (B,D)
        return unit_norm(self.text_proj(at_end))

    def masked_pass(self, images, tokens, image_noise, text_noise):
        """Removes patches and tokens, encodes what is left, predicts the rest -> five things:
        image_masked, text_masked: Masked; None for a modality that is not reconstructed, which does
        not enter the decoder either: with image_weight 0 words are predicted from words alone;
        encoded_image: (B,1+K,D), or None; pass 1 may use it, too (see outputs);
        pixels, logits: as from Decoder."""
        image_masked = text_masked = encoded_image = encoded_text = None
        if "image" in self.terms:
            keep, mask = random_mask(image_noise, self.config.mask_ratio)
            image_masked = record_mask(keep, mask, None)
        if "text" in self.terms:
            keep, mask = random_text_mask(text_noise, tokens, self.config.text_mask_ratio)
            text_masked = record_mask(keep, mask, no_padding(tokens))
        if self.one_trunk:  # m3ae: image_masked is there, as Config refuses m3ae without it
            words = self.text_embed(tokens, text_masked.keep)
            both = self.image_encoder(
                images, image_masked.keep, words, no_padding(tokens, text_masked.keep)
            )
            encoded_image, encoded_text = both.tensor_split([1 + image_masked.keep.shape[1]], dim=1)
        else:
            if image_masked is not None:
                encoded_image = self.image_encoder(images, image_masked.keep)
            if text_masked is not None:
                encoded_text = self.text_encoder(tokens, text_masked.keep)
        predictions = self.decoder(image_masked, encoded_image, text_masked, encoded_text)
        return image_masked, text_masked, encoded_image, *predictions

    def outputs(self, images, tokens, image_noise, text_noise, *views):
        """{name: tensor with a row for each sample}: all that `losses` needs but the logit
        scale."""
        config = self.config
        images = normalise_images(images)  # once: the encoder leaves floats as they are
        image_masked = text_masked = None
        found = {}
        if self.has_decoder:
            image_masked, text_masked, encoded_image, pixels, logits = self.masked_pass(
                images, tokens, image_noise, text_noise
            )
        if image_masked is not None:
            patches = take(patchify(images, config.patch_size), image_masked.rest)  # (B,R,P*P*3)
            found["image_error"] = image_error(pixels, patches, config.norm_pix)  # (B,R)
            # (B,R), all True, since no patch is spare
            found["image_counted"] = image_masked.mask.gather(1, image_masked.rest)
        if text_masked is not None:
            found["text_error"] = text_error(logits, tokens.gather(1, text_masked.rest))  # (B,R)
            # (B,R), False at spare positions
            found["text_counted"] = text_masked.mask.gather(1, text_masked.rest)
        if "contrastive" in self.terms:
            ratio = config.contrastive_mask_ratio
            if ratio == 0:
                encoded = self.image_encoder(images)
            elif image_masked is not None and ratio == config.mask_ratio:
                # The same noise and ratio leave the same patches: pass 2 has encoded them already.
                encoded = encoded_image
            else:
                # By the same noise as pass 2: so the smaller set of kept patches lies in the
                # larger.
                keep, _ = random_mask(image_noise, ratio)
                encoded = self.image_encoder(images, keep)
            found["image_features"] = self.image_feature(encoded)  # (B,E)
            found["text_features"] = self.encode_text(tokens)
        if "simclr" in self.terms:
            encoded = self.image_encoder(torch.cat(views))  # (2B,1+N,D), the first views first
            projected = self.simclr_head(pool(encoded, config.pool))
            found["first_views"], found["second_views"] = projected.chunk(2)
        return found

    def losses(self, outputs):
        """What `outputs` gives -> {term: 0-d} of the unweighted terms, and `loss`, their weighted
        sum."""
        found = {}
        if "image_features" in outputs:
            found["contrastive"] = contrastive_loss(
                outputs["image_features"], outputs["text_features"], self.logit_scale.exp()
            )
        if "image_error" in outputs:
            found["image"] = masked_mean(outputs["image_error"], outputs["image_counted"])
        if "text_error" in outputs:
            found["text"] = masked_mean(outputs["text_error"], outputs["text_counted"])
        if "first_views" in outputs:
            found["simclr"] = simclr_loss(outputs["first_views"], outputs["second_views"])
        found["loss"] = sum(weight * found[term] for term, weight in self.terms.items())
        return found

    def forward(self, images, tokens, image_noise=None, text_noise=None, views=None):
        """images: (B,3,H,W) uint8 or normalised float;
        tokens: (B,T), whose values mae ignores;
        image_noise, text_noise: (B,N), (B,T), uniform: decide what is removed; None: drawn from
        torch's global generator;
        views: a pair of image batches, for slip
        -> {term: 0-d} of the unweighted terms that apply, and `loss`, their weighted sum."""
        noise = self.draw_noise(images, tokens, image_noise, text_noise)
        batch = [images, tokens, *noise, *(views or ())]
        if self.config.accumulate == 1:
            return self.losses(self.outputs(*batch))
        # The losses see the outputs of the whole batch, so the gradient is the whole batch's. What
        # lies between a piece and its outputs is not kept: it is computed again, piece by piece, in
        # the backward pass (GradCache), and comes out the same, as all noise is drawn above.
        chunks = [x.tensor_split(self.config.accumulate) for x in batch]
        found = []
        for piece in zip(*chunks, strict=True):
            found.append(checkpoint(self.outputs, *piece, use_reentrant=False))
        return self.losses({name: torch.cat([part[name] for part in found]) for name in found[0]})

    def draw_noise(self, images, tokens, image_noise, text_noise):
        """The noise that was given, drawn where it is None."""
        if image_noise is None:
            patches = self.config.side() ** 2
            image_noise = torch.rand(len(images), patches, device=images.device)
        if text_noise is None:
            text_noise = torch.rand(tokens.shape, device=images.device)
        return image_noise, text_noise

    @torch.no_grad()
    def reconstruct(self, images, tokens, image_noise=None, text_noise=None):
        """What the decoder makes of a masked pair (arguments as in forward) -> dict:

        `image` (B,N,P*P*3): in the loss's space (each patch normalised, with norm_pix), predicted
        where removed, true where visible; `image_mask` (B,N); `text` (B,T): predicted ids where
        removed, else the caption's; `text_mask` (B,T). ValueError where there is no decoder.
        """
        if not self.has_decoder:
            raise ValueError(
                f"this {self.config.method} has no reconstruction loss: it has no decoder"
            )
        noise = self.draw_noise(images, tokens, image_noise, text_noise)
        image_masked, text_masked, _, pixels, logits = self.masked_pass(images, tokens, *noise)
        patches = patchify(normalise_images(images), self.config.patch_size)
        patches = patch_targets(patches, self.config.norm_pix)
        found = {
            "image": patches,
            "image_mask": torch.zeros_like(patches[..., 0], dtype=torch.bool),
            "text": tokens,
            "text_mask": torch.zeros_like(tokens, dtype=torch.bool),
        }
        if image_masked is not None:
            index = image_masked.rest.unsqueeze(-1).expand_as(pixels)
            found["image"] = patches.scatter(1, index, pixels.to(patches.dtype))
            found["image_mask"] = image_masked.mask
        if text_masked is not None:
            # This writes guesses into spare positions, too; `where` puts the caption's back.
            guess = tokens.scatter(1, text_masked.rest, logits.argmax(dim=-1))
            found["text"] = guess.where(text_masked.mask, tokens)
            found["text_mask"] = text_masked.mask
        return found


# ==================================================================================================
# Training: what is trained and how, optimisers, checkpoints, data, the loop, the command line
# ==================================================================================================

import argparse
import inspect
import json
import re
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from tqdm import tqdm

from data import DataError, Loader, Tokenizer, one_line, simclr_view
from machine import (
    Interrupted,
    Parser,
    Signals,
    agree,
    announce,
    checkpoints,
    from_first,
    leave,
    load_whole,
    own_folder,
    pick_device,
    plain,
    process_group,
    ranks,
    save_whole,
    say_last,
    usable,
    write_record,
    write_whole,
)
from scenes import builtin

# The values that some settings may have.
CHOICES = {
    "method": METHODS,
    "pool": ["gap", "max", "cls"],
    "precision": ["auto", "fp32", "bf16"],
    "optimizer": ["muon", "adamw"],
}
# The least value allowed. Of a setting that is not listed it is 1 for an int, 0 for a float.
LOWEST = {"batch_size": 2, "crop": 0.01, "context": 3, "vocab_size": 259}
LOWEST |= dict.fromkeys("seed data_seed samples stop_after warmup workers eval_every".split(), 0)
SHARES = "mask_ratio text_mask_ratio contrastive_mask_ratio crop muon_momentum".split()


@dataclass(frozen=True)
class Config(ModelConfig):
    """Every setting of a run. A field's flag is its name (batch_size: --batch-size), its comment
    the flag's help."""

    out: str = "runs/mae_clip-small"  # folder of the run; by default runs/METHOD-SCALE
    resume: bool = False  # go on from the newest checkpoint in the run's folder, if it has one
    init: str = ""  # start from a run's weights, or from those of a timm ViT or of MAE (a file)
    seed: int = 0  # of initial weights, order, crops, captions and masks
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"  # fp32, bf16 or auto: bf16 on CUDA, and on a CPU if it is faster there
    compile: bool | None = None  # torch.compile of the blocks; by default on CUDA, above width 256
    log_every: int = 50  # steps between lines of the log
    save_every: int = 500  # steps between checkpoints
    data: str = ""  # shards (paths, folders, globs, {0..9}, pipe:), joined by ::; empty: scenes
    samples: int = 0  # train on only this many samples of the data; 0: on all
    resample: bool = False  # draw shards with replacement, without end, and read each through
    tokenizer: str = ""  # file that data.py tokenizer wrote; empty: --init's, or learned
    eval_data: str = ""  # sets to score, joined by :: (captioned shards, labelled folders)
    eval_every: int = 0  # steps between scores while training; 0: scores at the end alone
    scenes: int = 40_000  # built-in data: training images
    data_seed: int = 0  # built-in data: its seed, which also fixes the pairs never trained on
    workers: int = 1  # processes that decode ahead
    crop: float = 1.0  # least share of the area in a random crop, if it fits; 1: centre crop
    steps: int = 350  # optimiser steps
    stop_after: int = 0  # save and stop after so many steps in all; 0: at --steps
    batch_size: int = 256  # pairs a step, over all processes
    optimizer: str = "muon"  # of linear layers' matrices: muon or adamw; all else has adamw
    lr: float = 1e-2  # peak learning rate
    warmup: int = 50  # steps of linear warm-up before the cosine to zero
    muon_momentum: float = 0.9  # decay of Muon's running mean of gradients
    muon_rms: float = 0.3  # root mean square, nearly, of a step of Muon at learning rate 1
    weight_decay: float = 0.1  # of linear, convolution and embedding weights, by both optimisers

    def __post_init__(self):
        """ValueError, of one line that names what does not fit."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            given = f"{flag(setting.name)} {value}"
            if setting.name in CHOICES and value not in CHOICES[setting.name]:
                raise ValueError(f"{given}: must be one of {', '.join(CHOICES[setting.name])}")
            if setting.type in (int, float):
                low = LOWEST.get(setting.name, 1 if setting.type is int else 0)
                if not low <= value < math.inf:
                    raise ValueError(f"{given}: must be a finite number, at least {low:g}")
                if setting.name in SHARES and value > 1:
                    raise ValueError(f"{given}: must be at most 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"--patch-size {self.patch_size}: must divide {self.image_size} pixels"
            )
        for tower in ("", "text_", "decoder_"):
            name = tower + "width"
            width = getattr(self, name)
            heads = getattr(self, tower + "heads")
            if width % heads or width % 4:
                raise ValueError(f"{flag(name)} {width}: must be a multiple of 4 and {heads} heads")
        terms = set(self.weights())
        patches = self.side() ** 2
        if max(1, kept_count(patches, self.mask_ratio)) == patches:
            terms.discard("image")  # no patch is removed, so none is predicted
        if terms <= {"text"}:  # nothing, or text alone, as in an m3ae without image loss
            raise ValueError(
                f"--method {self.method}: nothing would be learned of images: their terms have "
                f"weight 0, or --mask-ratio {self.mask_ratio} removes none of {patches} patches "
                f"(at --patch-size {self.patch_size})"
            )


# What each scale sets; all else has the defaults above.
TABLE = """
                     tiny    small     base    large
    image_size         32       32      224      224
    patch_size          8        8       16       16
    width              64       96      768     1024
    depth               2        3       12       24
    heads               2        3       12       16
    text_width         64       96      512      768
    text_depth          1        1       12       12
    text_heads          2        3        8       12
    context            16       16       77       77
    embed              64       64      512      768
    vocab_size        512      512    32768    32768
    decoder_width      32       64      512      512
    decoder_depth       1        1        8        8
    decoder_heads       1        2       16       16
    scenes           2000    40000    40000    40000
    batch_size         64      256     4096     4096
    steps              60      350    90000    90000
    warmup             10       50     2000     2000
    lr               1e-2     1e-2     1e-3     5e-4
    image_weight      0.3      0.3      0.1      0.1
    text_weight      0.15     0.15     0.05     0.05
    optimizer        muon     muon    adamw    adamw
    crop              1.0      1.0      0.5      0.5
    log_every          10       50       50       50
    workers             1        1        8        8
"""


def read_table(text):
    """A table of settings -> {name of a column: {field: value, of the field's type}}."""
    columns, *rows = [line.split() for line in text.strip().splitlines()]
    table = {column: {} for column in columns}
    for field, *values in rows:
        kind = type(getattr(Config, field))
        for column, value in zip(columns, values, strict=True):
            table[column][field] = kind(value)
    return table


SCALES = read_table(TABLE)


def flag(name):
    """A field's flag on the command line."""
    return "--" + name.replace("_", "-")


def preset(scale, **overrides):
    """preset("base", method="clip", lr=1e-4) -> Config; ValueError for what does not fit."""
    if scale not in SCALES:
        raise ValueError(f"--scale {scale}: must be one of {', '.join(SCALES)}")
    out = f"runs/{overrides.get('method', Config.method)}-{scale}"
    return Config(**({"out": out} | SCALES[scale] | overrides))


# --- Optimisers -----------------------------------------------------------------------------------


def learning_rate(step, config):
    """Linear warm-up to config.lr, then half a cosine down to 0 at config.steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


class Muon(torch.optim.Optimizer):
    """Moves matrices along their orthogonalised momentum (Jordan et al. 2024), by steps whose
    entries have a root mean square of about lr * rms; those of AdamW's have about lr * 0.2.

    torch.optim.Muon computes in bfloat16, which CPUs without AVX512-BF16 or AMX emulate. On such a
    CPU torch's took two seconds for a step at `small`, and this one, in float32, 0.03 to 0.6."""

    @torch.no_grad()
    def step(self):
        """One step with the gradients that the parameters hold."""
        group = self.param_groups[0]
        beta = group["momentum"]
        for parameter in group["params"]:
            gradient = parameter.grad
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - beta)  # beta momentum + (1 - beta) gradient
            # Nesterov's look ahead: the same mean once more, of what momentum is now.
            direction = orthogonalise(gradient.lerp(momentum, beta))
            # The entries of `direction` have a root mean square of about 1 / sqrt(longer side).
            # `size` makes it `rms`.
            size = group["rms"] * max(parameter.shape) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(direction, alpha=group["lr"] * size)


def orthogonalise(x):
    """x (rows, columns) -> x with its singular values replaced by ones, nearly: five steps of a
    quintic Newton-Schulz iteration with Muon's coefficients."""
    if len(x) > x.shape[1]:
        return orthogonalise(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):  # x becomes 3.4445 x + (-4.7750 S + 2.0315 S S) x, where S = x x^T
        square = x @ x.T
        factor = square.addmm(square, square, beta=-4.7750, alpha=2.0315)
        x = x.addmm(factor, x, beta=3.4445)
    return x


def make_optimizers(model, config):
    """-> [AdamW] or [AdamW, Muon]. Muon has the matrices of linear layers, AdamW all else. Weights
    of linear, convolution and embedding layers decay, all else does not."""
    matrices, others, no_decay = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or not name.endswith("weight"):
            no_decay.append(parameter)  # biases, norms, CLS, mask tokens, positions, logit scale
        elif parameter.ndim == 2 and "token" not in name and config.optimizer == "muon":
            matrices.append(parameter)  # of linear layers; `token` is the table of embeddings
        else:
            others.append(parameter)
    groups = [{"params": others}, {"params": no_decay, "weight_decay": 0.0}]
    rates = {"lr": config.lr, "weight_decay": config.weight_decay}
    # CLIP's betas and epsilon.
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True, **rates)]
    if matrices:
        optimizers.append(
            Muon(matrices, rates | {"momentum": config.muon_momentum, "rms": config.muon_rms})
        )
    return optimizers


def train_step(net, optimizers, autocast, batch):
    """One step -> one tensor, on the device, of the terms, the loss and the gradient's norm; None
    for a step that was not finite, which changed nothing."""
    with autocast:
        terms = net(*batch)
    terms["loss"].backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    row = torch.stack([*terms.values(), norm]).detach()
    finite = row.isfinite().all().item()  # waits for the device, without measurable cost at `base`
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return row if finite else None


def compile_blocks(model, config, device):
    """Compiles the model's blocks where --compile says so; by default on CUDA, if it is large."""
    if config.compile or (config.compile is None and device.type == "cuda" and config.width > 256):
        # A whole graph may take minutes to compile; blocks of one shape share theirs.
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)


# --- Checkpoints ----------------------------------------------------------------------------------

# The settings that may differ between a run and its continuation with --resume. All others must be
# the same; --steps may grow once a run has come to its last step. --data may be another path to the
# same samples: open_data compares these. The tokenizer, and so vocab_size, is the checkpoint's.
MAY_CHANGE = """
    out resume init device precision compile log_every save_every data eval_data eval_every workers
    stop_after tokenizer vocab_size accumulate
""".split()


# What a checkpoint holds.
SAVED = "model optimizers step seconds logged config data position merges".split()

# What may differ between the ranks of a run.
RANKS_OWN = "out resume init device data eval_data tokenizer vocab_size workers".split()


@dataclass
class Run:
    """What trains. A checkpoint holds its state."""

    config: Config
    model: MAECLIP
    optimizers: list
    loader: Loader
    step: int = 0
    seconds: float = 0.0  # of training, in all sittings; added up at each line of the log
    position: int = 0  # of a stream: the shard at which it goes on, the largest of all ranks
    logged: str = ""  # what log.jsonl holds of the steps so far


def save_checkpoint(run):
    """Writes all that a run goes on from, whole or not at all, and keeps the last two."""
    out = Path(run.config.out)
    state = {
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "step": run.step,
        "seconds": run.seconds,
        "logged": run.logged,
        "config": plain(run.config),
        "data": run.loader.identity,
        "position": run.position,
        "merges": run.loader.tokenizer and run.loader.tokenizer.merges,
    }
    save_whole(state, out / f"checkpoint-{run.step}.pt")
    for old in checkpoints(out)[2:]:
        old.unlink()


def read_checkpoint(path):
    """What save_checkpoint wrote, its config as Config; DataError where that cannot be."""
    with usable(path):
        state = load_whole(path)
        return state | {"config": Config(**state["config"])}


def load(path, device="cpu"):
    """path of a checkpoint, or of a run's folder, which stands for its newest -> the model in eval
    mode, its tokenizer (None for mae) and its Config."""
    newest, *_ = checkpoints(path) or [path]  # the first of a folder's; or the file itself
    state = read_checkpoint(newest)
    with usable(newest):
        model = MAECLIP(state["config"])
        model.load_state_dict(state["model"])
        tokenizer = None if state["merges"] is None else Tokenizer(state["merges"])
    return model.to(device).eval(), tokenizer, state["config"]


def open_run(config):
    """-> the state of the newest checkpoint in the run's folder, None where it has none.

    DataError where the folder holds a run and --resume was not given, or where a setting is not the
    run's. MAY_CHANGE lists those that may be others; --steps may be more where the run has come to
    its last step."""
    out = Path(config.out)
    saved = checkpoints(out)
    if not config.resume and (saved or (out / "config.json").exists()):
        raise DataError(f"{out}: holds a run; add --resume to go on, or give another --out")
    if not saved:
        if config.resume:
            print(f"{out}: holds no checkpoint, so this run starts at step 0")
        return None
    state = read_checkpoint(saved[0])
    with usable(saved[0]):  # a missing entry is a KeyError in here
        state = {name: state[name] for name in SAVED}
    then = plain(state["config"])
    # A run that came to its last step may go on to a later one.
    longer = state["step"] == then["steps"] < config.steps
    free = [*MAY_CHANGE, "steps"] if longer else MAY_CHANGE
    flags = [
        f"{flag(name)} {then[name]}"
        for name in then
        if name not in free and then[name] != getattr(config, name)
    ]
    if flags:
        raise DataError(f"{out}: was trained with {' '.join(flags)}; give that, or another --out")
    if longer:
        print(
            f"trained for {state['step']:,} steps, and now for more: the learning rate rises to "
            f"where it would be had --steps been {config.steps:,}"
        )
    return state


# --- Data -----------------------------------------------------------------------------------------


def open_data(config, state, merges=None):
    """state: what open_run found; merges: those of the tokenizer that --init brings
    -> the training Loader with its tokenizer;
    the config. Its vocab_size is now the tokenizer's. Without --data its data are the built-in
    scenes, and so are its eval_data unless they are given."""
    rank, world = ranks()
    if config.batch_size % world:
        raise DataError(
            f"--batch-size {config.batch_size}: must be a multiple of {world} processes"
        )
    if not config.data:
        scenes = builtin(config.scenes, config.data_seed)
        config = replace(config, data=scenes, eval_data=config.eval_data or scenes)
    loader = Loader(
        config.data,
        config.batch_size // world,
        config.image_size,
        None,  # the tokenizer may have to be learned from the data
        config.context,
        config.seed,
        rank,
        world,
        config.workers,
        config.crop,
        captions=config.method != "mae",
        resample=config.resample,
        samples=config.samples,
    )
    if state:
        if loader.identity != state["data"]:
            raise DataError(f"--data: not the samples that {config.out} was trained on")
        loader.position = state["position"]
        merges = state["merges"]
    if config.method != "mae":
        # The checkpoint's tokenizer, else --tokenizer, else that of --init, else a learned one.
        if config.tokenizer and not state:
            loader.tokenizer = Tokenizer.load(config.tokenizer)
        elif merges is not None:
            loader.tokenizer = Tokenizer(merges)
        else:
            loader.tokenizer = from_first(Tokenizer.train, loader.texts(), config.vocab_size)
        config = replace(config, vocab_size=loader.tokenizer.vocab_size)
    return loader, config


def training_batch(config, step, batch, device):
    """What the model takes at a step, on the device: images, tokens, the masks' noise, slip's
    views. Noise depends on the seed, the step and the shapes alone: it is drawn for the pairs of
    all ranks, and each takes its own."""
    rank, world = ranks()
    B, T = batch.tokens.shape
    sizes = [config.side() ** 2, T, 12, 12]  # the last two for slip's views
    # All of it is drawn for every method, so that methods have the same masks.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {step}".encode()))
    noise = torch.rand(world * B, sum(sizes), generator=generator).chunk(world)[rank]
    images, tokens, noise = [
        x.to(device, non_blocking=True) for x in (batch.images, batch.tokens, noise)
    ]
    image_noise, text_noise, *view_noise = noise.split(sizes, dim=1)
    views = None
    if "simclr" in config.weights():
        views = [simclr_view(images, part) for part in view_noise]
    return images, tokens, image_noise, text_noise, views


# --- The loop -------------------------------------------------------------------------------------


def log(run, rows, seconds, waited):
    """Writes and shows a record of the last steps: rates, and means of `rows`, which are what
    train_step gave at each step -> the terms in words.

    Where no step was finite, nothing is written, a warning is shown -> "", and the caller keeps the
    rows for the next record."""
    config = run.config
    first = ranks()[0] == 0
    good = [row for row in rows if row is not None]
    if not good:
        if first:
            tqdm.write(f"step {run.step:,}: the last {len(rows)} changed nothing: not finite")
        return ""
    means = torch.stack(good).mean(dim=0).tolist()
    record = {
        "step": run.step,
        "epoch": run.loader.epochs(run.step),
        "pairs": run.step * config.batch_size,
        # In train_step's order: what MAECLIP.losses gives, in the order of METHODS, then the norm.
        **dict(zip([*config.weights(), "loss", "grad_norm"], means, strict=True)),
        "lr": learning_rate(run.step - 1, config),
        "skipped": len(rows) - len(good),
        "pairs_per_second": len(rows) * config.batch_size / seconds,
        "waiting": waited / seconds,
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if "contrastive" in record:
        record["scale"] = run.model.logit_scale.exp().item()
    write_record(run, record)
    terms = " ".join(f"{name} {record[name]:.3f}" for name in config.weights())
    if first:
        tqdm.write(
            f"step {run.step:,} {terms} {record['pairs_per_second']:.0f} pairs/s "
            f"{record['waiting']:.0%} waiting"
        )
    if "contrastive" in record:
        terms += f", chance {math.log(config.batch_size):.3f}"
    return terms


def fit(run, net, device, autocast):
    """Trains to --steps or --stop-after -> the number of the signal that stopped it before, or
    0."""
    from validation import validation  # here, since that file builds on this one

    config = run.config
    rank, _ = ranks()
    last = min(config.steps, config.stop_after or config.steps)
    # A stream goes on at a shard, local shards at a step.
    start = run.loader.position if run.loader.stream else run.step
    batches = run.loader.batches(start)
    since, waited, rows, stopped = time.time(), 0.0, [], 0
    # How many steps were lost, that is, not finite, since the last finite one. Bad weights may be
    # the reason; so while there are any, nothing is saved on the way and no stop is agreed on.
    lost = 0
    # False while a step is made: what ends the run then must not save half of it.
    whole = True
    # disable=None hides the bar where stderr is no terminal.
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        bar_format="{percentage:.0f}%, {remaining} left{postfix}",
        disable=rank > 0 or None,
    )
    with Signals() as signals, bar:
        try:
            while run.step < last:
                fetching = time.time()
                with signals.interruptible():
                    batch = next(batches)
                waited += time.time() - fetching
                # Before each step every rank learns two things of all ranks: the largest number of
                # a signal, so that all stop at the same step, and the largest position in a stream.
                # Where a signal ended this rank's workers, too, there is no new batch.
                own = torch.tensor([[signals.came, run.loader.position]], device=device)
                came, run.position = gather(own).amax(dim=0).tolist()
                if came and not lost:
                    stopped = came
                    break
                for optimizer in run.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(run.step, config)
                batch = training_batch(config, run.step, batch, device)
                whole = False
                rows.append(train_step(net, run.optimizers, autocast, batch))
                lost = lost + 1 if rows[-1] is None else 0
                if "contrastive" in config.weights():
                    run.model.logit_scale.data.clamp_(0, math.log(100))  # 1 to 100
                run.step += 1
                whole = True
                bar.update()
                if run.step % config.log_every == 0 or run.step == last:
                    seconds = time.time() - since
                    terms = log(run, rows, seconds, waited)
                    if terms:
                        bar.set_postfix_str(terms)
                        run.seconds += seconds
                        since, waited, rows = time.time(), 0.0, []
                if config.eval_every and run.step % config.eval_every == 0:
                    began = time.time()
                    with signals.heeded():
                        found = validation(run, device, autocast)
                    write_record(run, {"step": run.step, "validation": found})
                    since += time.time() - began  # training has not gone on meanwhile
                # Give up after ten lost steps in a row, or after two at the very end.
                if lost == 10 or (lost > 1 and run.step == last):
                    raise DataError(
                        f"step {run.step}: none of the last {lost} was finite (loss and gradient); "
                        "begin anew, with lower --lr and another --out"
                    )
                # At the last step `finally` saves.
                due = run.step % config.save_every == 0 and run.step < last
                if rank == 0 and due and not lost:
                    save_checkpoint(run)
        except Interrupted:
            stopped = signals.came
        finally:
            # Save, whatever ended the loop, except in the middle of a step or after two lost ones.
            if rank == 0 and whole and lost < 2:
                save_checkpoint(run)
    return stopped


def train(config):
    """One run, from its first step or its newest checkpoint to its results -> the exit code."""
    device, autocast = pick_device(config)
    with own_folder(config.out):
        stopped = train_in_folder(config, device, autocast)
    return 128 + stopped if stopped else 0


def train_in_folder(config, device, autocast):
    """What train does once the run's folder is locked -> the number of the signal that stopped it,
    or 0."""
    # Here, since they build on this file.
    from eval import check_sets
    from weights import read_weights, start_from

    rank, world = ranks()
    state = from_first(open_run, config)
    start = {} if state else read_weights(config.init)
    loader, config = open_data(config, state, start.get("merges"))
    # So that a set that is missing or does not fit ends the run now, not after the training.
    check_sets(config.eval_data, config.method, config.eval_every > 0)
    settings = {flag(name): value for name, value in plain(config).items() if name not in RANKS_OWN}
    merges = loader.tokenizer and loader.tokenizer.merges
    agree(settings | {"data": loader.identity, "tokenizer": merges, "bf16": autocast._enabled})
    torch.manual_seed(config.seed)
    model = MAECLIP(config).to(device)
    run = Run(config, model, make_optimizers(model, config), loader)
    if state:
        with usable(Path(config.out, f"checkpoint-{state['step']}.pt")):
            model.load_state_dict(state["model"])
            for optimizer, values in zip(run.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
        for name in "step seconds position logged".split():
            setattr(run, name, state[name])
    elif start:
        taken = start_from(model, start, merges)
        if rank == 0:
            print(taken)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    compile_blocks(model, config, device)
    if rank == 0:
        out = Path(config.out)
        write_whole(out / "config.json", json.dumps(plain(config), indent=1))
        # Lines of steps after the checkpoint are dropped: these steps come again.
        write_whole(out / "log.jsonl", run.logged)
        announce(run, device, autocast, learning_rate(run.step, config))
    stopped = fit(run, net, device, autocast)
    from_first(finish, run)
    return stopped


def finish(run):
    """Scores a run that has come to its last step, or says how it goes on."""
    from eval import score_run

    config = run.config
    print(run.loader.report())
    if run.step < config.steps:
        saved = checkpoints(config.out)
        newest = saved[0].name if saved else "nothing"
        print(f"stopped at step {run.step:,}, saved: {newest}; --resume goes on")
        return
    print(f"trained and saved in {config.out}; now scoring (if interrupted, --resume does it)")
    record = {"seconds": run.seconds, "steps": run.step, "config": plain(config)}
    score_run(run.model, run.loader.tokenizer, config.eval_data, config.out, record)


# --- The command line -----------------------------------------------------------------------------


def parse(argv=None):
    """The command line as a Config: the scale's preset, overridden by the flags that were given."""
    parser = Parser(
        "mae_clip.py",
        usage="python mae_clip.py [--scale SCALE] [--FLAG VALUE ...]",
        description="Trains CLIP, MAE, M3AE, MAE-CLIP or SLIP and scores what came out.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--scale", default="small", help="tiny, small, base or large (small)")
    for kind in (ModelConfig, Config):
        group = parser.add_argument_group(f"{kind.__name__} (in brackets the defaults of small)")
        # A field stands on one line of the class; the comment after it is its flag's help.
        for name, text in re.findall(r"(?m)^    (\w+): .*?  # (.*)$", inspect.getsource(kind)):
            setting = Config.__dataclass_fields__[name]
            options = {"type": setting.type}
            if setting.type in (bool, bool | None):
                options = {"action": argparse.BooleanOptionalAction}
            group.add_argument(flag(name), help=f"{text} ({setting.default})", **options)
    given = vars(parser.parse_args(argv))
    return preset(given.pop("scale"), **given)


def main(argv=None):
    """Runs the command line: exit code 0 when done, 2 where what was given (or a file) does not
    work, 128 + n when signal n ended it."""
    try:
        # The group is joined first: if a process failed before, even in parse, others would wait.
        with process_group():
            code = train(parse(argv))
        sys.exit(code)
    except KeyboardInterrupt:
        leave(130)
    except (OSError, ValueError) as error:
        say_last(f"mae_clip.py: error: {one_line(error)}")
        leave(2)


if __name__ == "__main__":
    # Run as a script, this file is the module __main__, while eval.py imports it as mae_clip. So
    # main is taken from there: else there would be two classes Config, two MAECLIP and so on, and
    # an object of one is none of the other.
    from mae_clip import main

    sys.stdout.reconfigure(line_buffering=True)  # a file, too, gets each line at once
    main()
