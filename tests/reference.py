"""The specification: every loss and figure written a second time, slowly, in float64 numpy, from the papers' equations.

Nothing here looks at the implementation. Rows are samples, [N, d]. Loops are explicit on purpose: one line, one symbol.
numpy's matrix routines are used for eigenvectors (eigh), singular values and, in two gradients, matrix products.
"""
import itertools
import math

import numpy as np


# ---------------------------------------------------------------------------------------------- small pieces
def _f64(z):
    """Copy anything array-like (a torch tensor too) to a float64 numpy array."""
    if hasattr(z, "detach"):
        z = z.detach().cpu().numpy()
    return np.array(z, dtype=np.float64)


def dot(a, b):
    return sum(float(a[i]) * float(b[i]) for i in range(len(a)))


def unit(v):
    """v / |v|"""
    length = math.sqrt(dot(v, v))
    return np.array([x / length for x in v])


def unit_rows(z):
    z = _f64(z)
    return np.array([unit(row) for row in z])


def cosine(a, b):
    return dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))


def centre_columns(z):
    """Subtract from every feature its mean over the samples."""
    z = _f64(z)
    out = np.zeros_like(z)
    for j in range(z.shape[1]):
        mean = sum(z[n, j] for n in range(z.shape[0])) / z.shape[0]
        for n in range(z.shape[0]):
            out[n, j] = z[n, j] - mean
    return out


def second_moment(x, divisor):
    """M[i, j] = sum_n x[n, i] x[n, j] / divisor: covariance of the columns of an already centred x."""
    n_rows, d = x.shape
    out = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            out[i, j] = sum(x[n, i] * x[n, j] for n in range(n_rows)) / divisor
    return out


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


# ---------------------------------------------------------------------------------------------- contrastive losses
def nt_xent(views, temperature):
    """SimCLR, Chen et al. 2002.05709 eq. 1: l(i,j) = -log exp(s_ij/T) / sum_{k != i} exp(s_ik/T), mean over the 2N anchors.

    The denominator has 2N - 1 terms: the positive is in, the anchor itself is out.
    More than two views: mean over all unordered pairs of views of the two-view loss (htdt/self-supervised)."""
    views = [unit_rows(v) for v in views]
    losses = []
    for a, b in itertools.combinations(range(len(views)), 2):
        z = np.concatenate([views[a], views[b]])
        n = len(views[a])
        total = 0.0
        for i in range(2 * n):
            j = i + n if i < n else i - n                                  # the other view of the same image
            others = [dot(z[i], z[k]) / temperature for k in range(2 * n) if k != i]
            total += -dot(z[i], z[j]) / temperature + log_sum_exp(others)
        losses.append(total / (2 * n))
    return sum(losses) / len(losses)


def info_nce(q, k, queue, temperature):
    """MoCo, He et al. 1911.05722 eq. 1: cross-entropy of [q.k+, q.queue_1 .. q.queue_K] / T with label 0, mean over q."""
    q, k, queue = unit_rows(q), unit_rows(k), _f64(queue)
    total = 0.0
    for n in range(len(q)):
        logits = [dot(q[n], k[n]) / temperature] + [dot(q[n], queue[j]) / temperature for j in range(len(queue))]
        total += log_sum_exp(logits) - logits[0]
    return total / len(q)


# ---------------------------------------------------------------------------------------------- predictor losses
def byol(p, z):
    """BYOL, Grill et al. 2006.07733 eq. 2, one direction: mean_n ||p/|p| - z/|z| ||^2 = mean_n (2 - 2 cos)."""
    p, z = unit_rows(p), unit_rows(z)
    total = 0.0
    for n in range(len(p)):
        total += sum((p[n, j] - z[n, j]) ** 2 for j in range(p.shape[1]))
    return total / len(p)


