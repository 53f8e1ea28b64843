"""The experiments that are systems of their own, beyond value and gradient (test_experiments.py):
what they keep from step to step, what their switches do, and what their sizes refuse."""

import copy
import math

import numpy as np
import pytest
import reference as ref
import simsiam
import systems
import torch
import wmse
from conftest import is_one_line_error, run_here
from experiments import find, shuffled_loss, standardised, without_a_loss
from test_experiments import (
    QUICK,
    backbone,
    checkpoint,
    close,
    conv_backbone,
    embeddings,
    generator,
    images,
    make,
    online,
    randn,
    sinkhorn_book,
    targets,
    tensors,
    unit,
    value_and_gradients,
)
from torch import nn

import common

pytestmark = pytest.mark.usefixtures("narrow_backbone")


@pytest.fixture
def argv(flags):
    return lambda method, *more: [*flags(method, *QUICK), *more]


# ---------------------------------------------------------------------- which images a batch has
def test_rows_of_are_those_of_the_batches():
    args = simsiam.Args(batch_size=6, seed=3)
    numbered = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1) * np.ones((1, 3, 32, 32), "uint8")
    args.image_size = 32
    data = common.Data(args, torch.device("cpu"), numbered, None, None, None, [])
    for epoch in range(3):
        for batch, x in enumerate(data.batches(epoch)):
            rows = systems.rows_of(data, 3 * epoch + batch)
            assert x[:, 0, 0, 0].tolist() == rows.tolist()


@pytest.mark.parametrize("name", ["simclr/deepcluster", "simsiam/moving-average-target"])
def test_a_bank_that_is_too_small_is_named(name, argv):
    more = ["--clusters", "4"] if name == "simclr/deepcluster" else []
    words = argv(name.split("/")[0], "--bank-size", "63", *more)
    result = run_here("experiments", [name, *words])
    assert is_one_line_error(result) and "try --bank-size 64" in result.err, result.err


@pytest.mark.parametrize("line,words", [
    ("simclr/deepcluster --clusters 65", "--clusters 65 are more than the 64 training images"),
    ("simclr/deepcluster --clusters 8 --bank-size 4", "--clusters 8 --bank-size 4"),
    ("simsiam/moving-average-target --no-stop-gradient", "--no-stop-gradient has no use"),
    ("simsiam/alternating --no-stop-gradient", "--no-stop-gradient has no use"),
    ("cw_rgp/icl --groups 2", "--groups must be 1"), ("moco/slow-keys --slow none", "--slow"),
    ("byol/no-batch-statistics --proj-hidden 100", "try --proj-hidden 96")])
def test_what_does_not_fit_is_named(line, words, argv):
    name, *more = line.split()
    sizes = ["--groups", "1"] if name == "cw_rgp/icl" else []
    result = run_here("experiments", [name, *argv(name.split("/")[0], *sizes, *more)])
    assert is_one_line_error(result) and words in result.err, result.err


# ---------------------------------------------------------------------- SwAV
@pytest.mark.parametrize("n,k", [(12, 4), (12, 5), (5, 9)])
def test_sinkhorn_is_the_authors_and_makes_prototypes_equally_frequent(n, k):
    scores = np.clip(randn(n, k), -1, 1)
    codes = systems.sinkhorn(torch.tensor(scores)).numpy()
    assert close(codes, sinkhorn_book(scores), 1e-12)
    assert close(codes.sum(1), np.ones(n), 1e-12)
    many = systems.sinkhorn(torch.tensor(scores), rounds=500).numpy()
    assert close(many.sum(0), np.full(k, n / k), 1e-6)
    raw = np.abs(np.exp(scores / 0.05) / np.exp(scores / 0.05).sum(1, keepdims=True))
    assert np.abs(codes.sum(0) - n / k).max() < np.abs(raw.sum(0) - n / k).max()


