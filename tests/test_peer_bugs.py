"""Mistakes that other implementations make, one test each, named after where they were seen.

Each test writes the mistake out, shows that it differs from the reference (tests/reference.py), then holds our code to the
reference. Value-only tests miss half of them: most compare gradients."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import barlow
import byol
import common
import cw_rgp
import moco
import reference as ref
import shuffled_dbn
import simclr
import simsiam
import vicreg
import wmse

SIZE_ERRORS = (ValueError, AssertionError, SystemExit)                       # what a size check may raise


# ---------------------------------------------------------------------------------------------- helpers
def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(np.asarray(a), dtype=dtype) for a in arrays]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def value_and_grads(f, arrays, dtype=torch.float64):
    """f(*tensors) and its gradients as numpy; an input without gradient reports None."""
    leaves = [a.requires_grad_() for a in tensors(*arrays, dtype=dtype)]
    loss = f(*leaves)
    loss.backward()
    return loss.item(), [None if a.grad is None else a.grad.double().numpy() for a in leaves]


def same(a, b, tol=1e-6):
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return bool(np.isfinite(a).all()) and bool(np.max(np.abs(a - b)) <= tol * max(1.0, np.max(np.abs(b))))


def assert_ours(ours, reference, arrays, tol=1e-6):
    """Value and every gradient of our torch function against the slow numpy one."""
    value, grads = value_and_grads(ours, arrays)
    assert same(value, reference(*arrays), tol), (value, reference(*arrays))
    for i, (got, want) in enumerate(zip(grads, ref.numeric_gradient(reference, arrays))):
        assert got is not None, f"argument {i} gets no gradient"
        assert same(got, want, tol), f"gradient of argument {i} is off by {np.max(np.abs(got - want))}"


def toy_backbone(features=6):
    """No batch statistics, so that what is tested does not depend on how views are batched."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, features)).double()


def images(n, seed=0):
    return torch.tensor(randn(n, 3, 4, 4, seed=seed))


def leaves(module):
    return [m for m in module.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]


def standardise(z):
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def off_diagonal(c):
    return c - torch.diag(torch.diag(c))


def whitened(z, root):
    """Batch whitening written in torch; root: covariance -> matrix applied to each row."""
    x = z - z.mean(0)
    return x @ root(x.T @ x / (len(x) - 1)).T


def inverse_cholesky(sigma):
    return torch.linalg.inv(torch.linalg.cholesky(sigma))


def naive_zca(sigma):
    values, vectors = torch.linalg.eigh(sigma)
    return vectors @ torch.diag(values ** -0.5) @ vectors.T


def cosine_distance(a, b):
    return (2 - 2 * F.cosine_similarity(a, b)).mean()


def splits(n, size):
    """All ways to cut range(n) into sets of `size`, the order of sets and members aside."""
    def cut(rest):
        if not rest:
            yield []
        for mates in itertools.combinations(rest[1:], size - 1):
            block = (rest[0], *mates)
            for others in cut([i for i in rest if i not in block]):
                yield [block, *others]
    return list(cut(list(range(n))))


def which(value, candidates, tol=1e-9):
    """Index of the only candidate equal to value, or None."""
    hits = [i for i, c in enumerate(candidates) if abs(value - c) < tol]
    return hits[0] if len(hits) == 1 else None


# ---------------------------------------------------------------------------------------------- SimCLR
def nt_xent_ours(a, b):
    return simclr.nt_xent_loss(a, b, 0.5)


def test_google_simclr_is_twice_the_paper():
    """google-research/simclr returns loss_a + loss_b, each a mean over N: twice the paper's mean over 2N anchors."""
    z1, z2 = randn(5, 4), randn(5, 4, seed=1)

    def buggy(a, b):
        a, b = F.normalize(a), F.normalize(b)
        no_self, label = torch.eye(5, dtype=a.dtype) * 1e9, torch.arange(5)
        loss_a = F.cross_entropy(torch.cat([a @ b.T, a @ a.T - no_self], 1) / 0.5, label)
        loss_b = F.cross_entropy(torch.cat([b @ a.T, b @ b.T - no_self], 1) / 0.5, label)
        return loss_a + loss_b
    paper = lambda a, b: ref.nt_xent([a, b], 0.5)
    assert same(buggy(*tensors(z1, z2)).item(), 2 * paper(z1, z2))
    assert_ours(nt_xent_ours, paper, [z1, z2])


def test_leftthomas_and_solo_learn_exp_overflows_at_small_temperature():
    """exp() and sum without log-sum-exp: inf / inf in float32 once 1 / T > 88."""
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    a, b = tensors(z1, z2, dtype=torch.float32)
    z = F.normalize(torch.cat([a, b]))
    similarity = torch.exp(z @ z.T / 0.005) * (1 - torch.eye(12))
    buggy = -torch.log(torch.exp((F.normalize(a) * F.normalize(b)).sum(1) / 0.005).repeat(2) / similarity.sum(1)).mean()
    assert not torch.isfinite(buggy)
    value, grads = value_and_grads(lambda a, b: simclr.nt_xent_loss(a, b, 0.005), [z1, z2], torch.float32)
    assert same(value, ref.nt_xent([z1, z2], 0.005), 1e-4) and all(np.isfinite(g).all() for g in grads)


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.untyped_storage().nbytes())
        return out


def test_patrickhua_nt_xent_broadcasts_2n_2n_d():
    """F.cosine_similarity(z[:, None], z[None]) holds a [2N, 2N, d] tensor: a gigabyte at N = 512, d = 256."""
    a, b = tensors(randn(16, 64), randn(16, 64, seed=1))
    square = 8 * 32 * 32                                                     # bytes of [2N, 2N] in float64
    z = torch.cat([a, b])
    with LargestStorage() as seen:
        F.cosine_similarity(z[:, None], z[None], dim=-1)
    assert seen.largest >= 64 * square
    a.requires_grad_()
    with LargestStorage() as seen:
        nt_xent_ours(a, b).backward()
    assert seen.largest <= 4 * square