def byol_momentum(base, progress):
    """tau_k = 1 - (1 - tau_base)(cos(pi k / K) + 1) / 2, k counted in optimiser steps (2006.07733 section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def negative_cosine(p, z):
    """SimSiam, Chen & He 2011.10566 eq. 1: D(p, z) = -p.z / (|p| |z|), mean over the batch."""
    p, z = _f64(p), _f64(z)
    return sum(-cosine(p[n], z[n]) for n in range(len(p))) / len(p)


# ---------------------------------------------------------------------------------------------- soft decorrelation
def standardise(z, eps=1e-5):
    """BatchNorm without affine: (z - mean) / sqrt(biased variance + eps)."""
    x = centre_columns(z)
    for j in range(x.shape[1]):
        variance = sum(x[n, j] ** 2 for n in range(len(x))) / len(x)
        for n in range(len(x)):
            x[n, j] /= math.sqrt(variance + eps)
    return x


def cross_correlation(q, k):
    """C_ij = sum_n q_ni k_nj / N of standardised q, k."""
    n_rows, d = q.shape
    c = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            c[i, j] = sum(q[n, i] * k[n, j] for n in range(n_rows)) / n_rows
    return c


def barlow_from_standardised(q, k, lambd):
    """L = sum_i (C_ii - 1)^2 + lambda sum_i sum_{j != i} C_ij^2 with q, k taken as already standardised."""
    c = cross_correlation(_f64(q), _f64(k))
    on = sum((c[i, i] - 1) ** 2 for i in range(len(c)))
    off = sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)
    return on + lambd * off


def barlow(z1, z2, lambd, eps=1e-5):
    """Barlow Twins, Zbontar et al. 2103.03230 eq. 1 and 2 (biased std, eps in the root, C / N, not divided by d)."""
    return barlow_from_standardised(standardise(z1, eps), standardise(z2, eps), lambd)


def vicreg_invariance(z1, z2, per_feature=True):
    """1/N sum_n |z1_n - z2_n|^2 (2105.04906 eq. 5); per_feature also divides by d (mse_loss of the official code)."""
    z1, z2 = _f64(z1), _f64(z2)
    total = sum((z1[n, j] - z2[n, j]) ** 2 for n in range(len(z1)) for j in range(z1.shape[1])) / len(z1)
    return total / z1.shape[1] if per_feature else total


def vicreg_variance(z, eps=1e-4):
    """1/d sum_j max(0, 1 - sqrt(Var_j + eps)), Var with N - 1 (eq. 1 and 2)."""
    x = centre_columns(z)
    total = 0.0
    for j in range(x.shape[1]):
        variance = sum(x[n, j] ** 2 for n in range(len(x))) / (len(x) - 1)
        total += max(0.0, 1 - math.sqrt(variance + eps))
    return total / x.shape[1]


def vicreg_covariance(z):
    """1/d sum_{i != j} Cov_ij^2, Cov with N - 1 (eq. 3 and 4)."""
    x = centre_columns(z)
    cov = second_moment(x, len(x) - 1)
    d = len(cov)
    return sum(cov[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d


def vicreg(z1, z2, inv_weight, var_weight, cov_weight, official=True):
    """VICReg, Bardes et al. 2105.04906 eq. 6.

    official=True: the released code, MSE over N and d, and half the sum of the two variance terms.
    official=False: the equations as printed, invariance 1/N sum |.|^2 (no 1/d), var + var' without the half."""
    inv = vicreg_invariance(z1, z2, per_feature=official)
    var = vicreg_variance(z1) + vicreg_variance(z2)
    if official:
        var = var / 2
    cov = vicreg_covariance(z1) + vicreg_covariance(z2)
    return inv_weight * inv + var_weight * var + cov_weight * cov


