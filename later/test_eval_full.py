# --- Evaluation -------------------------------------------------------------------------------------------
def unit(*shape, seed=0):
    """Random features of unit norm, in eighths before it, so that there are ties."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()
    return F.normalize(x + 1e-3, dim=1)

def labelled_folder(folder, count=8, classes=("red", "blue"), shards=1, split="test", size=8):
    """Writes a set in CLIP_benchmark's layout: image n is of class n mod C, in that class's colour."""
    (folder / split).mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
            for n in range(shard, count, shards):
                out, label = io.BytesIO(), n % len(classes)
                Image.new("RGB", (size, size + n), (200 - 190 * label, 10 * n, 200 * label)).save(out, "PNG")
                for suffix, content in (("png", out.getvalue()), ("cls", f"{label}\n".encode())):
                    info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{method: checkpoint} of new tiny models, with a tokenizer of bytes alone."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for method in METHODS:
        config = Config(**SCALES["tiny"], method=method, vocab_size=259)
        torch.manual_seed(0)
        paths[method] = folder / method / "checkpoint-1.pt"
        paths[method].parent.mkdir()
        tokenizer = None if method == "mae" else []  # no merges
        torch.save({"model": MAECLIP(config).state_dict(), "config": asdict(config), "tokenizer": tokenizer,
                    "step": 1}, paths[method])
    return paths

def complaint(capsys, *argv):
    """The one line with which eval.py refuses its input."""
    with pytest.raises(SystemExit) as exit:
        evaluation.main([str(word) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("eval.py: error: ")
    return lines[0]

def test_zero_shot_counts_as_clip_benchmark_does_ties_included():
    images, classes, labels = unit(40, 4), unit(7, 4, seed=1), torch.arange(40) % 6  # class 6 does not occur
    found = evaluation.zero_shot(images, classes, labels)
    logits, right, first = 100.0 * images @ classes.T, [[] for _ in range(6)], [0, 0]
    for row, label in zip(logits, labels.tolist(), strict=True):
        order = row[None].topk(5, 1, True, True)[1][0].tolist()
        first[0] += order[0] == label
        first[1] += label in order
        right[label].append(row.argmax().item() == label)
    assert (found["acc1"], found["acc5"]) == (first[0] / 40, first[1] / 40)
    recalls = [sum(hits) / len(hits) for hits in right]
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / 6, abs=1e-12)
    assert math.isnan(evaluation.zero_shot(images, classes[:4], labels % 4)["acc5"])

def test_retrieval_counts_as_clip_benchmark_does_with_ties_and_several_captions():
    images, owner = unit(12, 3), torch.tensor([*range(12), 0, 0, 3, 3, 11, 7])
    texts = unit(len(owner), 3, seed=1)
    found, scores = evaluation.retrieval(images, texts, owner), texts @ images.T
    for k in (1, 5, 10):
        of_texts = [owner[n] in scores[n : n + 1].topk(k, dim=1)[1] for n in range(len(owner))]
        of_images = [n in owner[scores.T[n : n + 1].topk(k, dim=1)[1]] for n in range(12)]
        for side, hits in (("image", of_texts), ("text", of_images)):
            mean = torch.tensor([float(hit) for hit in hits]).mean().item()
            assert found[f"{side}_retrieval_recall@{k}"] == mean

def test_scores_do_not_depend_on_the_size_of_the_blocks(monkeypatch):
    images, classes, owner = unit(30, 5), unit(9, 5, seed=1), torch.arange(30) % 30
    split = images, torch.arange(30) % 9, unit(20, 5, seed=2), torch.arange(20) % 9
    def scores():
        return [evaluation.zero_shot(images, classes, owner % 9), evaluation.knn(*split, k=5),
                evaluation.retrieval(images, images, owner)]
    before = scores()
    monkeypatch.setattr(evaluation, "BLOCK", 64)
    assert scores() == before

def test_knn_is_the_weighted_vote_of_the_nearest():
    x, y, test_x, test_y = unit(30, 3), torch.arange(30) % 4, unit(15, 3, seed=1) * 7, torch.arange(15) % 4
    right = 0
    for row, label in zip(F.normalize(test_x, dim=1), test_y.tolist(), strict=True):
        votes = [0.0] * 4
        for n in (x @ row).argsort(descending=True)[:30].tolist():
            votes[y[n]] += math.exp(float(x[n] @ row) / 0.07)
        right += votes.index(max(votes)) == label
    assert evaluation.knn(x, y, test_x, test_y, k=30)["acc1"] == right / 15

@pytest.mark.parametrize("kind", ["plain", "scaled", "rank deficient", "fewer than D", "separable", "two"])
def test_fit_linear_reaches_the_objective_of_scikit_learn(kind):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    classes, n = 2 if kind == "two" else 3, 12 if kind == "fewer than D" else 90
    y = np.arange(n) % classes
    x = rng.normal(size=(n, 16)) + rng.normal(size=(classes, 16))[y] * (9 if kind == "separable" else 0.4)
    x = x * 10.0 ** rng.uniform(-3, 3, 16) if kind == "scaled" else x
    x = x[:, :3] @ rng.normal(size=(3, 16)) if kind == "rank deficient" else x
    for l2 in (1e-1, 1e-4):
        settings = {"C": 1 / (n * l2), "solver": "newton-cholesky", "tol": 1e-9, "max_iter": 1000}
        peer = linear_model.LogisticRegression(**settings).fit(x, y)
        pair = peer.coef_, peer.intercept_
        if classes == 2:  # scikit-learn's one row stands for half of it and half of its opposite
            pair = (np.concatenate([-part / 2, part / 2]) for part in pair)
        ours, theirs = [], []
        for values, (weight, bias) in ((ours, evaluation.fit_linear(x, y, classes, l2)), (theirs, pair)):
            weight, bias = torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
            loss = F.cross_entropy(torch.tensor(x) @ weight.T + bias, torch.tensor(y))
            values.append((loss + l2 / 2 * weight.square().sum()).item())
        if classes > 2:
            assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
        assert ours[0] <= theirs[0] * (1 + 1e-4)

def test_the_linear_probe_chooses_on_train_alone_and_finds_what_is_linear():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = np.eye(3)[y] + rng.normal(size=(300, 3)) * 0.05
    found = evaluation.linear_probe(x[:200], y[:200], x[200:], y[200:])
    assert found["acc1"] == 1.0
    other = evaluation.linear_probe(x[:200], y[:200], x[200:], (y[200:] + 1) % 3)
    assert other == found | {"acc1": 0.0}

def test_intervals_pair_images_and_use_students_t_over_seeds():
    hits = torch.arange(400) % 4 == 0
    one, worse = evaluation.Score(hits, 0.1), evaluation.Score(hits & (torch.arange(400) != 0), 0.1)
    mean, low, high = evaluation.interval([one])
    assert mean == 0.25 and abs(high - low - 2 * 1.96 * math.sqrt(0.25 * 0.75 / 400)) < 0.01
    mean, low, high = evaluation.interval([one], [worse])  # differ in one image: far tighter than each alone
    assert mean == pytest.approx(1 / 400) and 0 <= low and high < 5 / 400
    seeds = [evaluation.Score(torch.full((4,), value), 0.1) for value in (0.1, 0.2, 0.3)]
    half = 4.303 * 0.1 / 3**0.5
    assert evaluation.interval(seeds) == pytest.approx((0.2, 0.2 - half, 0.2 + half))

def test_a_cached_feature_never_outlives_its_input(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, path = labelled_folder(tmp_path / "set"), tmp_path / "copy.pt"
    path.write_bytes(trained["clip"].read_bytes())
    def extract():
        model, tokenizer, _ = load(path)
        return evaluation.features(model, tokenizer, *evaluation.open_sets(folder), "test", path)
    first, shard = extract(), folder / "test" / "0.tar"
    times = os.stat(shard).st_atime_ns, os.stat(shard).st_mtime_ns
    with monkeypatch.context() as patch:  # the second time nothing is decoded
        patch.setattr(evaluation, "read_image", None)
        assert extract()["pooled"].equal(first["pooled"])
    content = bytearray(shard.read_bytes())
    content[content.index(b"000.cls") + 512] = ord("1")  # another label; size and time of change stay
    shard.write_bytes(content)
    os.utime(shard, ns=times)
    assert extract()["labels"].tolist() == [1, *first["labels"].tolist()[1:]]
    state = torch.load(path, weights_only=True)
    state["model"]["image_encoder.cls_token"] += 1.0
    torch.save(state, path)
    assert not extract()["pooled"].equal(first["pooled"])

def test_the_suite_sets_checkpoints_side_by_side_with_chance_and_intervals(trained, tmp_path, capsys):
    folder = labelled_folder(labelled_folder(tmp_path / "set", 40), 24, split="train").parent / "set"
    evaluation.main(["suite", str(trained["clip"]), str(trained["mae"]), "--data", str(folder), "--untrained",
                     "--format", "json"])
    out, err = capsys.readouterr()
    table = {(entry["task"], entry["measure"]): entry for entry in json.loads(out)}
    assert "prompts of set: a photo of a {c}." in err
    assert {task for task, _ in table} == {"zero_shot", "linear_probe", "knn"}
    probe = table["linear_probe", "acc1"]
    assert probe["chance"] == 0.5 and probe["images"] == 40
    assert set(probe["values"]) == {"clip", "mae", "untrained", "clip less mae"}
    assert all(low <= mean <= high for mean, low, high in probe["values"].values())
    assert set(table["zero_shot", "acc1"]["values"]) == {"clip", "untrained"}

def test_bad_input_is_refused_in_one_line(trained, tmp_path, capsys):
    clip, folder = trained["clip"], labelled_folder(tmp_path / "set", shards=2)
    assert "text tower" in complaint(capsys, "zero-shot", trained["mae"], "--data", folder)
    (tmp_path / "bad.pt").write_bytes(clip.read_bytes()[:5000])
    assert "bad.pt" in complaint(capsys, "zero-shot", tmp_path / "bad.pt", "--data", folder)
    assert "none.pt" in complaint(capsys, "zero-shot", tmp_path / "none.pt", "--data", folder)
    (tmp_path / "photo.jpg").write_text("no image")
    assert "photo.jpg" in complaint(capsys, "zero-shot", clip, tmp_path / "photo.jpg", "--labels", "a,b")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na photo")
    assert "{c}" in complaint(capsys, "zero-shot", clip, "--data", folder)
    (folder / "zeroshot_classification_templates.txt").unlink()
    (folder / "classnames.txt").write_text("red")
    assert "classnames.txt" in complaint(capsys, "zero-shot", clip, "--data", folder)
    three = labelled_folder(tmp_path / "three", classes=("a", "b", "c"))
    (three / "classnames.txt").write_text("a\nb\n")
    assert "0 ... 2" in complaint(capsys, "zero-shot", clip, "--data", three)
    (folder / "classnames.txt").write_text("red\nblue")
    content = (folder / "test" / "1.tar").read_bytes()
    (folder / "test" / "1.tar").write_bytes(content[: len(content) // 2])
    assert "1.tar" in complaint(capsys, "zero-shot", clip, "--data", folder)
    (folder / "test" / "1.tar").unlink()
    assert "1.tar" in complaint(capsys, "zero-shot", clip, "--data", folder)
    (folder / "test" / "nshards.txt").unlink()
    assert "nshards.txt" in complaint(capsys, "zero-shot", clip, "--data", folder)
    assert "pack" in complaint(capsys, "zero-shot", clip, "--data", tmp_path)
    few = labelled_folder(labelled_folder(tmp_path / "few"), split="train").parent / "few"
    assert "k must lie in 1 ... 8" in complaint(capsys, "knn", clip, "--data", few)
    assert "caption" in complaint(capsys, "retrieval", clip, "--data", few / "test" / "0.tar")

@pytest.mark.parametrize("method", METHODS)
def test_the_counted_flops_of_a_forward_pass_are_the_profilers(method):
    config = Config(**SCALES["tiny"] | {"batch_size": 4}, method=method, vocab_size=300)
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(3, 300, (4, config.context))
    tokens[:, 0], tokens[:, -1] = 1, 2
    counter, exact = flop_counter.FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counter, exact:
        MAECLIP(config)(images, tokens, views=(images, images))
    assert counter.get_total_flops() == 4 * evaluation.forward_flops(config)

def test_the_benchmark_reports_in_a_table_and_as_json(tmp_path, capsys):
    out = tmp_path / "figures.json"
    evaluation.main(["benchmark", "--scale", "tiny", "--method", "mae_clip", "--batch-size=8", "--steps=2",
                     "--device", "cpu", "--out", str(out)])
    found, = json.loads(out.read_text())
    assert "matrix TFLOP/s" in capsys.readouterr().out
    assert found["method"] == "mae_clip" and found["pairs/s"] > 0 and 0 < found["share"] < 1