def test_solo_learn_sums_positives_inside_the_log():
    """With three views solo-learn puts the sum over positives inside the log; the mean over pairs of views is meant."""
    views = [images(5, seed=s) for s in range(3)]
    model = simclr.SimCLR(toy_backbone(), 6, simclr.Args()).double().train()
    model.projector = nn.Identity()
    pairs = [model([views[i], views[j]]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    z = F.normalize(torch.cat([model.backbone(v) for v in views]))
    similarity = torch.exp(z @ z.T / 0.5) * (1 - torch.eye(15, dtype=z.dtype))
    positive = (torch.arange(15)[:, None] % 5 == torch.arange(15)[None] % 5).double() - torch.eye(15, dtype=z.dtype)
    buggy = -torch.log((similarity * positive).sum(1) / similarity.sum(1)).mean().item()
    correct = ref.nt_xent([model.backbone(v) for v in views], 0.5)
    assert abs(buggy - correct) > 1e-2
    assert same(model(views).item(), np.mean(pairs))


# ---------------------------------------------------------------------------------------------- MoCo
def toy_moco(queue_size=12):
    """A MoCo whose key network differs from its query network, at momentum one half."""
    torch.manual_seed(0)
    model = moco.MoCo(toy_backbone(), 6, moco.Args(queue_size=queue_size, momentum=0.5, temperature=0.2)).double().train()
    with torch.no_grad():
        for p in target_parameters(model):
            p.add_(torch.tensor(0.3 * randn(*p.shape, seed=4)))
    return model


def query_parameters(model):
    return [*model.backbone.parameters(), *model.projector.parameters()]


def moco_step(model, views):
    """One step by the book, on a copy: loss, keys, key network before any of it is applied to `model`."""
    book = copy.deepcopy(model)
    with torch.no_grad():
        old_keys = F.normalize(book.target_projector(book.target_backbone(views[1])))
        q = F.normalize(book.projector(book.backbone(views[0])))
        for k, p in zip(target_parameters(book), query_parameters(book)):
            k.lerp_(p, 0.5)
        keys = F.normalize(book.target_projector(book.target_backbone(views[1])))
    return book, q, old_keys, keys


def test_moco_key_network_moves_before_it_encodes():
    """The EMA comes first, then the keys are encoded with the new key network, without gradient."""
    model, views = toy_moco(), [images(4), images(4, seed=1)]
    book, q, old_keys, keys = moco_step(model, views)
    queue = model.queue.clone()
    buggy, right = ref.info_nce(q, old_keys, queue, 0.2), ref.info_nce(q, keys, queue, 0.2)
    assert abs(buggy - right) > 1e-3
    loss = model(views)
    assert same(loss.item(), right)
    assert all(torch.allclose(a, b) for a, b in zip(target_parameters(model), target_parameters(book)))
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in target_parameters(model))
    assert all(p.grad is not None and p.grad.any() for p in query_parameters(model))


def test_moco_enqueues_after_the_logits():
    """Enqueued first, each key would be its own query's negative."""
    model, views = toy_moco(), [images(4), images(4, seed=1)]
    _, q, _, keys = moco_step(model, views)
    queue = model.queue.clone()
    early = torch.cat([queue[4:], keys])
    right = ref.info_nce(q, keys, queue, 0.2)
    assert abs(ref.info_nce(q, keys, early, 0.2) - right) > 1e-2
    assert same(model(views).item(), right)
    assert torch.equal(model.queue[:8], queue[4:])                            # the four oldest have left
    assert torch.allclose(model.queue[8:], keys)                             # then in, unit rows, in the images' order
    for _ in range(2):                                                       # first in, first out: three batches fill it
        before = model.queue.clone()
        model(views)
        assert torch.equal(model.queue[:8], before[4:]) and (model.queue[8:] != before[8:]).any(1).all()
    assert not torch.cdist(model.queue, queue).eq(0).any() and torch.allclose(model.queue[:4], keys) and not model.queue.requires_grad


def test_moco_rebinds_key_parameters():
    """official and solo-learn write `param_k.data = ...`: new storage at every step, which compile, DDP and saved references miss."""
    parameter = nn.Parameter(torch.ones(3))
    address = parameter.data_ptr()
    parameter.data = parameter.data * 0.9 + torch.zeros(3) * 0.1
    assert parameter.data_ptr() != address
    model = toy_moco()
    addresses = [p.data_ptr() for p in target_parameters(model)]
    before = [p.clone() for p in target_parameters(model)]
    model([images(4), images(4, seed=1)])
    assert addresses == [p.data_ptr() for p in target_parameters(model)]
    assert all(not torch.equal(a, b) for a, b in zip(before, target_parameters(model)))


def test_moco_averages_batch_norm_buffers():
    """The EMA is over parameters; the key network's BN statistics come from its own forwards."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6)).double()
    model = moco.MoCo(backbone, 6, moco.Args(queue_size=12, momentum=0.5, temperature=0.2)).double().train()
    model.backbone[2].running_mean.fill_(1000.0)
    model([images(4), images(4, seed=1)])
    mixed = 0.5 * 900.0
    assert model.target_backbone[2].running_mean.abs().max() < 100 < mixed


def test_moco_queue_without_unit_rows():
    """torch.randn(K, d) without normalising: the first negatives have logits of size sqrt(d) / T."""
    buggy = torch.randn(12, 128)
    assert (buggy.norm(dim=1) - 1).abs().max() > 1
    queue = moco.MoCo(toy_backbone(), 6, moco.Args(queue_size=12)).queue
    assert queue.shape[0] == 12 and torch.allclose(queue.norm(dim=1), torch.ones(12, dtype=queue.dtype), atol=1e-5)


def test_moco_queue_not_a_multiple_of_the_batch():
    """K % batch != 0 (or a last partial batch) makes the pointer run over the end. Ours has no pointer: the newest K keys in order."""
    queue, keys, pointer = torch.zeros(12, 2), torch.ones(5, 2), 10
    with pytest.raises(RuntimeError):
        queue[pointer:pointer + 5] = keys
    for size, batches in ((12, (5, 5, 5)), (12, (5, 4, 7)), (3, (5, 5)), (5, (5, 2))):
        model = toy_moco(size)
        history = [model.queue.clone()]
        for seed, n in enumerate(batches):
            views = [images(n, seed=seed), images(n, seed=seed + 1)]
            history.append(moco_step(model, views)[3])
            model(views)
            assert torch.allclose(model.queue, torch.cat(history)[-size:]) and len(model.queue) == size


def test_moco_normalises_by_hand_only_one_side():
    """info_nce_loss normalises q and k itself; keys and queue are constants."""
    q, k, queue = randn(4, 3), 3 * randn(4, 3, seed=1), ref.unit_rows(randn(6, 3, seed=2))
    buggy = F.cross_entropy(torch.cat([(F.normalize(torch.tensor(q)) * torch.tensor(k)).sum(1, keepdim=True),
                                       F.normalize(torch.tensor(q)) @ torch.tensor(queue).T], 1) / 0.2, torch.zeros(4).long())
    assert abs(buggy.item() - ref.info_nce(q, k, queue, 0.2)) > 1e-3
    assert_ours(lambda q: moco.info_nce_loss(q, *tensors(k, queue), 0.2), lambda q: ref.info_nce(q, k, queue, 0.2), [q])
    closed_form = ref.through_unit_rows(q, ref.moco_gradient(ref.unit_rows(q), ref.unit_rows(k), queue, 0.2))
    assert same(value_and_grads(lambda q: moco.info_nce_loss(q, *tensors(k, queue), 0.2), [q])[1][0], closed_form)


def test_lightly_moco_example_borrows_simclr_temperature_and_byol_momentum():
    """lightly's example runs at the class default T = 0.5 and with BYOL's schedule 0.996 -> 1; MoCo: T <= 0.2, m constant."""
    assert abs(ref.byol_momentum(0.996, 0.5) - 0.996) > 1e-3
    model = moco.MoCo(toy_backbone(), 6, moco.Args(queue_size=12)).double().train()
    assert model.args.temperature <= 0.2
    momentum = model.args.momentum
    with torch.no_grad():
        for p in target_parameters(model):
            p.add_(torch.tensor(randn(*p.shape, seed=4)))
    for _ in range(3):
        assert abs(momentum_used(model, lambda: model([images(4), images(4, seed=1)])) - momentum) < 1e-9
    assert model.args.momentum == momentum


# ---------------------------------------------------------------------------------------------- BYOL
def toy_byol(**options):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6)).double()
    model = byol.BYOL(backbone, 6, byol.Args(**options)).double().train()
    with torch.no_grad():
        for p in target_parameters(model):
            p.add_(torch.tensor(randn(*p.shape, seed=3)))
    return model


def target_parameters(model):
    return [*model.target_backbone.parameters(), *model.target_projector.parameters()]


def momentum_used(model, step):
    """tau that `step`, or update_target at that progress, applied, read off the parameters: (new - online) / (old - online)."""
    old = [p.clone() for p in target_parameters(model)]
    step() if callable(step) else model.update_target(step)
    tau = torch.cat([((new - p) / (o - p)).flatten()
                     for new, o, p in zip(target_parameters(model), old, query_parameters(model))]).detach()
    assert (tau - tau.median()).abs().max() < 1e-6, "all target parameters move by the same tau"
    return tau.median().item()


def test_htdt_cw_rgp_and_lightly_step_byol_momentum_per_epoch():
    """tau_k = 1 - (1 - tau)(cos(pi k / K) + 1) / 2 with k in steps; whole epochs hold it still for thousands of steps."""
    steps, per_epoch = 40, 10
    per_step = [ref.byol_momentum(0.99, k / steps) for k in range(steps + 1)]
    buggy = [ref.byol_momentum(0.99, k // per_epoch * per_epoch / steps) for k in range(steps + 1)]
    assert max(abs(a - b) for a, b in zip(per_step, buggy)) > 1e-3
    model = toy_byol(momentum=0.99)
    assert same([momentum_used(copy.deepcopy(model), k / steps) for k in range(steps + 1)], per_step, 1e-12)
    model = toy_byol(momentum=0.996)
    assert same([momentum_used(copy.deepcopy(model), 0), momentum_used(copy.deepcopy(model), 1)], [0.996, 1], 1e-12)


def test_lucidrains_byol_momentum_is_constant():
    """A constant 0.99 never lets the target settle; update_target follows the schedule and stands still at the end."""
    base = momentum_used(toy_byol(), 0.0)
    assert 0.9 <= base < 1
    for progress in (0.3, 0.5, 0.81):
        used = momentum_used(toy_byol(), progress)
        assert abs(used - base) > 1e-4 and abs(used - ref.byol_momentum(base, progress)) < 1e-6
    assert abs(momentum_used(toy_byol(), 1.0) - 1) < 1e-9


def test_byol_averages_batch_norm_buffers():
    """An EMA over state_dict() also blends running statistics (and the integer counter); parameters only are meant."""
    model = toy_byol()
    online, target = model.backbone[2], model.target_backbone[2]
    online.running_mean.fill_(5.0), target.running_mean.fill_(-3.0)
    online.num_batches_tracked.fill_(70), target.num_batches_tracked.fill_(7)
    buggy = 0.99 * target.running_mean + 0.01 * online.running_mean
    assert (buggy - target.running_mean).abs().max() > 1e-2
    kept = [b.clone() for b in [*model.target_backbone.buffers(), *model.target_projector.buffers()]]
    model.update_target(0.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, [*model.target_backbone.buffers(), *model.target_projector.buffers()]))


def test_byol_target_is_updated_in_place_and_without_graph():
    model = toy_byol()
    addresses = [p.data_ptr() for p in target_parameters(model)]
    model.update_target(0.5)
    assert addresses == [p.data_ptr() for p in target_parameters(model)]
    assert all(p.is_leaf and p.grad_fn is None for p in target_parameters(model))


def linear_byol():
    """Backbone, heads and target without batch statistics, all different."""
    torch.manual_seed(1)
    model = byol.BYOL(toy_backbone(), 6, byol.Args()).double().train()
    model.projector, model.predictor, model.target_projector = [nn.Linear(6, 6).double() for _ in range(3)]
    model.target_projector.requires_grad_(False)
    return model


def test_lightly_byol_is_half_a_sum_of_negative_cosines():
    """The paper sums 2 - 2cos over both directions; lightly's half sum of -cos has a quarter of the gradient."""
    model, views = linear_byol(), [images(5), images(5, seed=1)]
    with torch.no_grad():
        p = [model.predictor(model.projector(model.backbone(v))).numpy() for v in views]
        z = [model.target_projector(model.target_backbone(v)).numpy() for v in views]
    right = ref.byol(p[0], z[1]) + ref.byol(p[1], z[0])
    buggy = (ref.negative_cosine(p[0], z[1]) + ref.negative_cosine(p[1], z[0])) / 2
    assert abs(buggy - right) > 1e-2
    loss = model(views)
    assert same(loss.item(), right)
    loss.backward()
    assert all(q.grad is None or not q.grad.any() for q in target_parameters(model))
    p, z = randn(5, 4), randn(5, 4, seed=1)
    assert_ours(lambda p: byol.byol_loss(p, torch.tensor(z)), lambda p: ref.byol(p, z), [p])


# ---------------------------------------------------------------------------------------------- SimSiam
def test_patrickhua_simsiam_projector_ends_in_affine_bn():
    """Official: the projector's last BN has affine=False. PatrickHua leaves it on and sizes it by the hidden width."""
    assert nn.BatchNorm1d(8).affine
    projector = leaves(simsiam.SimSiam(toy_backbone(), 6, simsiam.Args()).projector)
    linear = [m for m in projector if isinstance(m, nn.Linear)][-1]
    assert isinstance(projector[-1], (nn.BatchNorm1d, nn.SyncBatchNorm)) and not projector[-1].affine
    assert projector[-1].num_features == linear.out_features


def test_simsiam_predictor_with_bn_on_its_output():
    """BN on the predictor's output makes training unstable: one BN, hidden, then a Linear with bias and nothing after."""
    model = simsiam.SimSiam(toy_backbone(), 6, simsiam.Args())
    predictor = leaves(model.predictor)
    assert isinstance(predictor[-1], nn.Linear) and predictor[-1].bias is not None
    assert sum(isinstance(m, (nn.BatchNorm1d, nn.SyncBatchNorm)) for m in predictor) == 1
    assert predictor[-1].out_features == [m for m in leaves(model.projector) if isinstance(m, nn.Linear)][-1].out_features


def test_simsiam_detaches_the_wrong_side():
    """Stop-gradient belongs on z. On p the predictor never learns; on neither the network collapses. The value is the same."""
    torch.manual_seed(2)
    model, views = simsiam.SimSiam(toy_backbone(), 6, simsiam.Args()).double().train(), [images(5), images(5, seed=1)]
    model.projector, model.predictor = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()

    def gradients(on_p, on_z):
        model.zero_grad()
        z = [model.projector(model.backbone(v)) for v in views]
        p = [model.predictor(a) for a in z]
        stop = lambda x, yes: x.detach() if yes else x
        loss = -sum(F.cosine_similarity(stop(p[i], on_p), stop(z[1 - i], on_z)).mean() for i in (0, 1)) / 2
        loss.backward()
        return loss.item(), [None if q.grad is None else q.grad.numpy().copy() for q in model.parameters()]
    right, wrong, neither = gradients(False, True), gradients(True, False), gradients(False, False)
    assert same(right[0], wrong[0]) and same(right[0], neither[0])
    for bad in (wrong, neither):
        assert not all(same(a, b, 1e-3) for a, b in zip(bad[1], right[1]))
    model.zero_grad()
    loss = model(views)
    loss.backward()
    assert same(loss.item(), right[0])
    assert all(same(q.grad.numpy(), g) for q, g in zip(model.parameters(), right[1]))
    p, z = randn(5, 4), randn(5, 4, seed=1)
    assert_ours(lambda p: simsiam.negative_cosine(p, torch.tensor(z)), lambda p: ref.negative_cosine(p, z), [p])


# ---------------------------------------------------------------------------------------------- Barlow Twins
def barlow_pair(a, b):
    return barlow.barlow_twins_loss(a, b, 0.0051)


def barlow_book(a, b):
    return ref.barlow(a, b, 0.0051)


def barlow_of(c, lambd=0.0051):
    return ((torch.diag(c) - 1) ** 2).sum() + lambd * (off_diagonal(c) ** 2).sum()


def test_stable_pretraining_barlow_unbiased_std():
    """std with N - 1 and C / N: the diagonal stops at (N - 1) / N and the minimum is d / N^2, not 0."""
    z = np.linalg.qr(randn(8, 8) * [0, 1, 1, 1, 0, 0, 0, 0] + np.ones((8, 1)))[0][:, 1:4] * 50   # decorrelated, centred
    t = torch.tensor(z)
    buggy = barlow_of(((t - t.mean(0)) / t.std(0)).T @ ((t - t.mean(0)) / t.std(0)) / 8).item()
    assert same(buggy, 3 / 64, 1e-5) and ref.barlow(z, z, 0.0051) < 1e-8
    assert barlow.barlow_twins_loss(t, t, 0.0051).item() < 1e-8
    assert_ours(barlow_pair, barlow_book, [randn(7, 4), randn(7, 4, seed=1)])


def test_cw_rgp_repo_barlow_divides_by_d():
    """winci-ai/CW-RGP divides by len(z1[0]) = d: right only when the batch happens to be as large as the embedding."""
    z1 = randn(6, 12)
    z2 = z1 + 0.1 * randn(6, 12, seed=1)
    c = standardise(torch.tensor(z1)).T @ standardise(torch.tensor(z2)) / 12
    assert abs(torch.diag(c).mean().item() - 0.5) < 0.02                     # N / d
    assert abs(barlow_of(c).item() - barlow_book(z1, z2)) > 1
    assert_ours(barlow_pair, barlow_book, [z1, z2])


def test_cw_rgp_repo_barlow_has_learnable_bn():
    """BN with affine lets gamma and beta change the 'correlation'. Ours has no parameter there, and feature scale is void."""
    z1, z2 = tensors(randn(9, 3), randn(9, 3, seed=1))
    c = (1.7 * standardise(z1) + 0.4).T @ (1.7 * standardise(z2) + 0.4) / 9
    assert abs(barlow_of(c).item() - barlow_book(z1.numpy(), z2.numpy())) > 0.1
    scale, shift = torch.tensor([1000.0, 2000.0, 3000.0]).double(), torch.tensor([5.0, -70.0, 0.0]).double()
    a, b = barlow_pair(1000 * z1, 1000 * z2).item(), barlow_pair(scale * z1 + shift, scale * z2 + shift).item()
    assert same(a, b, 1e-8)
    model = barlow.BarlowTwins(toy_backbone(), 6, barlow.Args())
    assert all(name.split(".")[0] in ("backbone", "projector") for name, _ in model.named_parameters())
    assert isinstance(leaves(model.projector)[-1], nn.Linear)


def test_lightly_and_solo_learn_barlow_standardise_per_rank():
    """Gathering without synchronised BN standardises each rank's rows alone; the loss of the global batch is meant."""
    z1, z2 = randn(8, 3) + np.repeat([[0.0], [3.0]], 4, 0), randn(8, 3, seed=1) + np.repeat([[0.0], [3.0]], 4, 0)
    ranks = [torch.cat([standardise(torch.tensor(z[:4])), standardise(torch.tensor(z[4:]))]) for z in (z1, z2)]
    assert abs(barlow_of(ranks[0].T @ ranks[1] / 8).item() - barlow_book(z1, z2)) > 1e-2
    assert_ours(barlow_pair, barlow_book, [z1, z2])


def test_barlow_official_last_batch_divided_by_nominal_size():
    """No drop_last, yet C is divided by the nominal batch size: a short last batch has a diagonal below one."""
    z = randn(5, 3)
    c = standardise(torch.tensor(z)).T @ standardise(torch.tensor(z)) / 8
    assert abs(torch.diag(c).max().item() - 5 / 8) < 1e-3
    assert abs(barlow_of(c).item() - barlow_book(z, z)) > 0.1
    assert_ours(barlow_pair, barlow_book, [z, randn(5, 3, seed=1)])


# ---------------------------------------------------------------------------------------------- VICReg
def vicreg_of(z1, z2, half=True, eps_inside=True, unbiased=True, centre=True, per_feature=True, divisor=None):
    """The loss with one switch per mistake (25, 25, 1)."""
    def variance(z):
        v = z.var(0, unbiased=unbiased)
        return F.relu(1 - ((v + 1e-4).sqrt() if eps_inside else v.sqrt() + 1e-4)).mean()

    def covariance(z):
        x = z - z.mean(0) if centre else z
        return (off_diagonal(x.T @ x / (divisor or len(x) - 1)) ** 2).sum() / z.shape[1]
    inv = F.mse_loss(z1, z2) if per_feature else ((z1 - z2) ** 2).sum(1).mean()
    return 25 * inv + 25 * (variance(z1) + variance(z2)) * (0.5 if half else 1) + covariance(z1) + covariance(z2)


VICREG_BUGS = {
    "solo_learn_and_cw_rgp_double_variance_weight": dict(half=False),
    "biased_variance": dict(unbiased=False),
    "eps_outside_the_root": dict(eps_inside=False),
    "covariance_without_centring": dict(centre=False),
    "covariance_divided_by_n": dict(divisor=7),
    "covariance_divided_by_nominal_batch": dict(divisor=15),
    "invariance_summed_over_features": dict(per_feature=False),
}


@pytest.mark.parametrize("bug", VICREG_BUGS)
def test_vicreg(bug):
    z1, z2 = 0.6 * randn(7, 4) + 0.5, 0.6 * randn(7, 4, seed=1) + 0.5
    book = lambda a, b: ref.vicreg(a, b, 25, 25, 1)
    assert same(vicreg_of(*tensors(z1, z2)).item(), book(z1, z2))
    assert abs(vicreg_of(*tensors(z1, z2), **VICREG_BUGS[bug]).item() - book(z1, z2)) > 1e-4
    ours = lambda a, b: vicreg.vicreg_loss(a, b, 25, 25, 1)
    assert_ours(ours, book, [z1, z2], 1e-5)
    assert all(same(g, c) for g, c in zip(value_and_grads(ours, [z1, z2])[1], ref.vicreg_gradient(z1, z2, 25, 25, 1)))


def test_vicreg_gradient_of_a_collapsed_batch():
    """sqrt(var) without the eps inside has an infinite slope at a constant; collapse is where the variance term must push."""
    z = np.ones((6, 3))
    _, bad = value_and_grads(lambda a: vicreg_of(a, a, eps_inside=False), [z])
    assert not np.isfinite(bad[0]).all()
    _, grads = value_and_grads(lambda a: vicreg.vicreg_loss(a, a, 25, 25, 1), [z])
    assert np.isfinite(grads[0]).all()


# ---------------------------------------------------------------------------------------------- W-MSE
def wmse_ours(*views):
    """One slice holding the whole batch: the random partition then has nothing to choose."""
    return wmse.wmse_loss(list(views), len(views[0]), 1, "cholesky", 0, generator())


def wmse_book(*views):
    return ref.wmse(list(views), [[np.arange(len(views[0]))]])


def test_solo_learn_wmse_detaches_one_view():
    """The default 'simplified' cosine detaches view 2: same value, but one branch of the network gets no gradient."""
    z1, z2 = randn(9, 3), randn(9, 3, seed=1)

    def buggy(a, b):
        a, b = whitened(a, inverse_cholesky), whitened(b, inverse_cholesky)
        return 2 - 2 * (F.normalize(a) * F.normalize(b.detach())).sum(1).mean()
    value, grads = value_and_grads(buggy, [z1, z2])
    assert same(value, wmse_book(z1, z2)) and grads[1] is None
    assert_ours(wmse_ours, wmse_book, [z1, z2])


def test_stable_pretraining_wmse_is_zca():
    """W-MSE whitens with Cholesky's L^-1; ZCA is another method's choice and another loss."""
    z1, z2 = randn(9, 3) @ randn(3, 3), randn(9, 3, seed=1) @ randn(3, 3)
    buggy = cosine_distance(*(whitened(z, naive_zca) for z in tensors(z1, z2))).item()
    assert abs(buggy - wmse_book(z1, z2)) > 1e-3
    assert same(wmse_ours(*tensors(z1, z2)).item(), wmse_book(z1, z2))
    for kind in ("cholesky", "zca", "bn", "none"):
        for eps in (0, 0.1):
            assert same(wmse.whiten(torch.tensor(z1), kind, eps).numpy(), ref.whiten(z1, kind, eps)), (kind, eps)
    ours, book = wmse.whiten(torch.tensor(z1), "pca", 0).numpy(), ref.whiten(z1, "pca")
    assert same(ours.T @ ours / 8, np.eye(3))
    match = np.abs(ours.T @ book / 8)                                        # PCA: the same axes, but for sign and order
    assert same(match.max(0), np.ones(3)) and same(match.sum(0), np.ones(3))


def test_stable_pretraining_wmse_whitens_views_jointly():
    """One mean and one covariance for both views: neither view is white alone, and a shift between the views survives."""
    z1, z2 = randn(9, 3), randn(9, 3, seed=1) + 2
    a, b = whitened(torch.cat(tensors(z1, z2)), inverse_cholesky).chunk(2)
    assert abs(cosine_distance(a, b).item() - wmse_book(z1, z2)) > 1e-2
    assert_ours(wmse_ours, wmse_book, [z1, z2])


def test_stable_pretraining_wmse_divides_by_d():
    z1, z2 = randn(9, 3), randn(9, 3, seed=1)
    a, b = [F.normalize(whitened(z, inverse_cholesky)) for z in tensors(z1, z2)]
    assert same(3 * F.mse_loss(a, b).item(), wmse_book(z1, z2))
    views = [randn(9, 3, seed=s) for s in range(3)]
    assert_ours(wmse_ours, wmse_book, [z1, z2])
    assert_ours(wmse_ours, wmse_book, views)                                 # and the mean over the three pairs


def test_cw_rgp_repo_wmse_whitens_channels():
    """`--method wmse` there defaults to axis 0: the covariance between samples. W-MSE's is between features."""
    z = randn(9, 3) + 1
    x = torch.tensor(z)[:3] - torch.tensor(z)[:3].mean(1, keepdim=True)      # samples by samples is singular for w >= d
    assert torch.linalg.matrix_rank(x @ x.T) < 3
    white = wmse.whiten(torch.tensor(z), "cholesky", 0).numpy()
    assert same(white.mean(0), np.zeros(3)) and same(white.T @ white / 8, np.eye(3))
    assert same(white, ref.whiten(z, "cholesky"))


def test_wmse_batch_not_a_multiple_of_w_size():
    """`perm.view(-1, w_size)` dies with "shape '[-1, 4]' is invalid"; the message has to name the flag."""
    with pytest.raises(RuntimeError):
        torch.randperm(10).view(-1, 4)
    with pytest.raises(SIZE_ERRORS, match="(?i)w[-_]size"):
        wmse.wmse_loss(tensors(randn(10, 2), randn(10, 2, seed=1)), 4, 1, "cholesky", 0, generator())


def test_wmse_draws_a_partition_per_view():
    """Every view is cut into the same slices. Each round draws anew; more rounds give the mean over them."""
    views = [randn(8, 2), randn(8, 2, seed=1)]                               # w = d + 1 would always whiten to a regular simplex
    cuts = splits(8, 4)
    shared = [ref.wmse(views, [[np.array(s) for s in cut]]) for cut in cuts]

    def per_view(cut1, cut2):
        white = [np.zeros_like(v) for v in views]
        for v, cut in enumerate((cut1, cut2)):
            for s in cut:
                white[v][list(s)] = ref.whiten(views[v][list(s)], "cholesky")
        return ref.mean_pair_distance(white)
    assert which(per_view(cuts[0], cuts[1]), shared) is None
    draw = lambda seed, rounds: wmse.wmse_loss(tensors(*views), 4, rounds, "cholesky", 0, generator(seed)).item()
    seen = [which(draw(seed, 1), shared) for seed in range(30)]
    assert None not in seen and len(set(seen)) > 9                           # always one of the 35, and random
    pairs = [(a + b) / 2 for a in shared for b in shared]
    twice = [draw(seed, 2) for seed in range(10)]
    assert all(min(abs(t - p) for p in pairs) < 1e-9 for t in twice)
    assert any(min(abs(t - s) for s in shared) > 1e-9 for t in twice)        # the second round is another partition
    assert draw(5, 2) == draw(5, 2)                                          # and the generator decides


def test_lightly_wmse_could_not_be_constructed():
    """lightly's class called a removed torch function for two years while its tests skipped themselves."""
    torch.manual_seed(0)
    model = wmse.WMSE(toy_backbone(32), 32, wmse.Args()).double().train()
    loss = model([images(256), images(256) + 0.3 * images(256, seed=1)])
    loss.backward()
    assert torch.isfinite(loss) and 0 < loss.item() < 4
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- Shuffled-DBN
def dbn_ours(a, b):
    return shuffled_dbn.shuffled_dbn_loss(a, b, 1, generator())              # one group: the shuffle has nothing to choose


def dbn_book(a, b):
    return ref.shuffled_dbn(a, b, 1)


def test_shuffled_dbn_official_needs_symeig():
    """The authors' code calls torch.symeig, which torch no longer has."""
    with pytest.raises((AttributeError, RuntimeError)):
        torch.symeig(torch.eye(2))
    z, permutation = randn(12, 6) @ randn(6, 6), np.array([4, 0, 3, 1, 5, 2])
    ours = shuffled_dbn.decorrelate(torch.tensor(z), 2, torch.tensor(permutation))
    assert same(ours.numpy(), ref.decorrelate(z, 2, permutation))
    weights = randn(12, 6, seed=3)
    assert_ours(lambda a: (shuffled_dbn.decorrelate(a, 2, torch.tensor(permutation)) * torch.tensor(weights)).sum(),
                lambda a: float((ref.decorrelate(a, 2, permutation) * weights).sum()), [z], 1e-5)


def test_shuffled_dbn_unbiased_covariance():
    """cov / (N - 1) as in the whitening of W-MSE shrinks the un-normalised distance by (N - 1) / N."""
    z1, z2 = randn(9, 3), randn(9, 3, seed=1)
    a, b = [whitened(z, naive_zca) for z in tensors(z1, z2)]
    buggy = ((a - b) ** 2).sum(1).mean().item()
    assert same(buggy, dbn_book(z1, z2) * 8 / 9)
    assert_ours(dbn_ours, dbn_book, [z1, z2])


def test_shuffled_dbn_mean_over_features_or_cosine():
    """The distance is summed over d and not l2-normalised; mse_loss divides by d, the cosine is W-MSE's."""
    z1, z2 = randn(9, 3), randn(9, 3, seed=1)
    a, b = tensors(ref.decorrelate(z1, 1), ref.decorrelate(z2, 1))
    for buggy in (F.mse_loss(a, b).item(), cosine_distance(a, b).item()):
        assert abs(buggy - dbn_book(z1, z2)) > 0.1
    assert_ours(dbn_ours, dbn_book, [z1, z2])


def test_shuffled_dbn_one_permutation_for_both_views():
    """The shuffle is drawn anew at every call, so the two views have groups of their own."""
    z1, z2 = randn(10, 4) @ randn(4, 4), randn(10, 4, seed=1) @ randn(4, 4)
    cuts = [[i for block in cut for i in block] for cut in splits(4, 2)]
    losses = [ref.shuffled_dbn(z1, z2, 2, a, b) for a in cuts for b in cuts]
    seen = [which(shuffled_dbn.shuffled_dbn_loss(*tensors(z1, z2), 2, generator(seed)).item(), losses) for seed in range(40)]
    assert None not in seen
    shared = {0, 4, 8}                                                       # the diagonal: what one common shuffle can give
    assert len(set(seen) - shared) >= 3 and len(set(seen) & shared) >= 1


# ---------------------------------------------------------------------------------------------- CW-RGP
def cw_ours(*views):
    return cw_rgp.cw_rgp_loss(list(views), 1, len(views[0]), 1, 0, generator())


def cw_book(*views):
    w = len(views[0])
    return ref.cw_rgp(list(views), [[np.arange(w)]], [[[None] for _ in views]], 1)


def test_cw_rgp_whitens_features_instead_of_samples():
    z1, z2 = randn(4, 9), randn(4, 9, seed=1)
    white = cw_rgp.channel_whiten(torch.tensor(z1), 1, torch.arange(9), 0).numpy()
    assert same(white @ white.T / 8, np.eye(4)) and same(white, ref.channel_whiten(z1, 1))
    assert_ours(cw_ours, cw_book, [z1, z2])
    assert_ours(cw_ours, cw_book, [randn(3, 9, seed=s) for s in range(3)])


def test_cw_rgp_centres_inside_groups():
    """The mean is over all d channels, before grouping; a mean per group is the reader's guess, not the code."""
    z, permutation = randn(3, 12) + 1, np.array([7, 2, 9, 0, 11, 4, 1, 10, 5, 3, 8, 6])
    book = ref.channel_whiten(z, 2, permutation)
    buggy = np.zeros_like(z)
    for channels in ref.group_channels(12, 2, permutation):
        buggy[:, channels] = ref.channel_whiten(z[:, channels], 1)           # centres once more, inside
    assert np.abs(buggy - book).max() > 1e-2
    ours = cw_rgp.channel_whiten(torch.tensor(z), 2, torch.tensor(permutation), 0).numpy()
    assert same(ours, book) and same((ours ** 2).sum(1), np.full(3, 12 - 2))   # |row|^2 = d - g
    weights = randn(3, 12, seed=3)
    for eps in (0, 0.05):
        assert_ours(lambda a: (cw_rgp.channel_whiten(a, 2, torch.tensor(permutation), eps) * torch.tensor(weights)).sum(),
                    lambda a: float((ref.channel_whiten(a, 2, permutation, eps) * weights).sum()), [z], 1e-5)


def test_cw_rgp_does_not_undo_the_permutation():
    """Left shuffled, the two views would compare different channels."""
    z = randn(3, 12)
    p1, p2 = torch.randperm(12, generator=generator(1)), torch.randperm(12, generator=generator(2))
    one = cw_rgp.channel_whiten(torch.tensor(z), 1, p1, 0)
    two = cw_rgp.channel_whiten(torch.tensor(z), 1, p2, 0)
    assert cosine_distance(one[:, p1], two[:, p2]).item() > 0.1              # the mistake
    assert same(one.numpy(), two.numpy()) and same(one.numpy(), ref.channel_whiten(z, 1))


def test_cw_rgp_one_permutation_for_all_views():
    """Views draw their own groups: identical inputs keep a positive loss, zero only when the draws agree."""
    z1, z2 = randn(2, 8), randn(2, 8, seed=1)
    cuts = [[i for block in cut for i in block] for cut in splits(8, 4)]
    white = [[ref.channel_whiten(z, 2, cut) for cut in cuts] for z in (z1, z2)]
    losses = [ref.mean_pair_distance([a, b]) for a in white[0] for b in white[1]]
    draw = lambda seed, rounds: cw_rgp.cw_rgp_loss(tensors(z1, z2), 2, 2, rounds, 0, generator(seed)).item()
    values = [draw(seed, 1) for seed in range(20)]
    assert all(min(abs(v - loss) for loss in losses) < 1e-9 for v in values)
    shared = losses[::len(cuts) + 1]
    assert sum(min(abs(v - loss) for loss in shared) > 1e-9 for v in values) > 10
    assert draw(3, 4) == draw(3, 4) and draw(3, 4) != draw(4, 4)


def test_cw_rgp_batch_not_a_multiple_of_w_size():
    with pytest.raises(SIZE_ERRORS, match="(?i)w[-_]size"):
        cw_rgp.cw_rgp_loss(tensors(randn(10, 16), randn(10, 16, seed=1)), 1, 4, 1, 0, generator())


def test_cw_rgp_rank_deficient_gradient_is_nan():
    """More samples than channels per group, forward finite, backward NaN in the authors' code; eps has to cure it."""
    z, weights = randn(6, 4), randn(6, 4, seed=3)

    def buggy(a):
        x = a - a.mean(1, keepdim=True)
        _, s, v = torch.linalg.svd(x @ x.T / 31)                             # half of the eigenvalues are rounding noise
        return ((v.T @ torch.diag(s ** -0.5) @ v @ x) ** 3).sum()
    value, grads = value_and_grads(buggy, [randn(64, 32)])
    assert math.isfinite(value) and not np.isfinite(grads[0]).all()
    book = lambda a: float((ref.channel_whiten(a, 1, None, 0.1) * weights).sum())
    assert_ours(lambda a: (cw_rgp.channel_whiten(a, 1, torch.arange(4), 0.1) * torch.tensor(weights)).sum(), book, [z])


# ---------------------------------------------------------------------------------------------- whitening in general
HADAMARD = np.array([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["wmse_zca", "shuffled_dbn", "cw_rgp"])
def test_eigh_backward_with_repeated_eigenvalues(method, dtype):
    """Already white input: the eigenvalues are equal and autograd through eigh or svd divides by their gap."""
    permutation = torch.arange(8 if method == "cw_rgp" else 4)
    z = HADAMARD[1:5] if method == "cw_rgp" else HADAMARD[:, 1:5]
    weights = randn(*z.shape, seed=3)
    ours, book = {
        "wmse_zca": (lambda a: wmse.whiten(a, "zca", 0), lambda a: ref.whiten(a, "zca")),
        "shuffled_dbn": (lambda a: shuffled_dbn.decorrelate(a, 1, permutation), lambda a: ref.decorrelate(a, 1)),
        "cw_rgp": (lambda a: cw_rgp.channel_whiten(a, 1, permutation, 0), lambda a: ref.channel_whiten(a, 1)),
    }[method]

    def buggy(a):
        x = a.T - a.T.mean(0) if method == "cw_rgp" else a - a.mean(0)
        sigma = x.T @ x / 8
        white = x @ naive_zca(sigma).T
        return ((white.T if method == "cw_rgp" else white) * torch.tensor(weights, dtype=a.dtype)).sum()
    _, bad = value_and_grads(buggy, [z], dtype)
    assert not np.isfinite(bad[0]).all()
    _, grads = value_and_grads(lambda a: (ours(a) * torch.tensor(weights, dtype=a.dtype)).sum(), [z], dtype)
    want = ref.numeric_gradient(lambda a: float((book(a) * weights).sum()), [z])[0]
    assert same(grads[0], want, 1e-6 if dtype == torch.float64 else 1e-4)


def test_half_precision_covariance_overflows():
    """A covariance of 2048 rows with standard deviation 6 is a sum of 74 000: inf in float16. And eigh has no half kernel."""
    z1, z2 = [torch.tensor(6 * randn(2048, 4, seed=s)).half() for s in (0, 1)]
    x = z1 - z1.mean(0)
    assert (x.float().T @ x.float()).max() > torch.finfo(torch.float16).max
    assert same(vicreg.vicreg_loss(z1, z2, 25, 25, 1).item(), ref.vicreg(z1, z2, 25, 25, 1), 1e-2)
    assert same(barlow.barlow_twins_loss(z1, z2, 0.005).item(), ref.barlow(z1, z2, 0.005), 1e-2)
    for kind in ("cholesky", "zca"):
        assert same(wmse.whiten(z1, kind, 0).double().numpy(), ref.whiten(z1, kind), 1e-2)
    assert same(shuffled_dbn.decorrelate(z1, 2, torch.arange(4)).double().numpy(), ref.decorrelate(z1, 2), 1e-2)
    wide = torch.tensor(6 * randn(4, 64)).half()
    assert same(cw_rgp.channel_whiten(wide, 2, torch.arange(64), 0).double().numpy(), ref.channel_whiten(wide, 2), 1e-2)


# ---------------------------------------------------------------------------------------------- evaluation
def knn(bank, bank_labels, queries, query_labels, k, temperature):
    return float(common.knn_accuracy(torch.tensor(bank), torch.tensor(bank_labels), torch.tensor(queries),
                                     torch.tensor(query_labels), k, temperature))


@pytest.mark.parametrize("temperature", [0.1, None])
def test_drop_last_on_test_set(temperature):
    """PatrickHua scores 9728 of 10000 CIFAR images: both loaders drop their last batch."""
    bank, bank_labels = randn(70, 5), np.arange(70) % 3
    queries, query_labels = bank[-37:] + 0.01 * randn(37, 5), bank_labels[-37:].copy()
    query_labels[-5:] = (query_labels[-5:] + 1) % 3                          # the dropped queries are the wrong ones
    whole = ref.knn_accuracy(bank, bank_labels, queries, query_labels, 1, temperature)
    dropped = ref.knn_accuracy(bank, bank_labels, queries[:32], query_labels[:32], 1, temperature)
    short_bank = ref.knn_accuracy(bank[:64], bank_labels[:64], queries, query_labels, 1, temperature)
    assert abs(whole - 32 / 37) < 1e-9 and dropped == 1 and short_bank != whole
    assert abs(knn(bank, bank_labels, queries, query_labels, 1, temperature) - whole) < 1e-6


@pytest.mark.parametrize("temperature", [0.1, None])
def test_htdt_and_cw_rgp_need_a_multiple_of_1000(temperature):
    """Their evaluation reshapes to [-1, 1000]: a test set of any other size crashes."""
    bank, bank_labels, queries = randn(40, 3), np.arange(40) % 4, randn(1003, 3, seed=1)
    query_labels = np.arange(1003) % 4
    with pytest.raises(ValueError):
        query_labels.reshape(-1, 1000)
    want = ref.knn_accuracy(bank, bank_labels, queries, query_labels, 5, temperature)
    assert abs(knn(bank, bank_labels, queries, query_labels, 5, temperature) - want) < 1e-6


@pytest.mark.parametrize("temperature", [0.1, None])
def test_solo_learn_knn_counts_classes_in_the_test_labels(temperature):
    """num_classes = len(unique(test labels)) breaks as soon as the test set lacks a class."""
    bank, bank_labels, queries = randn(60, 3), np.repeat([0, 4, 9], 20), randn(31, 3, seed=1)
    query_labels = np.where(np.arange(31) % 2, 4, 2)                         # 0 and 9 are missing, 2 is not in the bank
    with pytest.raises((IndexError, RuntimeError)):
        torch.zeros(60, len(np.unique(query_labels))).scatter_(1, torch.tensor(bank_labels)[:, None], 1.0)
    want = ref.knn_accuracy(bank, bank_labels, queries, query_labels, 5, temperature)
    assert abs(knn(bank, bank_labels, queries, query_labels, 5, temperature) - want) < 1e-6


def test_htdt_knn_on_unnormalised_features():
    """Raw Euclidean majority and weighted cosine are two protocols with two numbers; each must be what it says."""
    direction, queries = ref.unit_rows(randn(90, 4)), ref.unit_rows(randn(61, 4, seed=1))
    bank = direction * np.exp(randn(90, 1))
    bank_labels, query_labels = [(z[:, :3] > 0) @ np.array([1, 2, 4]) for z in (direction, queries)]
    cosine = ref.knn_accuracy(bank, bank_labels, queries, query_labels, 7, 0.1)
    euclid = ref.knn_accuracy(bank, bank_labels, queries, query_labels, 7, None)
    unit_euclid = ref.knn_accuracy(direction, bank_labels, queries, query_labels, 7, None)
    assert len({cosine, euclid, unit_euclid}) == 3
    assert abs(knn(bank, bank_labels, queries, query_labels, 7, 0.1) - cosine) < 1e-6
    assert abs(knn(bank, bank_labels, queries, query_labels, 7, None) - euclid) < 1e-6
    assert abs(knn(3 * bank, bank_labels, 5 * queries, query_labels, 7, 0.1) - cosine) < 1e-6   # cosine: scale is void


def test_knn_votes():
    """Weights exp(cos / T): one near neighbour outvotes two far ones at small T. Equal votes go to the smallest label."""
    bank, bank_labels = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), np.array([1, 0, 0])
    queries = np.array([[1.0, 0.05]])
    assert knn(bank, bank_labels, queries, np.array([1]), 3, 0.1) == 1       # an unweighted majority would say 0
    assert knn(bank, bank_labels, queries, np.array([1]), 3, None) == 0
    bank, bank_labels = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]), np.array([5, 5, 2, 2])
    assert knn(bank, bank_labels, np.array([[0.0, 0.0]]), np.array([2]), 4, None) == 1
    assert knn(bank, bank_labels, np.array([[0.0, 0.0]]), np.array([5]), 4, None) == 0