# ---------------------------------------------------------------------------------------------- whitening
def cholesky(a):
    """Lower triangular L with L L^T = a (Cholesky-Banachiewicz)."""
    d = len(a)
    low = np.zeros((d, d))
    for i in range(d):
        for j in range(i + 1):
            rest = a[i, j] - sum(low[i, k] * low[j, k] for k in range(j))
            if i == j:
                if not rest > 0:
                    raise np.linalg.LinAlgError("covariance is not positive definite")
                low[i, i] = math.sqrt(rest)
            else:
                low[i, j] = rest / low[j, j]
    return low


def solve_lower(low, b):
    """y with low y = b (forward substitution)."""
    y = np.zeros(len(b))
    for i in range(len(b)):
        y[i] = (b[i] - sum(low[i, k] * y[k] for k in range(i))) / low[i, i]
    return y


def inverse_root(a):
    """ZCA: U diag(lambda^-1/2) U^T, the symmetric inverse square root."""
    values, vectors = np.linalg.eigh(a)
    out = np.zeros_like(a)
    for i in range(len(a)):
        for j in range(len(a)):
            out[i, j] = sum(vectors[i, k] * vectors[j, k] / math.sqrt(values[k]) for k in range(len(a)))
    return out


def pca_matrix(a):
    """PCA: diag(lambda^-1/2) U^T, eigenvalues descending, each eigenvector's entry of largest magnitude positive.

    Order and sign are a convention of this file: compare a PCA whitening with it only up to both."""
    values, vectors = np.linalg.eigh(a)
    rows = []
    for k in reversed(range(len(a))):
        u = vectors[:, k]
        if u[np.argmax(np.abs(u))] < 0:
            u = -u
        rows.append(u / math.sqrt(values[k]))
    return np.array(rows)


def shrink(sigma, eps):
    """(1 - eps) Sigma + eps I"""
    return (1 - eps) * sigma + eps * np.eye(len(sigma))


def whiten(z, kind, eps=0.0):
    """Whiten one slice [w, d] over its samples, W-MSE (2007.06346).

    Sigma = X^T X / (w - 1) of the centred X, Sigma' = (1 - eps) Sigma + eps I, then for each sample x
      cholesky  L^-1 x, L L^T = Sigma'       zca  Sigma'^-1/2 x       pca  Lambda^-1/2 U^T x
      bn        x_j / sqrt(Sigma'_jj)        none z as it came (not centred)"""
    z = _f64(z)
    if kind == "none":
        return z
    x = centre_columns(z)
    sigma = shrink(second_moment(x, len(x) - 1), eps)
    out = np.zeros_like(x)
    if kind == "cholesky":
        low = cholesky(sigma)
        for n in range(len(x)):
            out[n] = solve_lower(low, x[n])
        return out
    if kind == "bn":
        for n in range(len(x)):
            for j in range(x.shape[1]):
                out[n, j] = x[n, j] / math.sqrt(sigma[j, j])
        return out
    phi = {"zca": inverse_root, "pca": pca_matrix}[kind](sigma)
    for n in range(len(x)):
        for i in range(x.shape[1]):
            out[n, i] = dot(phi[i], x[n])
    return out


def mean_pair_distance(views):
    """2 / (N s (s-1)) sum_pairs sum_n (2 - 2 cos(z_n^i, z_n^j))"""
    pairs = list(itertools.combinations(range(len(views)), 2))
    total = 0.0
    for a, b in pairs:
        for n in range(len(views[a])):
            total += 2 - 2 * cosine(views[a][n], views[b][n])
    return total / (len(views[0]) * len(pairs))


def wmse(views, partition, kind="cholesky", eps=0.0):
    """W-MSE, Ermolov et al. 2007.06346. partition[round][slice] is an index array; every view uses the same one."""
    views = [_f64(v) for v in views]
    rounds = []
    for slices in partition:
        white = [np.zeros_like(v) for v in views]
        for index in slices:
            for v in range(len(views)):
                white[v][index] = whiten(views[v][index], kind, eps)
        rounds.append(mean_pair_distance(white))
    return sum(rounds) / len(rounds)