def test_sinkhorn_of_large_scores_is_finite():
    scores = torch.tensor([[50.0, -50.0], [-50.0, 50.0], [49.0, 48.0], [0.0, 1.0]])
    codes = systems.sinkhorn(scores)
    assert codes.isfinite().all() and close(codes.sum(1), np.ones(4), 1e-6)


def test_swav_prototypes_rest_in_the_first_epoch_and_learn_in_the_second(argv, tmp_path):
    def prototypes(epochs):
        out = tmp_path / epochs
        words = argv("simclr", "--epochs", epochs, "--out", out)
        assert run_here("experiments", ["simclr/swav", *words]).status == 0
        return checkpoint(out)["model"]["prototypes.weight"]
    args = find("simclr/swav").Args(proj_dim=32, image_size=16, proj_hidden=64)
    torch.manual_seed(0)
    start = find("simclr/swav").build(args).prototypes.weight
    assert torch.equal(prototypes("1"), start)
    assert not torch.equal(prototypes("2"), start)


def test_swav_codes_have_no_gradient_unless_asked():
    scores = torch.tensor(np.clip(randn(6, 3), -1, 1), requires_grad=True)
    assert not make("simclr/swav").codes(scores).requires_grad
    assert make("simclr/swav", no_stop_gradient=True).codes(scores).requires_grad


# ---------------------------------------------------------------------- DeepCluster
def test_k_means_finds_separate_groups():
    centres = 20 * torch.eye(4, 6)
    truth = torch.arange(40) % 4
    torch.manual_seed(3)  # four starting rows of which two may be in one group
    x = centres[truth] + 0.1 * torch.tensor(randn(40, 6), dtype=torch.float32)
    best = min((systems.k_means(x, 4) for _ in range(10)),
               key=lambda labels: sum((x[labels == c] - x[labels == c].mean(0)).square().nansum()
                                          for c in range(4)))
    for c in range(4):
        assert len(best[truth == c].unique()) == 1
    assert len(best.unique()) == 4


def test_k_means_survives_more_clusters_than_distinct_rows():
    labels = systems.k_means(torch.ones(9, 3), 5)
    assert labels.shape == (9,) and labels.dtype == torch.int64


def test_cluster_loss_gives_each_cluster_the_same_weight():
    """Eight images of cluster 0 with loss a and two of cluster 1 with loss b: (a + b) / 2."""
    scores = torch.zeros(10, 2, dtype=torch.float64)
    scores[:8, 0] = 2.0
    scores[8:, 1] = -3.0
    labels = torch.tensor([0] * 8 + [1] * 2)
    a, b = math.log(1 + math.exp(-2)), math.log(1 + math.exp(3))
    loss = systems.cluster_loss(scores, labels, torch.tensor([8, 2]))
    assert close(loss, (a + b) / 2, 1e-12)


def test_deepcluster_labels_are_k_means_of_this_epochs_z(argv, tmp_path):
    """After an epoch that begins with the start weights, the labels are those of the start."""
    words = argv("simclr", "--clusters", "4", "--lr", "1e-12")
    assert run_here("experiments", ["simclr/deepcluster", *words]).status == 0
    model = checkpoint(tmp_path / "run")["model"]
    labels, sizes = model["labels"][:64], model["sizes"]
    assert torch.equal(torch.bincount(labels, minlength=4).float(), sizes)
    assert sizes.sum() == 64 and (sizes > 0).sum() > 1
    assert not torch.equal(labels, torch.arange(64) % 4)  # with which the buffer starts


