"""eval.py: the probe is the stated protocol, every image counts, nothing moves the network, bad input is one line."""

import ast
import importlib
import json
import re
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from PIL import Image

from conftest import METHODS, ROOT, SMALL, SMALL_OF, is_one_line_error, make_folder, run_here, save_edited

import common

evaluation = importlib.import_module("eval")  # the name of a builtin: not to be imported as such
QUICK = ["--probe-epochs", "20", "--precision", "fp32"]


def train(method, folder, out):
    argv = [*SMALL, *SMALL_OF[method], "--epochs", "1", "--dataset", "folder", "--data-dir", str(folder), "--out", str(out)]
    assert run_here(method, argv).status == 0
    return out


@pytest.fixture(scope="session")
def trained(small_folder, tmp_path_factory):
    """The folder of one trained run."""
    return train("cw_rgp", small_folder, tmp_path_factory.mktemp("runs") / "cw")


def evaluate(tmp_path, *argv):
    """Run eval.py -> (result, the list that --json writes)."""
    result = run_here("eval", [*QUICK, "--json", tmp_path / "figures.json", *argv])
    assert result.status == 0, result.err
    return result, json.loads((tmp_path / "figures.json").read_text())


# ------------------------------------------------------------------------------
# The linear probe
# ------------------------------------------------------------------------------


@pytest.fixture
def three_features():
    """(features by name, as [bank, queries] of different width; data; arguments)"""
    torch.manual_seed(0)
    y, y_test = torch.arange(300) % 6, torch.arange(60) % 6
    found = {}
    for name, width in (("H", 20), ("Z", 5), ("raw", 40)):
        centres = torch.randn(6, width)
        found[name] = [centres[labels] + 2 * torch.randn(len(labels), width) for labels in (y, y_test)]
    data = SimpleNamespace(train_labels=y, test_labels=y_test, device=torch.device("cpu"))
    return found, data, SimpleNamespace(probe_epochs=20, seed=3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_probes_side_by_side_are_those_of_one_after_the_other(three_features, threads):
    found, data, args = three_features
    rows = torch.arange(0, 300, 2)
    alone = [(name, evaluation.accuracies(x, data, rows, args, name)) for name, x in found.items()]
    assert len({figures["linear"] for _, figures in alone}) == 3
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert list(evaluation.all_accuracies(found, data, rows, args)) == alone
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(kept)


def test_ctrl_c_ends_probes_that_run_beside(three_features, monkeypatch):
    found, data, args = three_features
    args.probe_epochs, measure, ended = 10**7, evaluation.accuracies, threading.Event()

    def interrupted(x, data, rows, args, name):
        if name == "H":
            raise KeyboardInterrupt
        return measure(x, data, rows, args, name)

    def measure_all():
        with pytest.raises(KeyboardInterrupt):
            list(evaluation.all_accuracies({name: found[name] for name in "HZ"}, data, torch.arange(300), args))
        ended.set()

    monkeypatch.setattr(evaluation, "accuracies", interrupted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    thread = threading.Thread(target=measure_all, daemon=True)
    thread.start()
    assert ended.wait(60) and not evaluation.LEAVING.is_set()


def test_probe_separable_features():
    y, y_test = torch.arange(2500) % 7, torch.arange(333) % 7  # neither is a multiple of 1000
    torch.manual_seed(0)
    x, x_test = (nn.functional.one_hot(labels, 7) * 20 + torch.randn(len(labels), 7) for labels in (y, y_test))
    assert evaluation.linear_probe(x, y, torch.arange(2500), x_test, y_test, epochs=100) == (1.0, 1.0)


def test_probe_random_labels_are_chance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 8, generator=generator), torch.randint(0, 4, (1000,), generator=generator)
    x_test, y_test = torch.randn(4000, 8, generator=generator), torch.arange(4000) % 4
    top1, top5 = evaluation.linear_probe(x, y, torch.arange(1000), x_test, y_test, epochs=50)
    assert abs(top1 - 0.25) < 0.04
    assert top5 is None  # with four classes it would be 1 whatever the features


def test_probe_top5_counts_the_right_class_among_five():
    """Features that tell only which half of the ten classes: top-1 is one class in five, top-5 is all."""
    y, y_test = torch.arange(1000) % 10, torch.arange(200) % 10
    x, x_test = (nn.functional.one_hot(labels // 5, 64).float() for labels in (y, y_test))
    top1, top5 = evaluation.linear_probe(x, y, torch.arange(1000), x_test, y_test, epochs=300)
    assert top1 == pytest.approx(0.2) and top5 == pytest.approx(1.0)


def test_probe_is_the_stated_protocol(monkeypatch):
    """Adam, weight decay 5e-6, batches of 1000, every row once an epoch, 1e-2 -> 1e-6 exponentially."""
    rates, decays, sizes = [], [], []

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            decays.append(self.param_groups[0]["weight_decay"])
            return super().step(closure)

    cross_entropy = nn.functional.cross_entropy
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(nn.functional, "cross_entropy",
                        lambda logits, labels: sizes.append(labels.tolist()) or cross_entropy(logits, labels))
    evaluation.linear_probe(torch.randn(2300, 3), torch.arange(2300), torch.arange(2300), torch.randn(5, 3), torch.arange(5), epochs=4)
    assert [len(batch) for batch in sizes] == [1000, 1000, 300] * 4
    epochs = [sum(sizes[i:i + 3], []) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(2300)) for epoch in epochs) and epochs[0] != epochs[1]
    assert rates[::3] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5]) and set(decays) == {5e-6}