def group_channels(d, groups, permutation):
    """Group k holds the channels permutation[k d/g : (k+1) d/g], i.e. z[:, permutation] reshaped to [.., g, d/g]."""
    order = list(range(d)) if permutation is None else [int(i) for i in permutation]
    size = d // groups
    return [order[k * size:(k + 1) * size] for k in range(groups)]


def decorrelate(z, groups, permutation=None):
    """Shuffled decorrelated batch normalisation of [N, d], Hua et al. 2105.00470.

    Per group: centre over the batch, Sigma = X^T X / N (biased), no eps, ZCA, back to the channels' own places."""
    x = centre_columns(z)
    out = np.zeros_like(x)
    for channels in group_channels(x.shape[1], groups, permutation):
        part = x[:, channels]
        phi = inverse_root(second_moment(part, len(part)))
        for n in range(len(x)):
            for i, channel in enumerate(channels):
                out[n, channel] = dot(phi[i], part[n])
    return out


def shuffled_dbn(z1, z2, groups, permutation1=None, permutation2=None):
    """L = 1/N sum_n |z1^_n - z2^_n|^2: summed over d, no l2 normalisation."""
    a, b = decorrelate(z1, groups, permutation1), decorrelate(z2, groups, permutation2)
    return sum((a[n, j] - b[n, j]) ** 2 for n in range(len(a)) for j in range(a.shape[1])) / len(a)


def channel_whiten(z, groups, permutation=None, eps=0.0):
    """CW-RGP, Weng et al. 2210.03586, one slice [w, d].

    Each sample is centred over all its d channels (before grouping); per group of d/g channels the w x w covariance
    between *samples*, divisor d/g - 1; Y = X_k Sigma'^-1/2 mixes samples, never channels."""
    z = _f64(z)
    w, d = z.shape
    x = np.zeros_like(z)
    for n in range(w):
        mean = sum(z[n, j] for j in range(d)) / d
        for j in range(d):
            x[n, j] = z[n, j] - mean
    out = np.zeros_like(x)
    for channels in group_channels(d, groups, permutation):
        block = x[:, channels].T                                           # X_k [d/g, w]
        phi = inverse_root(shrink(second_moment(block, len(channels) - 1), eps))
        for i, channel in enumerate(channels):
            for n in range(w):
                out[n, channel] = sum(block[i, m] * phi[m, n] for m in range(w))
    return out


def cw_rgp(views, partitions, permutations, groups, eps=0.0):
    """Mean of 2 - 2 cos over images, view pairs and rounds. partitions[round][slice], permutations[round][view][slice]."""
    views = [_f64(v) for v in views]
    rounds = []
    for r, slices in enumerate(partitions):
        white = [np.zeros_like(v) for v in views]
        for v in range(len(views)):
            for s, index in enumerate(slices):
                white[v][index] = channel_whiten(views[v][index], groups, permutations[r][v][s], eps)
        rounds.append(mean_pair_distance(white))
    return sum(rounds) / len(rounds)


# ---------------------------------------------------------------------------------------------- collapse metrics
def std_sqrt_d(z):
    """sqrt(d) times the mean over channels of the (biased) std of the l2-normalised rows: 1 isotropic, 0 collapsed."""
    u = unit_rows(z)
    x = centre_columns(u)
    n_rows, d = u.shape
    stds = [math.sqrt(sum(x[n, j] ** 2 for n in range(n_rows)) / n_rows) for j in range(d)]
    return math.sqrt(d) * sum(stds) / d


def singular_values(z):
    """Descending, of the column-centred features, without those below float32's resolution of the features themselves."""
    limit = max(np.shape(z)) * 2.0**-23 * np.linalg.svd(_f64(z), compute_uv=False)[0]
    return [s for s in np.linalg.svd(centre_columns(z), compute_uv=False) if s > limit]


def rank(z):
    return len(singular_values(z))


