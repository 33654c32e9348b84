"""Our training step beside transformers': mae_clip against CLIPModel plus ViTMAEForPreTraining.

    pip install transformers
    python .ci/peers.py --scale base --batch-size 4 --context 32 --rounds 8
    python .ci/peers.py --scale base --batch-size 4 --context 32 --contrastive-mask-ratio 0.75

The same shapes, the same autocast, AdamW for all, in one process, alternating; ours without text
reconstruction, which theirs lacks. Prints the median of our time over theirs and its range, below 1
where ours is faster. All flags of mae_clip.py apply; those that name neither shapes nor precision
change nothing here.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, ViTMAEConfig, ViTMAEForPreTraining

sys.path.insert(0, str(Path(__file__).parent.parent))
import mae_clip
from data import Batch, Tokenizer
from eval import timed


def tower(width, depth, heads):
    """transformers' names for the sizes of a transformer."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": "gelu",
    }


def peers(config):
    """-> CLIPModel and ViTMAEForPreTraining of a Config's sizes."""
    vision = tower(config.width, config.depth, config.heads)
    vision |= {"image_size": config.image_size, "patch_size": config.patch_size}
    text = tower(config.text_width, config.text_depth, config.text_heads)
    text |= {"vocab_size": config.vocab_size, "max_position_embeddings": config.context}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed)
    mae = ViTMAEConfig(
        **vision,
        decoder_hidden_size=config.decoder_width,
        decoder_intermediate_size=4 * config.decoder_width,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_heads,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix,
    )
    return (
        CLIPModel._from_config(clip, attn_implementation="sdpa"),
        ViTMAEForPreTraining._from_config(mae, attn_implementation="sdpa"),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="of one step each (default: 8)")
    args, flags = parser.parse_known_args()
    flags += ["--method", "mae_clip", "--text-weight", "0", "--optimizer", "adamw"]
    config = mae_clip.parse(flags)
    device, autocast = mae_clip.pick_device(config)
    model = mae_clip.MAECLIP(config).to(device)
    mae_clip.compile_blocks(model, config, device)
    optimizers = mae_clip.make_optimizers(model, config)
    B = config.batch_size
    images = torch.randint(256, (B, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tokens = Tokenizer([]).batch(["a photo of a dog on the grass"] * B, config.context)
    batch = mae_clip.training_batch(config, 0, Batch(images, tokens, ()), device)
    pixels = mae_clip.normalise_images(batch[0])
    theirs = []
    for peer in peers(config):
        peer = peer.to(device)
        theirs.append((peer, torch.optim.AdamW(peer.parameters(), 1e-5, fused=True)))

    def our_step():
        mae_clip.train_step(model, optimizers, autocast, batch)

    def their_steps():
        for peer, optimizer in theirs:
            with autocast:
                if isinstance(peer, CLIPModel):
                    loss = peer(input_ids=batch[1], pixel_values=pixels, return_loss=True).loss
                else:
                    loss = peer(pixel_values=pixels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):  # warm
        our_step()
        their_steps()
    ours, sums, ratios = [], [], []
    for _ in range(args.rounds):
        ours.append(timed(our_step, 1, device))
        sums.append(timed(their_steps, 1, device))
        ratios.append(ours[-1] / sums[-1])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{device}, {'bf16' if autocast._enabled else 'fp32'}, {versions}, batch {B}")
    print(f"ours {median(ours):.4f} s, theirs {median(sums):.4f} s a step")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {args.rounds} rounds"
    print(f"ours over theirs {median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
