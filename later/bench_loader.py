"""Pairs/s of data.py's Loader beside open_clip's own pipeline (webdataset and its transforms), from the same 256-pixel
JPEG shards, with the same number of worker processes and the same filter; alternating repeats, ratios with spread.

    python bench_loader.py SHARDS_FOLDER DATA_PY_FOLDER [size workers repeats seconds]
"""
import glob, io, os, sys, tarfile, time
from types import SimpleNamespace

folder, code = sys.argv[1:3]
size, workers, repeats, batches = (int(x) for x in (sys.argv[3:] + ["112", "2", "5", "16"][len(sys.argv) - 3 :]))
sys.path.insert(0, code)
B = 128

def make_shards():
    from PIL import Image
    os.makedirs(folder)
    for path in sorted(glob.glob("8k/train-*.tar")):
        with tarfile.open(path) as old, tarfile.open(f"{folder}/{os.path.basename(path)}", "w") as new:
            for m in old:
                content = old.extractfile(m).read()
                if m.name.endswith(".jpg"):
                    out = io.BytesIO()
                    Image.open(io.BytesIO(content)).resize((256, 256), 3).save(out, "JPEG", quality=90)
                    content = out.getvalue()
                else:
                    content = content.splitlines()[0]
                info = tarfile.TarInfo(m.name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))

def count(batches_of, n):
    iterator = iter(batches_of)
    for _ in range(4):  # workers start and fill their buffers
        next(iterator)
    began, pairs = time.perf_counter(), 0
    for _ in range(n):
        pairs += len(next(iterator)[0])
    return pairs / (time.perf_counter() - began)

def ours():
    import data
    loader = data.Loader(f"{folder}/*.tar", B, size, tokenizer, 77, workers=workers, crop=0.9)
    return loader.batches(0)

def theirs():
    import open_clip
    from open_clip_train.data import get_wds_dataset
    preprocess, *_ = open_clip.image_transform(size, is_train=True, mean=None, std=None), None
    args = SimpleNamespace(train_data=f"{folder}/train-{{00000..00005}}.tar", train_data_upsampling_factors=None,
                           train_num_samples=6000, val_data=None, dataset_resampled=False, seed=0, workers=workers,
                           batch_size=B, world_size=1, distributed=False)
    info = get_wds_dataset(args, preprocess, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    def endless():
        epoch = 0
        while True:
            info.set_epoch(epoch)
            yield from info.dataloader
            epoch += 1
    return endless()

if __name__ == "__main__":
    if not os.path.isdir(folder):
        make_shards()
    import torch, data
    torch.set_num_threads(1)
    tokenizer = data.Tokenizer.train((t for _, _, ts in data.captioned(f"{folder}/*.tar") for t in ts), 16384)
    ratios = []
    for _ in range(repeats):
        a, b = count(ours(), batches), count(theirs(), batches)
        ratios.append(a / b)
        print(f"size {size} workers {workers}: ours {a:.0f}  open_clip {b:.0f}  ratio {a / b:.2f}", flush=True)
    ratios.sort()
    print(f"size {size}: median ratio {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), n={repeats}")