# ---------------------------------------------------------------------- banks and slow copies
def test_moving_average_keeps_the_mean_of_the_views_targets():
    model = make("simsiam/moving-average-target", bank_size=7)
    z1, z2 = tensors(*embeddings(3, 4))
    model.rows = torch.tensor([5, 1, 2])
    t1, t2 = model.averages([z1, z2])
    assert close(t1, 0.2 * unit(z1), 1e-12) and close(t2, 0.2 * unit(z2), 1e-12)
    assert close(model.bank[[5, 1, 2]], 0.1 * (unit(z1) + unit(z2)), 1e-12)
    assert model.bank[[0, 3, 4, 6]].abs().max() == 0
    again, _ = model.averages([z1, z2])
    assert close(again, 0.08 * (unit(z1) + unit(z2)) + 0.2 * unit(z1), 1e-12)


def test_alternating_with_one_step_is_simsiam():
    views, other = images(8), make("simsiam/alternating", every=1)
    torch.manual_seed(1)
    plain = simsiam.SimSiam(backbone(), 6, other.args).double().train()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, other)]
    for _ in range(3):
        losses = [model(views) for model in (plain, other)]
        assert close(losses[1], losses[0].item(), 1e-12)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_alternating_renews_its_targets_in_every_third_step():
    model = make("simsiam/alternating", every=3)
    copies = []
    for step in range(7):
        with torch.no_grad():
            for p in online(model):
                p.add_(1.0)
        model(images(8))
        kept = [t.clone() for t in targets(model)]
        fresh = all(torch.equal(a, b) for a, b in zip(kept, online(model), strict=True))
        assert fresh == (step % 3 == 0)
        copies.append(kept[0])
    assert torch.equal(copies[0], copies[2]) and torch.equal(copies[3], copies[5])


@pytest.mark.parametrize("slow", ["positives", "negatives"])
def test_slow_keys_queue_has_the_other_networks_keys(slow):
    views = images(4)
    model = make("moco/slow-keys", slow=slow)
    twin = copy.deepcopy(model)
    twin.update_target()
    networks = twin.target_projector, twin.target_backbone
    if slow == "positives":
        networks = twin.projector, twin.backbone
    with torch.no_grad():
        twin.backbone(views[0])  # the query, which moves running figures only
        keys = nn.functional.normalize(networks[0](networks[1](views[1])), dim=1)
    model(views)
    assert close(model.queue[-4:], keys, 1e-9)


def test_byol_without_batch_statistics_sees_no_batch_and_keeps_its_names():
    model = make("byol/no-batch-statistics", conv_backbone)
    views = images(6)
    one_by_one = [model([v[i:i + 1] for v in views]).item() for i in range(6)]
    assert close(model(views), np.mean(one_by_one), 1e-12)
    names = make("byol/linear-predictor", conv_backbone).backbone.state_dict().keys()
    assert model.backbone.state_dict().keys() == names


def test_standardised_weights_have_mean_0_and_variance_1_and_no_scale():
    weight = torch.tensor(randn(5, 3, 2, 2))
    rows = standardised(weight).flatten(1)
    assert close(rows.mean(1), np.zeros(5), 1e-12)
    assert close(rows.var(1, unbiased=False), np.ones(5), 1e-4)
    assert close(standardised(7 * weight + 3), standardised(weight).numpy(), 1e-4)


# ---------------------------------------------------------------------- DINO, UniGrad
def test_dino_centre_is_a_moving_mean_that_the_next_step_uses():
    model = make("byol/dino")
    first, second = tensors(*embeddings(6, 4))
    model.sharpened([first, second])
    mean = (first.mean(0) + second.mean(0)) / 2
    assert close(model.centre, 0.1 * mean, 1e-12)
    got = model.sharpened([first])[0]
    assert close(got, ((first - 0.1 * mean) / 0.04).softmax(1).numpy(), 1e-12)
    bare = make("byol/dino", no_centering=True)
    bare.sharpened([first, second])
    assert bare.centre.abs().max() == 0