def rank_1pct(z):
    """Number of sigma_i > 1e-2 sigma_1 (0 for a constant)."""
    sigma = singular_values(z)
    return sum(1 for s in sigma if s > 1e-2 * sigma[0])


def stable_rank(z):
    """r = sum_i sigma_i / sigma_1 (CW-RGP, Definition 1: first power)."""
    sigma = singular_values(z)
    return sum(s / sigma[0] for s in sigma)


def stable_rank_sq(z):
    """|A|_F^2 / |A|_2^2 = sum_i sigma_i^2 / sigma_1^2 (the usual one)."""
    sigma = singular_values(z)
    return sum((s / sigma[0]) ** 2 for s in sigma)


def rankme(z):
    """exp of the entropy of p_i = sigma_i / sum sigma + 1e-7, not centred (Garrido et al. 2210.02885)."""
    sigma = np.linalg.svd(_f64(z), compute_uv=False)
    p = [s / sum(sigma) + 1e-7 for s in sigma]
    return math.exp(-sum(x * math.log(x) for x in p))


def corr(z):
    """sum_{i != j} |R_ij| / (d (d - 1)); a pair with a constant feature counts as 1."""
    x = centre_columns(z)
    s = second_moment(x, len(x))
    d = len(s)

    def entry(i, j):
        return abs(s[i, j]) / math.sqrt(s[i, i] * s[j, j]) if s[i, i] > 0 and s[j, j] > 0 else 1.0

    return sum(entry(i, j) for i in range(d) for j in range(d) if i != j) / (d * (d - 1))


def entropy(z, eps=1e-4):
    """1/2 log det(2 pi e (Sigma + eps I)) = 1/2 sum_i log(2 pi e (lambda_i + eps)), Sigma with divisor N - 1."""
    x = centre_columns(z)
    return sum(math.log(2 * math.pi * math.e * (v + eps)) for v in np.linalg.eigh(second_moment(x, len(x) - 1))[0]) / 2


def uniformity(z):
    """log mean_{i < j} exp(-2 |u_i - u_j|^2) on l2-normalised rows (Wang & Isola 2005.10242)."""
    u = unit_rows(z)
    terms = [math.exp(-2 * sum((a - b) ** 2 for a, b in zip(u[i], u[j]))) for i, j in itertools.combinations(range(len(u)), 2)]
    return math.log(sum(terms) / len(terms))


# ---------------------------------------------------------------------------------------------- kNN
def _winner(votes):
    """Label with most votes, ties to the smallest label."""
    best = max(votes.values())
    return min(label for label, vote in votes.items() if vote == best)


def knn_cosine_predict(bank, labels, queries, k, temperature):
    """Each of the k most similar bank rows votes for its label with weight exp(cos / T) (Wu et al. 1805.01978)."""
    bank, queries = unit_rows(bank), unit_rows(queries)
    out = []
    for q in queries:
        similarity = [dot(q, row) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = {}
        for i in nearest:                                                  # a common factor does not change the winner
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + math.exp((similarity[i] - 1) / temperature)
        out.append(_winner(votes))
    return np.array(out)


def knn_euclidean_predict(bank, labels, queries, k):
    """Plain majority of the k nearest raw features in squared Euclidean distance."""
    bank, queries = _f64(bank), _f64(queries)
    out = []
    for q in queries:
        distance = [sum((q[j] - row[j]) ** 2 for j in range(len(q))) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: (distance[i], i))[:k]
        votes = {}
        for i in nearest:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0) + 1
        out.append(_winner(votes))
    return np.array(out)


def knn_accuracy(bank, bank_labels, queries, query_labels, k, temperature):
    """Fraction of *all* queries that are right; temperature None means Euclidean majority."""
    if temperature is None:
        predicted = knn_euclidean_predict(bank, bank_labels, queries, k)
    else:
        predicted = knn_cosine_predict(bank, bank_labels, queries, k, temperature)
    return sum(1 for n in range(len(predicted)) if predicted[n] == int(query_labels[n])) / len(predicted)


