"""Relations equal their loops, and say what is wrong with their input."""
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_says, many
from relkd.relations import angles, cosine_similarity_matrix, differences, pdist

maps = torch.zeros(4, 2, 3, 3)


@many
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_relations_equal_their_loops(n, d, seed):
    e = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dist, td, cos = pdist(e), differences(e), angles(e)
    for j in range(n):
        for i in range(n):
            assert torch.equal(td[j, i], e[i] - e[j])
            assert math.isclose(dist[j, i], (e[i] - e[j]).norm(), abs_tol=1e-6)
            for k in range(n):
                if j not in (i, k):
                    assert math.isclose(cos[j, i, k], F.cosine_similarity(e[i] - e[j], e[k] - e[j], dim=0), abs_tol=1e-9)
    assert dist.diagonal().eq(0).all() and (cos.abs() <= 1 + 1e-12).all()


def test_pdist_far_from_the_origin():
    far = torch.tensor([[1000., 0.], [1000.01, 0.]])
    assert math.isclose(pdist(far)[0, 1], torch.cdist(far, far, compute_mode="donot_use_mm_for_euclid_dist")[0, 1], rel_tol=1e-3)


def test_cosine_similarity_matrix_is_that_of_torch():
    a, b = torch.randn(5, 768), torch.randn(60, 768)
    torch.testing.assert_close(cosine_similarity_matrix(a, b), F.cosine_similarity(a[:, None], b[None], dim=2))
    assert cosine_similarity_matrix(torch.zeros(1, 3), torch.ones(2, 3)).eq(0).all()


ERRORS = [
    (lambda: pdist(maps), r"embeddings must have shape \(N, D\); got \(4, 2, 3, 3\)"),
    (lambda: differences(torch.zeros(3)), r"embeddings must have shape \(N, D\); got \(3,\)"),
    (lambda: angles(maps), r"embeddings must have shape \(N, D\)"),
    (lambda: cosine_similarity_matrix(torch.zeros(5, 3), torch.zeros(6, 4)), "a and b must have the same number of columns; got 3 and 4"),
    (lambda: cosine_similarity_matrix(torch.zeros(5, 3), torch.zeros(6)), r"b must have shape \(N, D\); got \(6,\)"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
