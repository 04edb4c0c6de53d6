"""Grids: the nearest level, fits close to the best there are, numbers the file can hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from pbq.grid import (
    Grid,
    QuantizedWeight,
    TierGrid,
    _uniform,
    fit_planes,
    fit_symmetric,
    fit_uniform,
    signs,
    stored,
)
from pbq_kernels.layout import Tier

AWKWARD = [(1, 1), (3, 33), (7, 63), (2, 96), (5, 577)]


def distortion(W, grid, weight=None):
    """Mean squared error of every row, in float64."""
    weight = torch.ones(W.shape[1]) if weight is None else weight
    share = (weight / weight.sum()).double()
    return (W.double() - grid.decode(grid.codes(W)).double()).pow(2) @ share


def fits_in_half(grid):
    return all(torch.equal(x.half().float(), x) for x in (grid.scale, grid.offset))


def test_signs_are_the_bits_of_the_code_lowest_plane_first():
    assert signs(0).tolist() == [[]]
    assert signs(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_stored_is_what_a_float16_holds():
    x = torch.tensor([1.0, 1 + 2**-12, 1e6, -1e6, 2**-24, 1e-9])
    assert stored(x).tolist() == [1.0, 1.0, 65504.0, -65504.0, 2**-24, 0.0]


def test_a_grid_by_hand():
    # levels 0.5 ± 1 ± 0.25, in code order: -0.75, -0.25, 1.25, 1.75
    grid = Grid(torch.tensor([[0.25, 1.0]]), torch.tensor([0.5]))
    assert grid.levels().tolist() == [[-0.75, -0.25, 1.25, 1.75]]
    w = torch.tensor([[-9.0, -0.51, -0.5, -0.49, 0.5, 0.51, 1.5, 9.0]])
    assert grid.codes(w).tolist() == [[0, 0, 0, 1, 1, 2, 2, 3]]  # halfway goes to the lower level
    assert grid.decode(grid.codes(w))[0, :4].tolist() == [-0.75, -0.75, -0.75, -0.25]


def test_negative_and_crossing_scales_still_give_the_nearest_level():
    # levels in code order 3, -1, 1, -3: not sorted
    grid = Grid(torch.tensor([[-2.0, -1.0]]), torch.zeros(1))
    assert grid.levels().tolist() == [[3.0, -1.0, 1.0, -3.0]]
    w = torch.tensor([[-3.0, -1.0, 1.0, 3.0, 1.9, 2.1]])
    assert grid.codes(w).tolist() == [[3, 1, 2, 0, 2, 0]]


@pytest.mark.parametrize("planes", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize(("n", "c"), AWKWARD)
def test_codes_are_the_nearest_level(n, c, planes):
    torch.manual_seed(n + c + planes)
    grid = Grid(torch.randn(n, planes), torch.randn(n))
    w = torch.randn(n, c) * 2
    codes = grid.codes(w)
    distance = (w[:, :, None].double() - grid.levels()[:, None].double()).abs()
    chosen = distance.gather(2, codes.long()[..., None])[..., 0]
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(chosen, distance.amin(2), atol=1e-6, rtol=0)
    again, w_hat = grid.nearest(w)
    assert torch.equal(again, codes)
    assert torch.equal(w_hat, grid.decode(codes))


@pytest.mark.parametrize("planes", [0, 1, 3, 4])
def test_rounding_twice_is_rounding_once(planes):
    torch.manual_seed(planes)
    grid = Grid(torch.randn(9, planes), torch.randn(9))
    once = grid.decode(grid.codes(torch.randn(9, 33)))
    assert torch.equal(grid.decode(grid.codes(once)), once)


def test_a_strided_column_is_searched_as_a_contiguous_one():
    torch.manual_seed(0)
    grid, w = Grid(torch.rand(6, 2), torch.zeros(6)), torch.randn(9, 6).T
    together = grid.codes(w)
    for j in range(9):
        assert torch.equal(grid.codes(w[:, j : j + 1]), together[:, j : j + 1])


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_levels_add_up_as_the_packed_reference_does(seed, planes):
    """Plane after plane in float32, then the offset: scales of any size round the same way."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(12 * torch.rand(3, planes, generator=g) - 6)
    grid = Grid(stored(torch.randn(3, planes, generator=g) * size), stored(torch.randn(3) * 100))
    for code in range(2**planes):
        level = torch.zeros_like(grid.offset)
        for p in range(planes):
            level += grid.scale[:, p] * (1.0 if code >> p & 1 else -1.0)
        assert torch.equal(grid.levels()[:, code], level + grid.offset)