# ---------------------------------------------------------------------------------------------- gradients
def numeric_gradient(f, arrays, h=1e-6):
    """Central differences of the scalar f(*arrays) for every entry of every array, float64."""
    arrays = [_f64(a) for a in arrays]
    grads = []
    for a in arrays:
        grad = np.zeros_like(a)
        for place in np.ndindex(a.shape):
            kept = a[place]
            a[place] = kept + h
            up = f(*arrays)
            a[place] = kept - h
            down = f(*arrays)
            a[place] = kept
            grad[place] = (up - down) / (2 * h)
        grads.append(grad)
    return grads


def through_unit_rows(z, grad):
    """Chain rule of u = z / |z|: dL/dz = (g - u (u.g)) / |z|."""
    z, out = _f64(z), np.zeros_like(_f64(z))
    for n in range(len(z)):
        u = unit(z[n])
        out[n] = (grad[n] - u * dot(u, grad[n])) / math.sqrt(dot(z[n], z[n]))
    return out


def through_standardise(z, grad, eps=1e-5):
    """Chain rule of y = (z - mean) / s, s = sqrt(biased var + eps): dL/dz = (g - mean g - y mean(g y)) / s."""
    x, y, out = centre_columns(z), standardise(z, eps), np.zeros_like(_f64(z))
    n_rows = len(x)
    for j in range(x.shape[1]):
        s = math.sqrt(sum(x[n, j] ** 2 for n in range(n_rows)) / n_rows + eps)
        g_mean = sum(grad[n, j] for n in range(n_rows)) / n_rows
        gy_mean = sum(grad[n, j] * y[n, j] for n in range(n_rows)) / n_rows
        for n in range(n_rows):
            out[n, j] = (grad[n, j] - g_mean - y[n, j] * gy_mean) / s
    return out


def moco_gradient(q, k, queue, temperature):
    """Unit rows as free variables: dL/dq_n = 1/(T N) [ -k_n + sum_j s_j k_j ], j over the positive too."""
    q, k, queue = _f64(q), _f64(k), _f64(queue)
    out = np.zeros_like(q)
    for n in range(len(q)):
        keys = [k[n]] + [queue[j] for j in range(len(queue))]
        logits = [dot(q[n], key) / temperature for key in keys]
        norm = log_sum_exp(logits)
        out[n] = -k[n]
        for key, logit in zip(keys, logits):
            out[n] += math.exp(logit - norm) * key
        out[n] /= temperature * len(q)
    return out


def simclr_gradient(z1, z2, temperature, brackets="both"):
    """Unit rows as free variables: 1/(2NT) { [-z_n+ + sum_m s_nm z_m] + [-z_n+ + sum_m s_mn z_m] }.

    brackets: both, own (n as anchor: what is left when targets are detached) or target (n as target of the others).
    Returns the gradients of z1 and z2."""
    z1, z2 = _f64(z1), _f64(z2)
    n_images = len(z1)
    z = np.concatenate([z1, z2])
    s = np.zeros((2 * n_images, 2 * n_images))                             # s[n, m]: softmax of anchor n over m != n
    for n in range(2 * n_images):
        others = [m for m in range(2 * n_images) if m != n]
        norm = log_sum_exp([dot(z[n], z[m]) / temperature for m in others])
        for m in others:
            s[n, m] = math.exp(dot(z[n], z[m]) / temperature - norm)
    out = np.zeros_like(z)
    for n in range(2 * n_images):
        positive = z[(n + n_images) % (2 * n_images)]
        own, target = -positive.copy(), -positive.copy()
        for m in range(2 * n_images):
            if m != n:
                own += s[n, m] * z[m]
                target += s[m, n] * z[m]
        out[n] = {"both": own + target, "own": own, "target": target}[brackets] / (2 * n_images * temperature)
    return out[:n_images], out[n_images:]


