"""Tucker form: what it contains, sums, truncation and its error, all compared with the dense tensor."""

import math

import pytest
import torch
from tuner_cases import assert_close

from peft_talora.tuner.tucker import Tucker, relative_errors

T, D_OUT, D_IN = 3, 9, 6
EVERY_RANK = (None, None, None)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_tucker(o: int = 4, r: int = 3, k: int = 2, seed: int = 0) -> Tucker:
    return Tucker(draw(o, r, k, seed=seed), draw(D_OUT, o, seed=seed), draw(D_IN, r, seed=seed), draw(T, k, seed=seed))


def dense(x: Tucker) -> torch.Tensor:
    """(T, D_out, D_in) by the definition."""
    return torch.einsum("do,ork,ir,tk->tdi", x.out_factor, x.core, x.in_factor, x.task_factor)


def assert_orthonormal(x: Tucker) -> None:
    for factor in x.factors:
        assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=factor.dtype), 1e-12)


class TestWhatItContains:
    def test_independent_loras(self):
        loras = [(draw(rank, D_IN, seed=t), draw(D_OUT, rank, seed=t)) for t, rank in enumerate([2, 1, 3])]
        x = Tucker.of_loras(loras)
        assert x.core.shape == (6, 6, T)
        assert_close(dense(x), torch.stack([b @ a for a, b in loras]), 1e-12)

    def test_shared_factors_with_a_free_core_per_task(self):
        u, v, cores = draw(D_OUT, 3), draw(D_IN, 3), draw(T, 3, 3)
        x = Tucker(cores.permute(1, 2, 0), u, v, torch.eye(T, dtype=u.dtype))
        assert_close(dense(x), torch.stack([u @ core @ v.T for core in cores]), 1e-12)

    def test_sums_of_rank_one_tensors(self):
        u, v, p = draw(D_OUT, 4), draw(D_IN, 4), draw(T, 4)
        core = torch.zeros(4, 4, 4, dtype=u.dtype)
        core[range(4), range(4), range(4)] = 1
        x = Tucker(core, u, v, p)
        assert_close(dense(x), sum(torch.einsum("t,d,i->tdi", p[:, k], u[:, k], v[:, k]) for k in range(4)), 1e-12)


@pytest.mark.parametrize(("o", "r"), [(4, 3), (3, 3), (2, 5)])
def test_one_task_is_a_lora_of_the_smaller_rank(o, r):
    x = random_tucker(o, r)
    for t in range(T):
        a, b = x.lora(t)
        assert a.shape == (min(o, r), D_IN)
        assert_close(b @ a, dense(x)[t], 1e-12)


def test_a_weighted_sum_is_the_sum():
    x, y = random_tucker(), random_tucker(2, 5, 3, seed=1)
    total = Tucker.weighted_sum([x, y], [0.7, -1.3])
    assert total.core.shape == (6, 8, 5)
    assert_close(dense(total), 0.7 * dense(x) - 1.3 * dense(y), 1e-12)
    fitted = total.fitted()  # 8 columns do not fit into 6 rows, 5 not into 3; the output factor stays as it was
    assert fitted.core.shape == (6, 6, 3)
    assert fitted.out_factor is total.out_factor
    assert_close(dense(fitted), dense(total), 1e-12)


def test_orthonormal_is_the_same_tensor_and_tells_the_norm():
    x = random_tucker(4, 8, 5)
    assert_orthonormal(x.orthonormal())
    assert_close(dense(x.orthonormal()), dense(x), 1e-12)
    assert math.isclose(x.norm(), dense(x).norm().item(), rel_tol=1e-12)


def test_dependent_columns_do_no_harm():
    x = random_tucker()
    twice = Tucker.weighted_sum([x, x], [0.5, 0.5])
    assert_close(dense(twice.truncated((4, 3, 2))), dense(x), 1e-12)
    assert_orthonormal(twice.truncated(EVERY_RANK))


class TestTruncation:
    def test_is_the_one_of_the_dense_tensor(self):
        x, ranks = random_tucker(5, 6, 3), (2, 3, 2)
        expected = dense(x)
        for mode, rank in zip((1, 2, 0), ranks, strict=True):
            basis = torch.linalg.svd(dense(x).movedim(mode, 0).flatten(1), full_matrices=False).U[:, :rank]
            projected = basis @ basis.T @ expected.movedim(mode, 0).flatten(1)
            expected = projected.unflatten(1, expected.movedim(mode, 0).shape[1:]).movedim(0, mode)
        assert x.truncated(ranks).core.shape == ranks
        assert_close(dense(x.truncated(ranks)), expected, 1e-12)

    def test_factors_are_orthonormal(self):
        assert_orthonormal(random_tucker(5, 6, 3).truncated((2, 3, 2)))

    @pytest.mark.parametrize("ranks", [EVERY_RANK, (4, 3, 2), (9, 9, 9)])
    def test_is_exact_where_ranks_allow(self, ranks):
        x = random_tucker(4, 3, 2)
        cut = x.truncated(ranks)
        assert cut.core.shape == (4, 3, 2)  # a rank beyond the tensor's own is not filled up
        assert_close(dense(cut), dense(x), 1e-12)

    def test_error_is_that_of_the_dense_tensor_and_falls_with_the_rank(self):
        x, y = random_tucker(5, 6, 3), random_tucker(4, 5, 3, seed=1)
        overall = []
        for rank in range(1, 7):
            cut = {"x": x.truncated((rank, rank, 3)), "y": y.truncated((rank, rank, 3))}
            errors = relative_errors({"x": x, "y": y}, cut)
            distances = [(dense(full) - dense(cut[name])).norm() for name, full in (("x", x), ("y", y))]
            norms = [dense(x).norm(), dense(y).norm()]
            assert math.isclose(errors.layers["x"], distances[0] / norms[0], rel_tol=1e-9, abs_tol=1e-12)
            assert math.isclose(
                errors.overall, math.hypot(*distances) / math.hypot(*norms), rel_tol=1e-9, abs_tol=1e-12
            )
            overall.append(errors.overall)
        assert overall[0] > 0.3
        assert overall == sorted(overall, reverse=True)
        assert overall[-1] < 1e-12

    def test_a_zero_tensor_has_no_error(self):
        x = Tucker(torch.zeros(2, 2, 2, dtype=torch.float64), draw(D_OUT, 2), draw(D_IN, 2), draw(T, 2))
        assert relative_errors({"x": x}, {"x": x.truncated((1, 1, 1))}).overall == 0
        assert relative_errors({"x": x}, {"x": random_tucker()}).overall > 1

    def test_never_builds_the_dense_tensor(self):
        size = 400_000  # dense, three tasks would take 3.8 TB
        x = Tucker.of_loras([(draw(1, size, seed=t), draw(size, 1, seed=t)) for t in range(T)])
        assert relative_errors({"x": x}, {"x": x.truncated(EVERY_RANK)}).overall < 1e-12