# Lloyd-Max for the normal distribution; sums of free planes cannot place 8 or 16 levels at will.
@pytest.mark.parametrize(
    ("planes", "best", "tolerance"),
    [(0, 1.0, 0.0), (1, 0.3634, 0.01), (2, 0.1175, 0.02), (3, 0.03454, 0.12), (4, 0.0105, 0.35)],
)
def test_plane_fit_on_gaussian_data_is_close_to_lloyd_max(planes, best, tolerance):
    torch.manual_seed(0)
    W = torch.randn(8, 4096)
    W /= W.pow(2).mean(1, keepdim=True).sqrt()
    found = float(distortion(W, fit_planes(W, torch.ones(4096), planes)).mean())
    assert best * 0.98 <= found <= best * (1 + tolerance) + 1e-6


@pytest.mark.parametrize(("n", "c"), AWKWARD)
def test_more_planes_never_hurt_and_every_number_fits_in_a_half(n, c):
    torch.manual_seed(c)
    W, weight = torch.randn(n, c) * 0.05, torch.rand(c) + 0.01
    before = W.double().pow(2) @ (weight / weight.sum()).double() * (1 + 1e-6)
    for planes in range(5):
        grid = fit_planes(W, weight, planes)
        assert fits_in_half(grid)
        assert grid.scale.shape == (n, planes)
        after = distortion(W, grid, weight)
        # 2**-11: the rounding of the scales
        assert (after <= before + 1e-3 * before + (0.05 * 2**-11) ** 2).all()
        before = after


def test_one_plane_is_the_weighted_mean_magnitude():
    W, weight = torch.tensor([[1.0, -3.0, 2.0]]), torch.tensor([1.0, 1.0, 2.0])
    grid = fit_planes(W, weight, 1)
    assert grid.scale.tolist() == [[2.0]]  # (1 + 3 + 2·2) / 4
    assert grid.offset.tolist() == [0.0]
    assert grid.decode(grid.codes(W)).tolist() == [[2.0, -2.0, 2.0]]


def test_four_exact_levels_are_found_with_two_planes():
    W = torch.tensor([[-1.5, -0.5, 0.5, 1.5] * 4, [-3.0, -1.0, 1.0, 3.0] * 4])
    grid = fit_planes(W, torch.ones(16), 2)
    torch.testing.assert_close(grid.decode(grid.codes(W)), W, atol=2e-3, rtol=0)


def test_the_lloyd_steps_improve_on_the_greedy_start():
    torch.manual_seed(0)
    W, weight = torch.randn(16, 577).exp(), torch.rand(577)
    greedy = distortion(W, fit_planes(W, weight, 3, iterations=0), weight)
    refined = distortion(W, fit_planes(W, weight, 3), weight)
    assert refined.sum() < 0.8 * greedy.sum()


@pytest.mark.parametrize("fit", [fit_planes, fit_uniform])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_the_weight_says_which_errors_count(fit, planes):
    """Heavy columns are wide, light ones narrow: a fit to the ones is no fit to the others."""
    torch.manual_seed(0)
    W, heavy = torch.randn(16, 200), torch.arange(200) < 20
    W = torch.where(heavy, 3 * W, W)
    weight = torch.where(heavy, 100.0, 1.0)
    fitted, blind = fit(W, weight, planes), fit(W, torch.ones(200), planes)
    assert distortion(W, fitted, weight).sum() < 0.9 * distortion(W, blind, weight).sum()


