"""The covariance that domains share: by hand, by NumPy, and where there is next to nothing to estimate it from."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from peft_talora.continual.covariance import share_covariance, shrink, square_distances, total_scatter, whitening


def sums_of(features_ND, labels_N, num_domains):
    rows = [features_ND[labels_N == k] for k in range(num_domains)]
    counts = torch.tensor([float(len(row)) for row in rows]).double()
    return counts, torch.stack([row.sum(0) for row in rows]), features_ND.T @ features_ND


def draw(n, width, seed=0):
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_shrinking_by_hand():
    """S = diag(3, 1), n = 9: tr S = 4, tr S² = 10, so ρ = (0 · 10 + 16) / ((9 + 1 − 1) (10 − 8)) = 8/9."""
    found = shrink(torch.diag(torch.tensor([3.0, 1.0]).double()), 9)
    assert_close(found, torch.diag(torch.tensor([3 / 9 + 2 * 8 / 9, 1 / 9 + 2 * 8 / 9]).double()))


def test_shrinking_keeps_the_trace_and_gives_way_to_data():
    features = draw(200, 12) * torch.arange(1, 13)
    covariance = features.T @ features / 200
    shares = []
    for freedom in (5, 50, 5000):
        shrunk = shrink(covariance, freedom)
        assert_close(shrunk.trace(), covariance.trace())
        shares.append(float((shrunk - covariance).norm() / covariance.norm()))
    assert shares[0] > 2 * shares[1] > 100 * shares[2] > 0


def test_a_multiple_of_the_identity_stays():
    assert_close(shrink(3 * torch.eye(4).double(), 10), 3 * torch.eye(4).double())
    assert_close(shrink(torch.tensor([[2.0]]).double(), 10), torch.tensor([[2.0]]).double())


def test_scatter_is_numpy_s():
    features, labels = draw(40, 5) + 100, torch.arange(40) % 3
    labels[labels == 1] = 3  # no exemplar of domains 1 and 2's like
    counts, sums, squares = sums_of(features, labels, 4)
    assert_close(total_scatter(counts, sums, squares), torch.from_numpy(np.cov(features.T.numpy())) * 39)
    within = sum(np.cov(features[labels == k].T.numpy()) * (counts[k].item() - 1) for k in (0, 2, 3))
    assert_close(share_covariance(counts, sums, squares), shrink(torch.from_numpy(within / 37), 37))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 1, 1]])
def test_without_scatter_inside_the_domains_that_between_them_counts(labels):
    labels = torch.tensor(labels)
    features = draw(4, 6)[labels] + 10
    sums = sums_of(features, labels, 4)
    assert_close(share_covariance(*sums), shrink(total_scatter(*sums) / 3, 3))
    torch.linalg.cholesky(share_covariance(*sums))


@pytest.mark.parametrize("count", [1, 3])
def test_without_any_scatter_it_is_the_identity(count):
    features = draw(1, 6).expand(count, -1)
    sums = sums_of(features, torch.zeros(count), 1)
    assert_close(share_covariance(*sums), torch.eye(6).double())


def test_whitened_distances_are_mahalanobis_distances():
    x, y, root = draw(7, 4), draw(3, 4, seed=1), draw(4, 4, seed=2)
    covariance = root @ root.T + torch.eye(4)
    by = whitening(covariance)
    apart = x[:, None] - y
    expected = torch.einsum("bkd,de,bke->bk", apart, torch.linalg.inv(covariance), apart)
    assert_close(square_distances(x @ by, y @ by), expected)