def test_dino_constant_output_without_one_of_the_two():
    """E6: centring alone makes a constant target uniform, sharpening alone makes it one-hot."""
    constant = torch.tensor([0.9, 0.1, -0.2, 0.0], dtype=torch.float64).expand(5, 4)

    def entropy(**flags):
        model = make("byol/dino", **flags)
        for _ in range(200):
            target = model.sharpened([constant])[0]
        return -(target * target.log()).sum(1).mean().item()
    assert abs(entropy(no_sharpening=True) - math.log(4)) < 1e-6
    assert entropy(no_centering=True) < 1e-6


def test_unigrad_gradient_of_a_unit_row_is_the_papers():
    z, target = embeddings(5, 4)
    f = ref.second_moment(unit(randn(7, 4)), 7)
    got = value_and_gradients(
        lambda a: systems.unigrad_loss(a, torch.tensor(target), torch.tensor(f), 9.0), [z])[1][0]
    free = (-unit(target) + 9.0 * unit(z) @ f) / 5
    assert close(got, ref.through_unit_rows(z, free), 1e-12)


def test_unigrad_correlation_is_a_slow_average_of_the_targets():
    model = make("byol/unigrad")
    z = tensors(*embeddings(6, 4))
    rows = np.concatenate([unit(v) for v in z])
    once = 0.99 * np.eye(4) / 4 + 0.01 * rows.T @ rows / 12
    assert close(model.correlate(z), once, 1e-12)
    assert close(model.correlate(z), 0.99 * once + 0.01 * rows.T @ rows / 12, 1e-12)
    assert close(model.correlation.trace(), 1.0, 1e-12)  # of unit rows


# ---------------------------------------------------------------------- whitening
@pytest.mark.parametrize("kind,floor", [("zca", 0.0), ("cholesky", 0.3), ("pca", 1.5)])
def test_shuffled_channels_set_equal_views_apart_unless_zca(kind, floor):
    """The artefact of the released code. Without the shuffle the loss is 0."""
    z = torch.tensor(embeddings(64, 8)[0])
    plain = wmse.wmse_loss([z, z.clone()], 64, 1, kind).item()
    shuffled = shuffled_loss([z, z.clone()], 64, 1, kind, 0.0, generator(1)).item()
    assert abs(plain) < 1e-10
    assert shuffled > floor if floor else abs(shuffled) < 1e-10


def test_without_a_closed_form():
    """2 / N (-k_n + lambda sum_b (k_n.k_b / N) q_b), through the standardisation."""
    z1, z2 = embeddings(6, 4)
    q, k = ref.standardise(z1), ref.standardise(z2)
    free = 2 / 6 * (-k + 0.3 * k @ k.T @ q / 6)
    got = value_and_gradients(lambda a, b: without_a_loss(a, b, 0.3), [z1, z2])[1][0]
    assert close(got, ref.through_standardise(z1, free), 1e-10)


def test_cca_ssg_by_hand():
    z = tensors([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])[0]  # standardised and uncorrelated
    assert close(systems.cca_ssg_loss(z, z, 1.0), -2.0, 1e-4)
    same = z[:, [0, 0]]  # two equal channels: I - Z^T Z / N has two entries of -1
    assert close(systems.cca_ssg_loss(z, same, 0.5), -1.0 + 0.5 * 2, 1e-4)


def test_icl_whitens_samples_but_for_eps_and_detaches_the_matrix():
    z = torch.tensor(embeddings(4, 12)[0])
    y = systems.icl_whiten(z, eps=0.0)
    assert close(y @ y.T / 11, np.eye(4), 1e-3)
    assert not close(systems.icl_whiten(z, eps=0.3) @ y.T / 11, np.eye(4), 1e-2)
    z.requires_grad_()
    gradient = torch.autograd.grad(systems.icl_whiten(z)[0, 0], z)[0]
    assert close(gradient.sum(1), np.zeros(4), 1e-12) and gradient.abs().max() > 0


def test_wrong_sizes_of_icl_are_named():
    with pytest.raises(ValueError, match="w_size"):
        systems.icl_loss(tensors(*embeddings(10, 8)), 4)