@pytest.mark.parametrize("planes", [2, 3])
def test_plane_scales_settle_at_weighted_least_squares_on_their_codes(planes):
    torch.manual_seed(0)
    W, weight = torch.randn(4, 96), torch.rand(96) ** 4 + 1e-3
    grid = fit_planes(W, weight, planes, iterations=100)
    sigma, root = signs(planes)[grid.codes(W).long()].double(), weight.double().sqrt()
    for row in range(4):
        A, y = sigma[row] * root[:, None], W[row].double() * root
        exact = torch.linalg.lstsq(A, y).solution
        torch.testing.assert_close(grid.scale[row].double(), exact, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("fit", [fit_planes, fit_uniform])
@pytest.mark.parametrize("planes", [1, 2, 4])
def test_zero_and_constant_rows(fit, planes):
    W = torch.stack([torch.zeros(33), torch.full((33,), -0.25), torch.full((33,), 3.0)])
    grid = fit(W, torch.ones(33), planes)
    assert fits_in_half(grid)
    torch.testing.assert_close(grid.decode(grid.codes(W)), W, atol=2e-3, rtol=1e-3)


def test_the_plain_uniform_grid_is_asymmetric_min_max():
    # low -1, high 2, three steps of 1: levels -1 0 1 2
    W = torch.tensor([[-1.0, 2.0, 0.4, 0.6]])
    grid = fit_uniform(W, torch.ones(4), 2, search=False)
    assert grid.levels().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    assert grid.codes(W).tolist() == [[0, 3, 1, 2]]


def test_the_uniform_range_includes_zero():
    W = torch.tensor([[3.0, 4.5, 4.0], [-3.0, -4.5, -4.0]])
    levels = fit_uniform(W, torch.ones(3), 2, search=False).levels()
    assert levels.tolist() == [[0.0, 1.5, 3.0, 4.5], [-4.5, -3.0, -1.5, 0.0]]


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "c"), AWKWARD)
def test_the_search_is_never_worse_and_stays_uniform(n, c, planes):
    torch.manual_seed(c + planes)
    W, weight = torch.randn(n, c) ** 3, torch.rand(c) + 0.01
    plain = fit_uniform(W, weight, planes, search=False)
    searched = fit_uniform(W, weight, planes)
    assert (distortion(W, searched, weight) <= distortion(W, plain, weight) * (1 + 1e-5)).all()
    for grid in (plain, searched):
        assert fits_in_half(grid)
        ties = grid.scale[:, :1] * 2.0 ** torch.arange(planes)
        assert torch.equal(grid.scale, ties)


@pytest.mark.parametrize("size", [1.0, 2.0**-22])  # the latter near float16's least number
def test_the_search_is_never_worse_than_any_range_it_tries(size):
    torch.manual_seed(0)
    W, weight = size * torch.randn(64, 63) ** 3, torch.rand(63)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    tried = [_uniform(low * r / 20, high * r / 20, 3) for r in range(8, 21)]
    best = torch.stack([distortion(W, grid, weight) for grid in tried]).amin(0)
    found = distortion(W, fit_uniform(W, weight, 3), weight)
    assert (found <= best * (1 + 1e-5)).all()
    if size == 1:  # least squares on the codes adds to the search
        assert found.sum() < 0.98 * best.sum()


def test_the_search_gains_on_heavy_tails():
    torch.manual_seed(0)
    W, weight = torch.randn(32, 577) ** 3, torch.ones(577)
    plain = distortion(W, fit_uniform(W, weight, 3, search=False)).sum()
    assert distortion(W, fit_uniform(W, weight, 3)).sum() < 0.8 * plain