def linear_predictor_gradient(z1, z2, weight):
    """dL/dz1 = 1/(N |W z1|) [ -W^T z2 + l W^T W z1 ],  l = (z1^T W^T z2) / (z1^T W^T W z1). z2 has unit rows."""
    z1, z2, weight = _f64(z1), _f64(z2), _f64(weight)
    out = np.zeros_like(z1)
    for n in range(len(z1)):
        wz = weight @ z1[n]
        factor = dot(wz, z2[n]) / dot(wz, wz)
        out[n] = (-(weight.T @ z2[n]) + factor * (weight.T @ wz)) / (len(z1) * math.sqrt(dot(wz, wz)))
    return out


def barlow_gradient(q, k, lambd):
    """dL/dq_n = 2/N [ -A k_n + l sum_b (k_n.k_b / N) q_b ],  A = I - (1 - l) diag(C); q, k standardised, taken as free."""
    q, k = _f64(q), _f64(k)
    n_rows, d = q.shape
    c = cross_correlation(q, k)
    out = np.zeros_like(q)
    for n in range(n_rows):
        for i in range(d):
            out[n, i] = -(1 - (1 - lambd) * c[i, i]) * k[n, i]
        for b in range(n_rows):
            out[n] += lambd * dot(k[n], k[b]) / n_rows * q[b]
        out[n] *= 2 / n_rows
    return out


def vicreg_invariance_gradient(x, y):
    """2 (x - y) / (n D)"""
    x, y = _f64(x), _f64(y)
    return 2 * (x - y) / (x.shape[0] * x.shape[1])


def vicreg_variance_gradient(z, eps=1e-4):
    """-(x_c / sigma_j) 1[sigma_j < 1] / (D (n - 1)): one branch, without the official code's half."""
    x = centre_columns(z)
    n_rows, d = x.shape
    out = np.zeros_like(x)
    for j in range(d):
        sigma = math.sqrt(sum(x[n, j] ** 2 for n in range(n_rows)) / (n_rows - 1) + eps)
        if sigma < 1:
            for n in range(n_rows):
                out[n, j] = -x[n, j] / sigma / (d * (n_rows - 1))
    return out


def vicreg_covariance_gradient(z):
    """4 / (D (n - 1)) x_c offdiag(Cov)"""
    x = centre_columns(z)
    n_rows, d = x.shape
    cov = second_moment(x, n_rows - 1)
    out = np.zeros_like(x)
    for n in range(n_rows):
        for i in range(d):
            out[n, i] = 4 / (d * (n_rows - 1)) * sum(x[n, j] * cov[j, i] for j in range(d) if j != i)
    return out


def vicreg_gradient(z1, z2, inv_weight, var_weight, cov_weight):
    """Gradients of z1 and z2 of the official scaling, from the closed forms."""
    inv = vicreg_invariance_gradient(z1, z2)
    return tuple(inv_weight * sign * inv + var_weight / 2 * vicreg_variance_gradient(z) + cov_weight * vicreg_covariance_gradient(z)
                 for sign, z in ((1, z1), (-1, z2)))


def inverse_root_backward(sigma, grad):
    """dL/dSigma from G = dL/dPhi, Phi = Sigma^-1/2: U [K o (U^T G U)] U^T,
    K_ij = -1 / (sqrt(l_i) sqrt(l_j) (sqrt(l_i) + sqrt(l_j))), G symmetrised. No eigen-gap appears."""
    values, u = np.linalg.eigh(sigma)
    root = np.sqrt(values)
    inner = u.T @ ((grad + grad.T) / 2) @ u
    for i in range(len(sigma)):
        for j in range(len(sigma)):
            inner[i, j] *= -1 / (root[i] * root[j] * (root[i] + root[j]))
    return u @ inner @ u.T