def test_probe_learning_rate_ends():
    assert evaluation.probe_learning_rate(0, 500) == 1e-2
    assert evaluation.probe_learning_rate(500, 500) == pytest.approx(1e-6)
    assert evaluation.probe_learning_rate(250, 500) == pytest.approx(1e-4)
    assert evaluation.parse_args(["runs/a"]).probe_epochs == 500


def test_probe_repeats_with_the_seed():
    x, y = torch.randn(300, 5), torch.randint(0, 6, (300,))
    first, again = (evaluation.linear_probe(x, y, torch.arange(200), x[200:], y[200:], epochs=5, seed=3) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("train_labels, test_labels, expected", [([0, 1, 2], [0], 1.0), ([0, 1], [0, 1, 6, 6], 0.5)])
def test_probe_with_classes_missing_on_one_side(train_labels, test_labels, expected):
    y, y_test = torch.tensor(train_labels * 100), torch.tensor(test_labels * 10)
    x, x_test = (nn.functional.one_hot(labels, 64).float() for labels in (y, y_test))
    assert evaluation.linear_probe(x, y, torch.arange(len(y)), x_test, y_test, epochs=300)[0] == expected


def test_label_fraction_counts_per_class():
    labels = torch.tensor([0] * 100 + [1] * 50 + [4] * 3)
    rows = evaluation.labelled_rows(labels, 0.1, seed=0)
    assert labels[rows].bincount().tolist() == [10, 5, 0, 0, 1]  # class 4: at least one
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, evaluation.labelled_rows(labels, 0.1, seed=0))
    assert not torch.equal(rows, evaluation.labelled_rows(labels, 0.1, seed=1))
    assert torch.equal(evaluation.labelled_rows(labels, 1.0), torch.arange(153))


# ------------------------------------------------------------------------------
# Whitened Z
# ------------------------------------------------------------------------------


def test_slices_are_random_and_rows_return_to_their_places():
    z, seen = torch.arange(50.0)[:, None].repeat(1, 3), []
    out = evaluation.whiten_in_slices(z, 16, lambda rows: seen.append(rows[:, 0].tolist()) or rows * 2)
    assert torch.equal(out, z * 2)
    assert [len(rows) for rows in seen] == [16] * 4  # 50 = 3 x 16 + 2; the last is filled up
    assert all(len(set(rows)) == 16 for rows in seen) and sorted(sum(seen, [])[:50]) == list(range(50))
    assert seen[0] != sorted(seen[0])  # images sorted by class must not make slices of one class


def test_whitened_z_of_cw_rgp_has_squared_norm_d_minus_g():
    import cw_rgp

    z = torch.randn(70, 64)
    y = evaluation.whiten_in_slices(z, 16, lambda rows: cw_rgp.channel_whiten(rows, 2))
    torch.testing.assert_close(y.square().sum(1), torch.full((70,), 62.0), rtol=1e-3, atol=0)


def test_whitened_z_of_wmse_has_full_stable_rank():
    import wmse

    z = torch.randn(256, 8) @ torch.randn(8, 8) + 5
    y = evaluation.whiten_in_slices(z, 64, lambda rows: wmse.whiten(rows, "cholesky", 0.0))
    figures = common.collapse_metrics(y)
    assert figures["stable_rank"] == pytest.approx(8, rel=1e-3) and figures["corr"] < 1e-3


@pytest.mark.parametrize("method", ["wmse", "shuffled_dbn", "moco"])
def test_other_methods_are_rebuilt(method, small_folder, tmp_path):
    """wmse and shuffled_dbn have whitened Z, moco has none. 24 test images fill one slice of 16, none of 32."""
    run = train(method, small_folder, tmp_path / "run")
    result, (report,) = evaluate(tmp_path, run, "--features", "H,W")
    assert report["method"] == method and 0 <= report["features"]["H"]["linear"] <= 1
    assert ("W" in report["features"]) == (method == "wmse")
    assert {"moco": "no whitening layer", "shuffled_dbn": "24 images are fewer than the 32", "wmse": "W whitened Z"}[method] in result.out


def test_embeddings_that_cannot_be_whitened_are_said_so():
    args = SimpleNamespace(method="cw_rgp", w_size=16, groups=2, eps=0.0)
    run = SimpleNamespace(args=args, module=importlib.import_module("cw_rgp"), experiment=None)
    with pytest.raises(common.UserError, match="too few dimensions"):
        evaluation.whitened(run, [torch.ones(64, 64)] * 2, seed=0)


# ------------------------------------------------------------------------------
# Experiments: runs whose model was built by an object of tests/experiments.py
# ------------------------------------------------------------------------------


def as_experiment(trained, path, name):
    """The run's checkpoint as if an experiment had made it."""
    flags = torch.load(trained / "last.pt", weights_only=True)["args"]
    changed(trained, path, args={**flags, "experiment": name})
    return path


@pytest.mark.parametrize("file", ["there", "missing"])
def test_an_unknown_experiment_has_its_backbone_measured(trained, tmp_path, monkeypatch, file):
    """H as of the plain run, since the backbone is the same; for Z and whitened Z, one line says why not."""
    if file == "missing":
        monkeypatch.setitem(sys.modules, "experiments", None)
    path = as_experiment(trained, tmp_path / "last.pt", "no-such-experiment")
    _, (plain,) = evaluate(tmp_path, trained)
    result, (report,) = evaluate(tmp_path, path, "--neighbors", tmp_path / "n.png", "--views", tmp_path / "v.png")
    assert report["features"] == {name: plain["features"][name] for name in ("H", "raw", "untrained")}
    assert report["method"] == "cw_rgp/no-such-experiment" and len(report["left_out"]) == 1
    (reason,) = (line for line in result.out.splitlines() if "left out" in line)
    assert "Z and whitened Z left out" in reason and "experiments.py" in reason and "cw_rgp/no-such-experiment" in reason


