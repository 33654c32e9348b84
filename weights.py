"""Weights in and out: what a run may start from (--init), and the image tower for timm.

Files that can be read: this project's checkpoints and runs, of any method; a timm ViT's weights;
the official MAE's (facebookresearch/mae). Names are timm's in all three, so what fits by name and
shape is taken, and all else is said.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import mae_clip
from data import DataError
from machine import save_whole, write_whole

TOWER = "image_encoder."
WANTED = "give a run's folder, a checkpoint, or a file of weights (.pth, .pt, .safetensors)"
# What belongs to the words of one tokenizer.
VOCABULARY = ("token.weight", "decoder.text.head.weight", "decoder.text.head.bias")


def read_weights(path):
    """A run's folder, a checkpoint, or a file of another project's (.pth, .pt, .bin, .safetensors)
    -> {path; model: {name: tensor}, names as in MAECLIP; merges: its tokenizer's, or None; config:
    of our checkpoints}, empty where no path is given; DataError where it cannot be read."""
    if not path:
        return {}
    path = [*mae_clip.checkpoints(path), Path(path)][0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            # MAE's training checkpoints hold their command line, which is harmless.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise DataError(f"--init {path}: needs the package safetensors (pip install it)") from None
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(
            f"--init {path}: cannot be read as weights ({type(error).__name__}); {WANTED}"
        ) from None
    tensors = found
    for wrapper in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            tensors = found[wrapper]
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(x) for name, x in tensors.items()
    ):
        raise DataError(f"--init {path}: holds no weights, which are tensors by name; {WANTED}")
    ours = any(name.startswith(TOWER) for name in tensors)
    if not ours:  # timm's and MAE's image towers have no prefix of their own
        tensors = {TOWER + name.removeprefix("module."): x for name, x in tensors.items()}
    merges = found.get("merges") if ours else None
    return {"path": path, "model": tensors, "merges": merges, "config": found.get("config")}


def resize_positions(positions, count):
    """Positions (1,M,D) of a square grid of patches, with a row for CLS before them or without
    -> (1,1+count,D) of another square grid, bicubic; None where M is neither."""
    if positions.ndim != 3:
        return None
    patches = positions.shape[1]
    side = int(patches**0.5)
    cls = positions[:, : patches - side**2]
    if cls.shape[1] > 1:
        return None
    if cls.shape[1] == 0:
        cls = torch.zeros_like(positions[:, :1])  # timm's no_embed_class
    grid = positions[:, patches - side**2 :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    wanted = int(count**0.5)
    if wanted != side:
        grid = F.interpolate(grid.float(), (wanted, wanted), mode="bicubic", antialias=True)
    return torch.cat([cls, grid.flatten(2).mT], dim=1)


def start_from(model, weights, merges=None):
    """Copies into the model what read_weights found and what fits; merges: the model's tokenizer's
    -> what was taken, resized, left and begun anew, in words; DataError where nothing fits."""
    own = model.state_dict()
    config = weights["config"] or {}
    for name in ("heads", "text_heads"):  # which show in no shape
        heads = config.get(name, getattr(model.config, name))
        if heads != getattr(model.config, name):
            raise DataError(f"--init {weights['path']}: has {mae_clip.flag(name)} {heads}; give it")
    taken = []
    left = []
    resized = ""
    for name, tensor in weights["model"].items():
        foreign = name.endswith(VOCABULARY) and weights["merges"] != merges
        if name == f"{TOWER}pos_embed" and tensor.shape != own[name].shape:
            before = tuple(tensor.shape)
            tensor = resize_positions(tensor, own[name].shape[1] - 1)
            if tensor is not None and tensor.shape == own[name].shape:
                resized = f"; resized: pos_embed, from {before} to {tuple(tensor.shape)}"
        if name in own and not foreign and tensor is not None and tensor.shape == own[name].shape:
            own[name].copy_(tensor)  # a view of the model's own memory
            taken.append(name)
        else:
            left.append(name if name in own else name.removeprefix(TOWER))
    path = weights["path"]
    if not taken:
        some = ", ".join(left[:3])
        raise DataError(
            f"--init {path}: nothing in it has a name and shape of this model's; it has {some} ..."
        )
    anew = [name for name in own if name not in taken]
    return (
        f"init        {path}: taken {groups(taken)}{resized}; left {groups(left)}; "
        f"begun anew {groups(anew)}"
    )


def groups(names):
    """Names of tensors in words: the part that each belongs to, and of how many."""
    parts = Counter()
    for name in names:
        parts[name.split(".")[0].split("_blocks")[0]] += 1
    return ", ".join(f"{part} ({count})" for part, count in parts.items()) or "nothing"


def export_tower(checkpoint, path):
    """Writes the image tower of a checkpoint under timm's names, as .safetensors where the file is
    called so, else with torch.save -> the lines of Python that load it into timm. No file is
    overwritten: it might be a checkpoint."""
    if Path(path).exists():
        raise DataError(f"{path}: exists already; give a new file")
    model, _, config = mae_clip.load(checkpoint)
    tower = {name: x.contiguous() for name, x in model.image_encoder.state_dict().items()}
    read = f"torch.load({str(path)!r})"
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise DataError(f"{path}: needs the package safetensors (pip install it)") from None
        write_whole(path, save(tower))
        read = f"safetensors.torch.load_file({str(path)!r})"
    else:
        save_whole(tower, Path(path))
    pool = {"gap": "avg", "max": "max", "cls": "token"}[config.pool]
    return (
        f"import timm, {read.split('.load')[0]}\n"
        f"tower = timm.models.VisionTransformer(img_size={config.image_size}, "
        f"patch_size={config.patch_size}, embed_dim={config.width}, depth={config.depth},\n"
        f'    num_heads={config.heads}, num_classes=0, global_pool="{pool}", fc_norm=False)\n'
        f"tower.load_state_dict({read})"
    )
