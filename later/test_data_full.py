# --- Data: shards, loader, tokenizer, pack, inspect ----------------------------------------------------------


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
    return [tar_of(folder / f"{shard}.tar", [(f"{n:03d}.{field}", content) for n in (next(numbers) for _ in range(size))
                                             for field, content in (("jpg", picture(seed=n)), ("txt", b"number %d" % n))])
            for shard, size in enumerate(sizes)]


def loader_of(shards, batch=2, **options):
    return data.Loader(shards, batch, 8, data.Tokenizer([]), 16, **options)


def test_a_source_names_shards_by_paths_globs_and_numbers(tmp_path):
    shards = shards_of(tmp_path / "a", [1] * 12)
    assert data.expand(f"{tmp_path}/a/{{9..11}}.tar::{tmp_path}/a/1?.tar") == shards[9:12] + shards[10:12]
    assert data.expand("pipe:cat x{08..10}.tar") == [f"pipe:cat x{n}.tar" for n in ("08", "09", "10")]
    for wrong in (f"{tmp_path}/b-*.tar", f"{tmp_path}/a/{{11..12}}.tar", ""):
        with pytest.raises(data.DataError, match="no such shard"):
            data.expand(wrong)


ODD = [("a/b.c/x.y/one.JPG", picture()), ("a/b.c/x.y/one.seg.png", b"png"), ("folder", None), ("link.jpg", "one"),
       ("__meta__/x.txt", b"skipped"), ("n" * 180 + ".jpg", picture()), ("n" * 180 + ".txt", b""), ("no_suffix", b"x"),
       ("deep/" * 60 + "k.txt", b"\xff\xfe broken"), ("p\u00e4.txt", b"umlaut"), (".hidden", b"h"), ("q/.hidden", b"h")]


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
    epochs = [[(each.keys[0], each.images[0].tolist(), each.tokens[0].tolist()) for each in whole.epoch(n)] for n in (0, 1)]
    assert sorted(key for key, *_ in epochs[0]) == [f"{n:03d}" for n in range(sum(sizes))]
    assert [key for key, *_ in epochs[0]] != [key for key, *_ in epochs[1]] or sum(sizes) < 4
    for rank in range(world):
        part = loader_of(shards, batch, seed=seed, rank=rank, world=world, workers=seed % 3)
        assert len(part) == steps
        stream = part.batches(start)
        for step in range(start, start + steps + 1):  # into the next epoch
            epoch, number = divmod(step, steps)
            if epoch > 1:
                break
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
    said = [subprocess.run([sys.executable, tmp_path / "use.py", how, *shards], capture_output=True, text=True).stdout
            for how in ("fork", "spawn")]
    assert said[0] == said[1] != ""


def test_damaged_samples_are_skipped_and_counted_by_cause(tmp_path, capsys):
    good, png = picture(), picture(kind="PNG")
    bomb = bytearray(png)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    inside = png[:60] + bytes(20) + png[80:]  # its header and its end are there
    bad = {"image incomplete": good[:-40], "image too large": bytes(bomb), "image header unreadable": b"no image", "no image": b""}
    files = [(f"good{n}.{field}", content) for n in range(9) for field, content in (("jpg", good), ("txt", b"fine"))]
    for n, content in enumerate(bad.values()):
        files += [(f"bad{n}.jpg", content), (f"bad{n}.txt", b"fine")]
    files += [("empty.jpg", good), ("empty.txt", b" \n\n"), ("inside.jpg", inside), ("inside.txt", b"fine")]
    for source in (path := tar_of(tmp_path / "x.tar", files), f"pipe:cat {path}"):
        for workers in (0, 2):
            loader = loader_of(source, 3, workers=workers)
            keys = [key for each in loader.epoch(0) for key in each.keys]
            assert set(keys) <= {f"good{n}" for n in range(9)}
            if not loader.stream:
                assert loader.bad == {**dict.fromkeys(bad, 1), "no caption": 1, "image does not decode": 1}
            assert sum(loader.bad.values()) == 6 and "no caption" in loader.report()
    assert "skipped: x.tar bad0: image incomplete" in capsys.readouterr().err


@pytest.mark.parametrize("files, says", [
    ([("a.jpg", picture())] * 1, "1 x no caption"), ([("a.txt", b"words")], "1 x no image"), ([], "tar without samples"),
    ([("a.jpg", picture()), ("a.txt", b"few")], "1 usable samples")])
def test_shards_with_nothing_to_train_on_are_named_in_one_line(files, says, tmp_path):
    with pytest.raises(data.DataError, match=says) as error:
        loader_of(tar_of(tmp_path / "x.tar", files))
    assert "\n" not in str(error.value)