def test_the_plot_of_an_unknown_experiment_has_no_z(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is the one thing that needs it")
    path = as_experiment(trained, tmp_path / "last.pt", "no-such-experiment")
    evaluate(tmp_path, path, "--features", "Z,W", "--plot", tmp_path / "p.png")
    assert sheet_size(tmp_path / "p.png") == (1800, 800)


def test_a_backbone_that_does_not_fit_is_one_line(trained, tmp_path):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    weights = {name: w for name, w in checkpoint["model"].items() if "running_var" not in name}
    changed(trained, tmp_path / "last.pt", model=weights, args={**checkpoint["args"], "experiment": "no-such-experiment"})
    result = run_here("eval", [*QUICK, tmp_path / "last.pt"])
    assert is_one_line_error(result) and "its backbone is not --backbone tiny; load backbone.pt into your own" in result.err


def test_heads_that_do_not_fit_are_one_line(trained, tmp_path):
    """As after a change of the method's file."""
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    checkpoint["args"]["proj_hidden"] = 48
    save_edited(checkpoint, tmp_path / "last.pt")
    result = run_here("eval", [tmp_path / "last.pt"])
    assert is_one_line_error(result) and "does not fit cw_rgp.py (RuntimeError: " in result.err, result.err


@pytest.mark.parametrize("argv", [["--dataset", "patterns"], []])
def test_a_folder_for_patterns_is_refused(trained, tmp_path, argv):
    if not argv:
        checkpoint = torch.load(trained / "last.pt", weights_only=True)
        checkpoint["args"].update(dataset="patterns", data_dir="data")
        save_edited(checkpoint, tmp_path / "last.pt")
    result = run_here("eval", [trained if argv else tmp_path / "last.pt", *argv, "--data-dir", "other"])
    assert is_one_line_error(result) and "--data-dir" in result.err and "try it without --data-dir" in result.err, result.err


def test_an_experiment_builds_its_model_and_whitens(trained, tmp_path, monkeypatch):
    """`build` and, where there is one, `whiten` come from the object that `find` gives; without `whiten`, the method whitens."""
    import cw_rgp

    asked, built = [], []
    experiment = SimpleNamespace(build=lambda args: built.append(args.experiment) or cw_rgp.build(args))
    monkeypatch.setitem(sys.modules, "experiments", SimpleNamespace(find=lambda name: asked.append(name) or experiment))
    path = as_experiment(trained, tmp_path / "last.pt", "other-whitening")
    _, (plain,) = evaluate(tmp_path, trained)
    assert asked == []  # a plain run does not ask
    _, (report,) = evaluate(tmp_path, path)
    assert asked == ["cw_rgp/other-whitening"] and set(built) == {"other-whitening"}
    assert report["features"] == plain["features"]
    experiment.whiten = lambda args, z: z * args.w_size
    _, (report,) = evaluate(tmp_path, path)
    found = report["features"]
    assert found["W"]["collapse"]["rankme"] == pytest.approx(found["Z"]["collapse"]["rankme"])
    assert found["W"]["collapse"]["entropy"] > found["Z"]["collapse"]["entropy"]


def test_a_real_experiment_is_rebuilt(small_folder, tmp_path):
    if not (ROOT / "tests" / "experiments.py").exists():
        pytest.skip("tests/experiments.py is not there yet")
    import experiments

    name = "simsiam/softmax-similarity"
    args = common.parse_args(experiments.find(name).Args, [*SMALL, *SMALL_OF["simsiam"], "--epochs", "1", "--dataset", "folder",
                                          "--data-dir", str(small_folder), "--out", str(tmp_path / "run")])
    experiments.find(name).train(args, build=experiments.find(name).build)
    _, (report,) = evaluate(tmp_path, tmp_path / "run")
    found = report["features"]
    assert report["method"] == name and [found[kind]["dim"] for kind in ("H", "Z")] == [1024, 32]
    checkpoint = common.load_checkpoint(str(tmp_path / "run" / "last.pt"))
    args = SimpleNamespace(**checkpoint["args"])
    model = experiments.find(name).build(args)
    model.load_state_dict(checkpoint["model"])
    data = common.load_data(args, torch.device("cpu"))
    z = common.project(model.projector, common.extract(model.backbone, data, data.test))
    assert found["Z"]["collapse"]["rankme"] == pytest.approx(common.collapse_metrics(z)["rankme"], rel=1e-3)


# ------------------------------------------------------------------------------
# The network stays as it is
# ------------------------------------------------------------------------------


def test_checksum_sees_parameters_and_buffers():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with evaluation.unchanged(network):
        network.eval()(torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="changed"), evaluation.unchanged(network):
        network.train()(torch.randn(5, 3))  # moves the running statistics only
    with pytest.raises(RuntimeError, match="changed"), evaluation.unchanged(network), torch.no_grad():
        network[0].weight[0, 0] += 1e-7


def test_features_taken_in_train_mode_end_in_an_error(trained, monkeypatch):
    extract = common.extract

    def careless(network, data, images, **settings):
        network.train()
        for x in data.eval_views(images, torch.arange(8), 8):
            network(x)
        return extract(network, data, images, **settings)

    monkeypatch.setattr(common, "extract", careless)
    with pytest.raises(RuntimeError, match="changed"):
        run_here("eval", [*QUICK, trained, "--features", "H"])


# ------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------


def test_report(trained, small_folder, tmp_path):
    """All five kinds of features, each figure with its protocol; kNN and collapse as computed here from the checkpoint."""
    result, (report,) = evaluate(tmp_path, trained / "last.pt")
    found = report["features"]
    assert [found[name]["dim"] for name in ("H", "Z", "W", "raw", "untrained")] == [1024, 64, 64, 3072, 1024]
    assert report["training_images"] == 64 and report["test_images"] == 24
    for words in ("majority vote among the 5 nearest", "exp(cos / 0.1)", "lr 1e-2 -> 1e-6", "stable_rank_sq", "network unchanged",
                  "untrained H", "raw pixels"):
        assert words in result.out
    assert all(0 <= figures[name] <= 1 for figures in found.values() for name in ("5-NN", "200-NN", "linear"))
    assert "collapse" not in found["raw"]

    import cw_rgp
    checkpoint = common.load_checkpoint(str(trained / "last.pt"))
    args = SimpleNamespace(**checkpoint["args"])
    data = common.load_data(args, torch.device("cpu"))
    model = cw_rgp.build(args)
    model.load_state_dict(checkpoint["model"])
    torch.manual_seed(args.seed)
    untrained = cw_rgp.build(args)
    for name, network in (("H", model.backbone), ("untrained", untrained.backbone)):
        bank, queries = (common.extract(network, data, images) for images in (data.labelled_train, data.test))
        assert found[name]["5-NN"] == common.knn_accuracy(bank, data.train_labels, queries, data.test_labels, k=5, temperature=None)
        assert found[name]["200-NN"] == common.knn_accuracy(bank, data.train_labels, queries, data.test_labels, k=200, temperature=0.1)
        assert found[name]["collapse"]["rankme"] == pytest.approx(common.collapse_metrics(queries)["rankme"], rel=1e-3)


def test_long_figures_stay_apart(capsys):
    """The entropy of 1024 channels that hardly vary has nine characters."""
    figures = common.collapse_metrics(torch.randn(50, 8)) | {"corr": -0.234, "entropy": -123456.789, "uniformity": -3.25}
    evaluation.say_collapse(["H"], {"H": figures}, "here")
    names, cells = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert len(cells) == len(names) and cells[-3:] == ["-0.234", "-123456.789", "-3.250"]


def test_folder_and_file_name_the_same_run_and_several_runs_follow_each_other(trained, tmp_path):
    _, reports = evaluate(tmp_path, trained, trained / "last.pt", "--features", "H,Z")
    assert len(reports) == 2 and reports[0]["features"] == reports[1]["features"] and list(reports[0]["features"]) == ["H", "Z"]


def test_a_damaged_run_is_refused_before_the_runs_ahead_of_it_are_measured(trained, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "last.pt").write_bytes((trained / "last.pt").read_bytes()[:-1])
    result = run_here("eval", [str(trained), str(tmp_path / "damaged"), "--json", str(tmp_path / "all.json")])
    assert is_one_line_error(result) and str(tmp_path / "damaged") in result.err and result.out == ""
    assert not (tmp_path / "all.json").exists()


def test_no_probe_and_label_fraction(trained, tmp_path):
    result, (report,) = evaluate(tmp_path, trained, "--features", "H", "--probe-epochs", "0")
    assert "linear" not in report["features"]["H"] and "linear" not in result.out
    result, (report,) = evaluate(tmp_path, trained, "--features", "H", "--label-fraction", "0.1")
    assert report["labels_for_probe"] == 8 and "8 of 64 training images" in result.out  # two of each 16


def test_another_data_set(trained, tmp_path, monkeypatch):
    """Larger images, more classes, one of them missing in test, and `patterns` for a run on a folder."""
    other = make_folder(tmp_path / "other", train=35, test=19, classes=7, side=40)
    shutil.rmtree(other / "test" / "class3")
    _, (report,) = evaluate(tmp_path, trained, "--data-dir", other)
    assert report["training_images"] == 35 and report["test_images"] == 16
    assert report["features"]["H"]["top-5"] >= report["features"]["H"]["linear"]
    draw = common.make_patterns
    monkeypatch.setattr(common, "make_patterns", lambda: draw(0, 50, 20))
    result, (report,) = evaluate(tmp_path, trained, "--dataset", "patterns", "--features", "H,raw")
    assert report["dataset"] == "patterns" and report["trained_on"] == "folder" and report["test_images"] == 20


def test_a_run_without_crops_is_measured_on_larger_images_too(monkeypatch, tmp_path):
    """Training on them would need crops; the figures do not. Views of them do, and are refused before all is measured."""
    draw = common.make_patterns
    monkeypatch.setattr(common, "make_patterns", lambda: draw(0, 64, 20))
    argv = [*SMALL, *SMALL_OF["vicreg"], "--epochs", "1", "--augment", "none", "--out", tmp_path / "run"]
    assert run_here("vicreg", argv).status == 0
    larger = ["--dataset", "folder", "--data-dir", make_folder(tmp_path / "larger", side=48)]
    assert evaluate(tmp_path, tmp_path / "run", *larger)[1]
    for flags in (["--views", tmp_path / "views.png"], ["--finetune", 1], ["--supervised"]):
        result = run_here("eval", [*QUICK, tmp_path / "run", *larger, *flags])
        assert is_one_line_error(result) and "does not crop" in result.err and "5-NN" not in result.out


def test_without_labels_the_accuracies_are_left_out(trained, small_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((small_folder / "train").rglob("*.png")):
        shutil.copy(path, flat)
    result, (report,) = evaluate(tmp_path, trained, "--data-dir", flat, "--neighbors", tmp_path / "n.png", "--views", tmp_path / "v.png")
    assert "accuracies are left out" in result.out and "stable_rank" in result.out
    assert "5-NN" not in report["features"]["H"] and report["features"]["H"]["collapse"]["rank"] > 1 and "raw" not in report["features"]
    assert sheet_size(tmp_path / "n.png") == (742, 742)


# ------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------


def sheet_size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size  # width, height


def test_sheets(trained, tmp_path):
    """32 pixels are enlarged to 64, tiles lie 2 apart: 8 rows of 1 + 8 views; 10 rows of 1 + 9 neighbours with a frame of 2 pixels."""
    result, _ = evaluate(tmp_path, trained, "--features", "H", "--neighbors", tmp_path / "n.png", "--views", tmp_path / "v.png")
    assert sheet_size(tmp_path / "v.png") == (9 * 66 + 2, 8 * 66 + 2)
    assert sheet_size(tmp_path / "n.png") == (10 * (2 * 36 + 2) + 2, 10 * (2 * 36 + 2) + 2)
    assert "596x530 pixels" in result.out


def test_plot(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is the one thing that needs it")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "last.pt", bare)  # a run without metrics.csv: its spectra are drawn, its curves are not
    result, _ = evaluate(tmp_path, trained, bare, "--features", "H", "--plot", tmp_path / "p.png")
    assert sheet_size(tmp_path / "p.png") == (1800, 800)
    assert "no readable metrics.csv" in result.err and "reference" not in result.out  # which are of `patterns`


def test_reference_curves_stand_beside_the_runs_of_their_method(tmp_path, monkeypatch):
    """Dashed, from tests/curves; the methods without a file are named. A point that was not measured is left out."""
    pytest.importorskip("matplotlib", reason="the plot is the one thing that needs it")
    curves = tmp_path / "curves"
    curves.mkdir()
    header = "epoch,step,loss,lr,knn,dim,std_sqrt_d,rank_1pct,uniformity,alignment,images_per_s,seconds"
    (curves / "byol.csv").write_text(f"{header}\n1,39,3.5,1e-3,,64,0.5,7,-1.5,0.75,900,60\n2,78,2.5,0,0.5,64,0.75,9,-2.5,0.25,900,120\n")
    monkeypatch.setattr(evaluation, "CURVES", str(curves))
    figures, kind = [], evaluation.import_figure()
    monkeypatch.setattr(evaluation, "import_figure", lambda: lambda **more: figures.append(kind(**more)) or figures[-1])
    said = []
    monkeypatch.setattr(common, "say", said.append)
    evaluation.draw_plot(str(tmp_path / "p.png"), [], ["byol", "moco"])
    lines = [axes.get_lines() for axes in figures[0].axes]
    drawn = [[list(zip(*line.get_data())) for line in panel] for panel in lines]
    assert drawn == [[], [], [[(2.0, 50.0)]], [[(1, 3.5), (2, 2.5)]], [[(1, 0.5), (2, 0.75)]], [[(1, 7), (2, 9)]],
                     [[(-1.5, 0.75), (-2.5, 0.25)]], []]
    assert {(line.get_label(), line.get_linestyle()) for panel in lines for line in panel} == {("byol, reference", "--")}
    assert said[0] == f"no reference curves of moco in {curves}" and sheet_size(tmp_path / "p.png") == (1800, 800)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_reference_curve_that_learns(method, trained):
    found = evaluation.read_curves(str(ROOT / "tests" / "curves" / f"{method}.csv"))
    assert list(found) == list(evaluation.read_curves(str(trained / "metrics.csv"))), "of the columns that a run has today"
    steps = 10_000 // importlib.import_module(method).Args().batch_size
    assert found["epoch"] == list(range(1, 11)) and found["step"] == [steps * epoch for epoch in range(1, 11)]
    assert found["knn"][-1] >= {"byol": 0.94}.get(method, 0.95)  # with half of the bank; BYOL's closing 20-NN is 97.3 %
    assert min(found["std_sqrt_d"][1:]) > 0.1
    assert found["seconds"] == sorted(found["seconds"])


def drawn_plot(tmp_path, monkeypatch, runs, extra=()):
    """matplotlib's figure of runs, {folder: the losses of its epochs}, and of extra paths."""
    pytest.importorskip("matplotlib", reason="the plot is the one thing that needs it")
    figures, kind = [], evaluation.import_figure()
    monkeypatch.setattr(evaluation, "import_figure", lambda: lambda **more: figures.append(kind(**more)) or figures[-1])
    for folder, losses in runs.items():
        (tmp_path / folder).mkdir(parents=True)
        rows = [f"{epoch},{loss}" for epoch, loss in enumerate(losses, 1)]
        (tmp_path / folder / "metrics.csv").write_text("\n".join(["epoch,loss", *rows, ""]))
    paths = [*(str(tmp_path / folder) for folder in runs), *extra]
    evaluation.draw_plot(str(tmp_path / "p.png"), [(path, torch.ones(3)) for path in paths])
    return figures[0]


@pytest.mark.parametrize("runs, scale", [
    ({"a": [5.2, 4.9, 4.8]}, "linear"), ({"a": [-0.5, -0.9]}, "linear"), ({"a": [4.0, 0.9, 0.3]}, "linear"), ({"a": [30.0, 9.0, 2.9]}, "linear"),
    ({"a": [0.5, 0.2, 0.04]}, "linear"), ({"a": [101.0, 1.0]}, "symlog"), ({"a": [3000.0, 90.0], "b": [-0.5, -0.9]}, "symlog"), ({"a": []}, "linear")])
def test_the_panel_of_losses_has_numbers_beside_it(runs, scale, tmp_path, monkeypatch):
    panel = drawn_plot(tmp_path, monkeypatch, runs).axes[3]
    low, high = panel.get_ylim()
    seen = [label.get_text() for label in panel.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert panel.get_yscale() == scale and len([text for text in seen if text]) >= 2, seen


def test_a_plot_names_each_run_by_its_folder_whatever_the_letters(tmp_path, monkeypatch):
    """To matplotlib `$` begins a formula, and a name with `_` in front has no legend."""
    runs = {"a/run": [2.0], "b/run": [2.0], "_mine": [2.0], "x$y$_{": [2.0]}
    found = [text.get_text() for text in drawn_plot(tmp_path, monkeypatch, runs).axes[7].get_legend().get_texts()]
    assert found == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), " _mine", r"x\$y\$_{"]


def test_two_checkpoints_of_one_run_have_names_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name in ("epoch-0002.pt", "last.pt"):
        (tmp_path / "run" / name).write_text("")
    monkeypatch.chdir(tmp_path / "run")
    drawn = []
    monkeypatch.setattr(evaluation, "draw_curve", lambda panel, x, y, label, **_: drawn.append(label))
    figure = drawn_plot(tmp_path, monkeypatch, {}, extra=["epoch-0002.pt", "last.pt"])
    assert figure and set(drawn) == {"epoch-0002.pt", "last.pt"}


@pytest.mark.parametrize("rows", ["1,2.0,0.5\n2,1.5", "1,2.0,0.5,7", "1,2.0," + "5" * 200_000])
def test_curves_that_are_cut_short_or_strange_are_left_out_with_a_word(rows, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("epoch,loss,knn\n" + rows)
    found = evaluation.read_curves(str(tmp_path / "metrics.csv"))
    err = capsys.readouterr().err
    assert found == {} and f"{tmp_path}: no readable metrics.csv" in err


def test_the_figures_are_written_before_the_plot(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot is the one thing that needs it")
    monkeypatch.setattr(evaluation, "draw_plot", lambda *_: common.check(False, "no plot; try again"))
    result = run_here("eval", [*QUICK, trained, "--features", "H", "--plot", tmp_path / "p.png", "--json", tmp_path / "j.json"])
    assert is_one_line_error(result) and json.loads((tmp_path / "j.json").read_text())[0]["features"]["H"]


def test_a_run_on_patterns_asks_for_its_reference(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot is the one thing that needs it")
    draw = common.make_patterns
    draw = common.make_patterns
    monkeypatch.setattr(common, "make_patterns", lambda: draw(0, 64, 20))
    argv = [*SMALL, *SMALL_OF["vicreg"], "--epochs", "1", "--out", tmp_path / "run"]
    assert run_here("vicreg", argv).status == 0
    monkeypatch.setattr(evaluation, "CURVES", "nowhere")
    result, _ = evaluate(tmp_path, tmp_path / "run", trained, "--features", "H", "--plot", tmp_path / "p.png")
    assert "no reference curves of vicreg in nowhere" in result.out


def test_without_matplotlib_one_line(trained, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    result = run_here("eval", [trained, "--plot", tmp_path / "p.png"])
    assert is_one_line_error(result) and "pip install matplotlib" in result.err
    assert run_here("eval", [*QUICK, trained, "--features", "H"]).status == 0  # nothing else needs it


# ------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2
# ------------------------------------------------------------------------------


def changed(trained, path, **changes):
    """The run's checkpoint with other entries; None takes one out."""
    checkpoint = {**torch.load(trained / "last.pt", weights_only=True), **changes}
    save_edited({key: value for key, value in checkpoint.items() if value is not None}, path)


@pytest.mark.parametrize("argv, words", [
    (["--label-fraction", "0"], "--label-fraction"),
    (["--label-fraction", "2"], "--label-fraction"),
    (["--features", "H,Q"], "H, Z, W"),
    (["--probe-epochs", "-1"], "at least 0"),
    (["--dataset", "folder"], "--data-dir"),
    (["--data-dir", "/nonexistent"], "/nonexistent"),
    (["--plot", "/nonexistent/p.png"], "--plot /nonexistent/p.png cannot be written"),
    (["--views", "v.jpg"], "not the name of a PNG"),
    (["--json", "/"], "is a folder"),
    (["--json", ""], "--json needs the name of a file; try --json json.json"),
    (["--plot", ""], "--plot needs the name of a file; try --plot plot.png"),
    (["--plot", "a.png", "--views", "a.png"], "--views a.png: --plot writes this file too; try another name"),
    (["--json", "./b.npz", "--save", "b.npz"], "--save b.npz: --json writes this file too"),
    (["--save", "features.npy"], "not the name of a NPZ file; try features.npy.npz"),
    (["another", "--save", "f.npz"], "of one run"),
    (["another", "--neighbors", "n.png"], "of one run"),
    (["--unknown"], "--unknown"),
])
def test_bad_flags(trained, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_here("eval", [trained, *argv])
    assert is_one_line_error(result) and words in result.err


def test_figures_do_not_replace_a_checkpoint_but_older_figures(trained, tmp_path):
    """`--json runs/*/last.pt`, for example, gives it the first of the files."""
    for name in ("last.pt", "metrics.csv", "config.json"):
        path = tmp_path / name
        shutil.copy(trained / name, path)
        result = run_here("eval", [*QUICK, "--json", path, trained])
        assert is_one_line_error(result) and f"try {path}.json" in result.err
        assert path.read_bytes() == (trained / name).read_bytes()
    for content in ("", "[1]"):
        path = tmp_path / "old.json"
        path.write_text(content)
        assert run_here("eval", [*QUICK, "--json", path, trained, "--features", "H"]).status == 0
        assert json.loads(path.read_text())[0]["method"]


@pytest.mark.parametrize("kind, words", [
    ("missing", "no such file"), ("empty folder", "no last.pt"), ("truncated", "damaged"), ("random", "no checkpoint"),
    ("zero bytes", "no checkpoint"),
    ("other dict", "no checkpoint"), ("flipped bit", "damaged"), ("unknown method", "unknown method"),
    ("path as method", "unknown method"),
    ("flag missing", "'proj_hidden'"), ("other weights", "its backbone is not --backbone tiny"),
    ("other heads", "does not fit cw_rgp.py"), ("not finite", "not finite")])
def test_bad_checkpoints(trained, tmp_path, kind, words):
    path, whole = tmp_path / "last.pt", (trained / "last.pt").read_bytes()
    flags = torch.load(trained / "last.pt", weights_only=True)["args"]
    if kind == "empty folder":
        path = tmp_path
    elif kind in ("truncated", "random", "zero bytes"):
        path.write_bytes({"truncated": whole[: len(whole) // 2], "random": bytes(range(256)) * 9, "zero bytes": b""}[kind])
    elif kind == "flipped bit":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    elif kind == "other dict":
        torch.save({"model": {}, "epoch": 3}, path)
    elif kind == "not finite":
        weights = torch.load(trained / "last.pt", weights_only=True)["model"]
        changed(trained, path, model={name: w * float("nan") if w.is_floating_point() else w for name, w in weights.items()})
    elif kind != "missing":
        weights = torch.load(trained / "last.pt", weights_only=True)["model"]
        changed(trained, path, **{
            "other heads": {"model": {name: w for name, w in weights.items() if name.startswith("backbone.")}},
            "unknown method": {"args": {**flags, "method": "dino"}}, "path as method": {"args": {**flags, "method": "../common"}},
            "flag missing": {"args": {name: value for name, value in flags.items() if name != "proj_hidden"}},
            "other weights": {"model": nn.Linear(2, 2).state_dict()}}[kind])
    result = run_here("eval", [*QUICK, path])
    assert is_one_line_error(result) and words in result.err


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_malicious_pickle_is_not_executed(tmp_path):
    torch.save({"format": common.CHECKPOINT_FORMAT, "args": Payload(str(tmp_path / "executed"))}, tmp_path / "last.pt")
    assert is_one_line_error(run_here("eval", [tmp_path / "last.pt"]))
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------


def test_the_file_fits_on_a_screen():
    """At most 100 columns, no function above 50 lines, and contents that name the sections in their order."""
    text = (ROOT / "eval.py").read_text()
    assert max(map(len, text.splitlines())) <= 100
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 50
    contents = re.findall(r"^ +(\d+)  ([a-z ]+?)  ", text[:2000], re.MULTILINE)
    sections = re.findall(r"^# (\d)\. ([A-Za-z ]+)", text, re.MULTILINE)
    assert [number for number, _ in sections] == list("123456") and len(contents) == 6
    assert all(name in title.lower() for (_, name), (_, title) in zip(contents, sections))


# ------------------------------------------------------------------------------
# Training with labels
# ------------------------------------------------------------------------------


def test_the_labels_decide_what_a_classifier_learns(trained):
    """Right labels on the test images where they are right; with the rows of two classes alone it never names the others."""
    run = evaluation.load_run(str(trained), torch.device("cpu"))
    args = evaluation.parse_args([str(trained), "--precision", "fp32"])
    data = evaluation.load_data(run, args, torch.device("cpu"))
    recipe = SimpleNamespace(**{**evaluation.FINETUNE, "augment": "none"}, seed=0, precision="fp32", batch_size=16, epochs=8, num_workers=0)

    def accuracy(rows):
        backbone = evaluation.copy.deepcopy(run.model.backbone)
        layer = evaluation.train_classifier(backbone, 1024, data, rows, recipe, "test")
        h = common.extract(backbone, data, data.test)
        with torch.no_grad():
            guesses = layer(h).argmax(1)
        assert evaluation.own_accuracy(layer, h, data) == (guesses == data.test_labels).double().mean().item()
        return guesses, (guesses == data.test_labels).double().mean().item()

    assert accuracy(torch.arange(64))[1] > 0.8
    guesses, share = accuracy((data.train_labels < 2).nonzero().flatten())
    assert set(guesses.tolist()) == {0, 1} and 0.3 < share <= 0.5
    data.train_labels = 3 - data.train_labels
    assert accuracy(torch.arange(64))[1] < 0.2


def test_fine_tuning_has_at_least_so_many_whole_steps(trained, monkeypatch):
    """300 labels are one step of 256: 400 steps are 400 epochs, not 342."""
    run = evaluation.load_run(str(trained), torch.device("cpu"))
    run.h = [torch.zeros(1, 1024)]
    args = SimpleNamespace(finetune=1.0, seed=0, precision="fp32", num_workers=0)
    recipes = []
    monkeypatch.setattr(evaluation, "train_classifier", lambda _, width, __, rows, recipe, ___: recipes.append((width, len(rows), recipe.epochs)) or 1 / 0)
    for count, epochs in ((300, 400), (256, 400), (512, 200), (1000, 134), (20_000, 20)):
        with pytest.raises(ZeroDivisionError):
            evaluation.finetuned(run, SimpleNamespace(train_labels=torch.zeros(count, dtype=torch.int64)), args)
        assert recipes.pop() == (1024, count, epochs)


@pytest.mark.parametrize("epochs, steps, trained_for", [(5, 3, 5), (2, 6, 6)])
def test_fine_tuning_and_supervised_training(trained, tmp_path, monkeypatch, epochs, steps, trained_for):
    """Each beside the table with its protocol, the share of labels of each class, and the run's network as it was."""
    monkeypatch.setattr(evaluation, "FINETUNE_EPOCHS", epochs)
    monkeypatch.setattr(evaluation, "FINETUNE_STEPS", steps)  # one a step here
    result, (report,) = evaluate(tmp_path, trained, "--features", "H", "--finetune", "0.25", "--supervised")
    _, (plain,) = evaluate(tmp_path, trained, "--features", "H")
    assert report["features"] == plain["features"] and "network unchanged" in result.out
    assert report["fine-tuned"]["labels"] == 16 and 0 <= report["fine-tuned"]["accuracy"] <= 1
    assert "fine-tuned with 16 of 64 labels: " in result.out and f"{trained_for} epochs, batches of 16, Adam, lr 0.001 -> 0 cosine" in result.out
    assert set(report["supervised"]) == {"own layer", "20-NN", "linear"} and all(0 <= x <= 1 for x in report["supervised"].values())
    assert "all 64 labels; the run's views, 1 epochs" in result.out
    line = next(line for line in result.out.splitlines() if line.startswith("supervised, in "))
    assert line.count(" %") == 3
    if epochs == 2:
        _, (repeated,) = evaluate(tmp_path, trained, "--features", "H", "--finetune", "0.25", "--supervised")
        assert repeated == report  # the seed decides


def test_supervised_training_is_that_of_the_run_but_for_the_loss(trained, monkeypatch, capsys):
    """Its random start, views, batches, steps and rates."""
    run = evaluation.load_run(str(trained), torch.device("cpu"))
    args = evaluation.parse_args([str(trained), "--precision", "fp32", "--probe-epochs", "0"])
    data = evaluation.load_data(run, args, torch.device("cpu"))
    run.h = [torch.zeros(1, 1024)]
    calls, rates, augment, build = [], [], common.augment, common.build_optimizer
    monkeypatch.setattr(common, "augment", lambda batch, *more, **named: calls.append((len(batch), *more[:3], *named.values())) or augment(
        batch, *more, **named))
    monkeypatch.setattr(common, "build_optimizer", lambda model, args: rates.append((args.optimizer, args.lr, args.lr_bias)) or build(model, args))
    start = evaluation.checksum(run.untrained)
    evaluation.supervised(run, data, args)
    flags = run.args
    assert calls == [(32, flags.augment, flags.views, 32, flags.seed, step) for step in (0, 1)]
    run.args.train_images = 40
    evaluation.supervised(run, data, args)
    assert len(calls) == 3 and "random start with 40 of 64 labels" in capsys.readouterr().out
    run.args.train_images = None
    rates.pop()
    assert rates == [(flags.optimizer, flags.lr, flags.lr_bias)]
    assert evaluation.checksum(run.untrained) == start


def test_the_loss_of_training_with_labels_is_of_float32_in_bf16_too(trained, monkeypatch):
    run = evaluation.load_run(str(trained), torch.device("cpu"))
    data = evaluation.load_data(run, evaluation.parse_args([str(trained), "--precision", "fp32"]), torch.device("cpu"))
    recipe = SimpleNamespace(**evaluation.FINETUNE, seed=0, precision="bf16", batch_size=32, epochs=1, num_workers=0)
    kinds, loss = [], evaluation.F.cross_entropy
    monkeypatch.setattr(evaluation.F, "cross_entropy", lambda y, *more: kinds.append(y.dtype) or loss(y, *more))
    evaluation.train_classifier(run.model.backbone, 1024, data, torch.arange(64), recipe, "test")
    assert set(kinds) == {torch.float32}


def test_streamed_images_train_a_classifier_too(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MEMORY_LIMIT", 0)
    _, (report,) = evaluate(tmp_path, trained, "--features", "H", "--supervised", "--probe-epochs", "0", "--num-workers", "0")
    assert set(report["supervised"]) == {"own layer", "20-NN"}


def test_supervised_figures_of_a_run_on_few_images_see_their_labels_only(trained, monkeypatch):
    """With --train-images N, the vote and the probe have the N labels that the network had."""
    args = evaluation.parse_args([*map(str, QUICK), str(trained), "--features", "H", "--probe-epochs", "1"])
    run = evaluation.load_run(str(trained), torch.device("cpu"))
    data = evaluation.load_data(run, args, torch.device("cpu"))
    run.args.train_images, run.h, banks = 40, evaluation.extract(run.model.backbone, data, args, "H"), []
    monkeypatch.setattr(common, "knn_accuracy", lambda bank, labels, *_, **__: banks.append((len(bank), labels)) or 0.0)
    evaluation.supervised(run, data, args)
    ((count, labels),) = banks
    rows, _ = common.evenly_spaced(torch.arange(len(data.train_labels)), None, 40)
    assert count == 40 < len(data.train_labels) and torch.equal(labels, data.train_labels[rows])


def test_training_with_labels_needs_labels_and_a_batch_of_images(trained, small_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((small_folder / "train").rglob("*.png")):
        shutil.copy(path, flat)
    for flag in (["--supervised"], ["--finetune", "0.1"]):
        result = run_here("eval", [*QUICK, trained, "--data-dir", flat, *flag])
        assert is_one_line_error(result) and "need labelled training and test images" in result.err
    few = make_folder(tmp_path / "few", train=20, test=8)
    result = run_here("eval", [*QUICK, trained, "--data-dir", few, "--supervised"])
    assert is_one_line_error(result) and "fewer than the run's batch of 32" in result.err and "evaluated on" not in result.out