@pytest.mark.parametrize(("planes", "best"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_symmetric_fit_on_gaussian_data_is_close_to_the_best_uniform_quantizer(planes, best):
    """Max 1960, table II."""
    torch.manual_seed(0)
    W, weight = torch.randn(16, 8192), torch.ones(8192)
    grid = fit_symmetric(W, weight, planes)
    assert distortion(W, grid).mean() == pytest.approx(best, rel=0.03)
    assert not grid.offset.any()
    assert torch.equal(grid.scale, grid.scale[:, :1] * 2.0 ** torch.arange(planes))


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_symmetric_fit_is_as_good_as_a_fine_search_over_its_only_number(planes):
    torch.manual_seed(1)
    W, weight = torch.randn(9, 63) ** 3, torch.rand(63)
    found = distortion(W, fit_symmetric(W, weight, planes), weight)
    power, least = 2.0 ** torch.arange(planes), torch.full((9,), torch.inf)
    size = W.pow(2).mean(1).sqrt()
    for factor in torch.linspace(0.02, 3, 300).tolist():
        grid = Grid(stored(size * factor)[:, None] * power, torch.zeros(9))
        least = torch.minimum(least, distortion(W, grid, weight))
    assert (found <= 1.1 * least).all()


@pytest.mark.parametrize("fit", [fit_planes, fit_uniform, fit_symmetric])
def test_scaling_by_two_scales_the_grid_by_two(fit):
    torch.manual_seed(0)
    W, weight = torch.randn(5, 96), torch.rand(96)
    one, two = fit(W, weight, 3), fit(2 * W, weight, 3)
    assert torch.equal(2 * one.scale, two.scale)
    assert torch.equal(2 * one.offset, two.offset)


def test_rows_are_fitted_independently():
    torch.manual_seed(0)
    W, weight = torch.randn(6, 63), torch.rand(63)
    for fit in (fit_planes, fit_uniform, fit_symmetric):
        whole, part = fit(W, weight, 2), fit(W[2:3], weight, 2)
        torch.testing.assert_close(whole.scale[2:3], part.scale, atol=0, rtol=2**-10)


def test_a_tier_grid_multiplies_ties_out_and_fills_in_the_offset():
    tied = TierGrid(torch.tensor([[[0.5]]]), None).grid(Tier(3, 4, tied=True), 0)
    assert tied.scale.tolist() == [[0.5, 1.0, 2.0]]
    assert tied.offset.tolist() == [0.0]
    free = TierGrid(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[5.0, 6.0]]))
    second = free.grid(Tier(2, 4, offset=True, group_size=2), 1)
    assert second.scale.tolist() == [[3.0, 4.0]]
    assert second.offset.tolist() == [6.0]


def test_dequantize_by_hand():
    """Columns 1 and 3 pruned to an offset, 0 and 4 in two groups of one, 2 with two tied planes."""
    qw = QuantizedWeight(
        tiers=(
            Tier(0, 2, offset=True),
            Tier(1, 2, group_size=1),
            Tier(2, 1, tied=True, offset=True),
        ),
        tier_of=torch.tensor([1, 0, 2, 0, 1], dtype=torch.uint8),
        codes=torch.tensor([[1, 0, 2, 0, 0], [0, 0, 3, 0, 1]], dtype=torch.uint8),
        grids=[
            TierGrid(torch.zeros(2, 1, 0), torch.tensor([[0.5], [-0.5]])),
            TierGrid(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), None),
            TierGrid(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.25], [0.0]])),
        ],
        column_scale=torch.tensor([1.0, 1.0, 2.0, 4.0, 1.0]),
    )
    # tied planes 1 and 2, code 2: -1 + 2 + 0.25 = 1.25, times the column's 2
    assert qw.dequantize().tolist() == [[1.0, 0.5, 2.5, 2.0, -2.0], [-3.0, -0.5, 12.0, -2.0, 4.0]]
    assert qw.columns(0).tolist() == [1, 3]


def test_shapes_and_dtypes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        Grid(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(TypeCheckError):
        fit_planes(torch.zeros(3, 4), torch.ones(5), 1)