def test_a_truncated_tar_gives_its_whole_samples_and_the_loss_is_counted(tmp_path, capsys):
    whole = Path(shards_of(tmp_path / "s", [6])[0]).read_bytes()
    size = len(whole) // 6 // 512 * 512  # of a sample, less than its share of a tar that ends in zeros
    for length in range(size, len(whole), 700):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        found = [sample["__key__"] for sample in data.read_samples(str(tmp_path / "cut.tar"))]
        ended = not whole[length - 512 :].strip(b"\0") and not whole[length - 1024 : length - 512].strip(b"\0")
        assert ("tar breaks off" in capsys.readouterr().err) == (not ended)
        piped = loader_of(f"pipe:cat {tmp_path}/cut.tar", 1)
        assert sorted(key for each in piped.epoch(0) for key in each.keys) == found
        assert piped.bad == ({} if ended else {"tar breaks off": 1})
        capsys.readouterr()


def test_a_command_that_fails_or_hangs_stops_the_run_and_its_secrets_are_not_printed(tmp_path, monkeypatch):
    path = shards_of(tmp_path / "s", [4])[0]
    monkeypatch.setattr(data, "PIPE_SECONDS", 0.2)
    for end, says in (("exit 7", "exit code 7"), ("sleep 60", "0.2 s")):
        loader = loader_of(f"pipe:cat {path}; : token=abc http://me:word@host/x-000.tar?key=def; {end}")
        with pytest.raises(data.DataError, match=says) as error:
            list(loader.epoch(0))
        assert "x-000.tar" in str(error.value) and not re.search("abc|def|me|word|\n", str(error.value))


def test_a_stream_is_one_pass_over_its_shards_in_batches_and_goes_on_at_the_next_shard(tmp_path):
    shards = shards_of(tmp_path / "s", [5, 3, 4, 6])
    source = [f"pipe:cat {shard}" for shard in shards]
    for workers in (0, 2, 8):
        loader = loader_of(source, 4, workers=workers)
        keys = [key for each in loader.epoch(0) for key in each.keys]
        assert len(keys) == len(set(keys)) == 16
        endless = loader.batches(0, 2)
        assert [len(next(endless).keys) for _ in range(9)] == [4] * 9 and loader.position > 2
        endless.close()
    with pytest.raises(data.DataError, match="resample"):
        loader_of(source, world=2)
    drawn = [loader_of(source, 1, resample=True, rank=rank, world=2, seed=1) for rank in (0, 1)]
    keys = [[each.keys[0] for each in islice(each.batches(0), 40)] for each in drawn]
    assert keys[0] != keys[1] and all(len(set(part)) < 40 for part in keys)


@pytest.mark.parametrize("content", [
    picture(mode="CMYK"), picture(mode="L"), picture(kind="PNG", mode="P", transparency=3), picture(kind="WEBP"),
    picture(kind="PNG", mode="I;16"), picture(1, 10_000), picture(10_000, 1), picture(kind="PNG", mode="LA"),
    picture(kind="GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))]), picture(kind="PNG", mode="1")])
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


def command(*arguments):
    """data.py as a user calls it -> exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, data.__file__, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_pack_makes_shards_of_tables_and_class_folders_and_names_broken_rows(tmp_path):
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(picture(64, 48, seed=n))
    table = tmp_path / "t.tsv"
    table.write_text("path\tcaption\n" + "".join(f"{n % 5}.jpg\tcaption {n}, \"x\"\n" for n in range(10)) + "gone.jpg\tlost\n1.jpg\n")
    for out in ("a", "b"):
        code, said, err = command("pack", table, tmp_path / out, "--size", 20, "--test", 0.4, "--workers", 2)
        assert code == 0 and "gone.jpg" in err and "1 left out" in said
    assert (tmp_path / "a/train-00000.tar").read_bytes() == (tmp_path / "b/train-00000.tar").read_bytes()
    samples = list(data.captioned(f"{tmp_path}/a/t*.tar"))
    assert len(samples) == 5 and all(len(texts) == 2 and data.decode(image).size == (27, 20) for _, image, texts in samples)
    assert command("pack", table, tmp_path / "a")[0] == 2
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "classes" / name / f"{n}.png").write_bytes(picture(kind="PNG", seed=n))
    assert command("pack", tmp_path / "classes", tmp_path / "set")[0] == 0
    assert sorted(label for _, _, label in data.labelled(tmp_path / "set", "test")) == [0, 0, 0, 1, 1, 1]
    assert command("pack", tmp_path / "classes", tmp_path / "c", "--caption", "--templates", "a {c}::one {c}")[0] == 0
    assert {tuple(texts) for *_, texts in data.captioned(f"{tmp_path}/c/*.tar")} == {("a cat", "one cat"), ("a dog", "one dog")}


def test_inspect_reports_and_its_exit_code_says_whether_something_is_wrong(tmp_path):
    shards, sheet = shards_of(tmp_path / "s", [4, 3]), tmp_path / "sheet.png"
    code, said, _ = command("inspect", f"{tmp_path}/s/*.tar", "--sheet", sheet)
    assert code == 0 and "7 usable samples" in said and "24" in said and Image.open(sheet).size[0] > 100
    code, said, _ = command("inspect", "::".join([*shards, tar_of(tmp_path / "bad.tar", [("x.jpg", b"bad")])]), "--sheet", sheet)
    assert code == 1 and "no caption" in said
    assert command("inspect", tmp_path / "bad.tar", "--sheet", sheet)[0] == 2
    assert command("inspect", tmp_path / "none.tar")[0] == 2
