"""Packing is exact: the same codes and numbers come back, and kernels see the same weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbq.grid import QuantizedWeight, TierGrid
from pbq.pack import pack, unpack
from pbq_kernels import reference
from pbq_kernels.layout import PackedFormatError, Tier


def halves(*shape, generator, spread=6.0):
    """Float32 numbers a float16 holds, of either sign and of very different sizes."""
    size = torch.exp(spread * (2 * torch.rand(*shape, generator=generator) - 1))
    return (torch.randn(*shape, generator=generator) * size).half().float()


def random_weight(n, tiers, column_scale=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    tier_of = torch.repeat_interleave(torch.tensor([t.columns for t in tiers])).to(torch.uint8)
    tier_of = tier_of[torch.randperm(len(tier_of), generator=g)]
    limit = torch.tensor([2**t.planes for t in tiers])[tier_of.long()]
    codes = (torch.rand(n, len(tier_of), generator=g) * limit).to(torch.uint8)
    grids = [
        TierGrid(
            halves(n, t.groups, min(t.planes, 1) if t.tied else t.planes, generator=g),
            halves(n, t.groups, generator=g) if t.offset else None,
        )
        for t in tiers
    ]
    scale = halves(len(tier_of), generator=g, spread=1.0) if column_scale else None
    return QuantizedWeight(tuple(tiers), tier_of, codes, grids, scale)


def assert_same(a, b):
    assert a.tiers == b.tiers
    assert torch.equal(a.tier_of, b.tier_of)
    assert torch.equal(a.codes, b.codes)
    for x, y in zip(a.grids, b.grids, strict=True):
        assert torch.equal(x.scale, y.scale)
        assert (x.offset is None) == (y.offset is None)
        assert x.offset is None or torch.equal(x.offset, y.offset)
    assert (a.column_scale is None) == (b.column_scale is None)
    assert a.column_scale is None or torch.equal(a.column_scale, b.column_scale)


TIERS = st.builds(
    Tier,
    planes=st.integers(0, 8),
    columns=st.integers(0, 40),
    tied=st.booleans(),
    offset=st.booleans(),
    group_size=st.sampled_from([-1, 1, 8, 13]),
)


@given(
    n=st.integers(1, 9),
    tiers=st.lists(TIERS, min_size=1, max_size=5).filter(lambda ts: any(t.columns for t in ts)),
    column_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_packing_is_exact(n, tiers, column_scale, seed):
    qw = random_weight(n, tiers, column_scale, seed)
    pw = pack(qw)
    assert_same(unpack(pw), qw)
    assert torch.equal(reference.dequantize(pw), qw.dequantize())
    assert pw.stored_bits == qw.layout().stored_bits
    repacked = pack(unpack(pw))
    assert repacked.layout == pw.layout
    assert all(torch.equal(pw.tensors[name], t) for name, t in repacked.tensors.items())


def test_bytes_by_hand():
    """Columns 0 and 3 one plane, 1 and 2 two planes: tier after tier, plane after plane."""
    qw = QuantizedWeight(
        (Tier(1, 2), Tier(2, 2, offset=True)),
        torch.tensor([0, 1, 1, 0], dtype=torch.uint8),
        torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8),
        [
            TierGrid(torch.tensor([[[0.5]]]), None),
            TierGrid(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[-0.25]])),
        ],
    )
    tensors = pack(qw).tensors
    # tier 0: 1, 0; tier 1: plane 0 of 2 and 3 is 0, 1, plane 1 is 1, 1
    assert tensors["weight"].tolist() == [[0b01, 0b1110]]
    assert tensors["scale"].tolist() == [[0.5, 1.0, 2.0]]
    assert tensors["offset"].tolist() == [[-0.25]]
    assert tensors["tier"].tolist() == [0, 1, 1, 0]
    assert sorted(tensors) == ["offset", "scale", "tier", "weight"]


def test_an_empty_tier_stores_no_offset():
    qw = random_weight(3, (Tier(1, 33), Tier(4, 0, tied=True, offset=True)))
    assert "offset" not in pack(qw).tensors
    assert_same(unpack(pack(qw)), qw)


def test_packing_copies():
    qw = random_weight(2, (Tier(1, 8), Tier(2, 8)))
    pw = pack(qw)
    qw.tier_of[:] = 9
    assert int(pw.tensors["tier"].max()) == 1


@pytest.mark.parametrize("where", ["scale", "offset", "column_scale"])
@pytest.mark.parametrize("bad", [1 + 2**-12, 65536.0, float("nan"), float("inf")])
def test_numbers_that_a_float16_does_not_hold_are_refused(where, bad):
    qw = random_weight(3, (Tier(1, 9), Tier(4, 8, tied=True, offset=True)), column_scale=True)
    target = qw.column_scale if where == "column_scale" else getattr(qw.grids[1], where)
    target.view(-1)[-1] = bad
    with pytest.raises((ValueError, PackedFormatError), match="finite"):
        pack(qw)


def test_a_code_beyond_its_tier_is_refused():
    qw = random_weight(3, (Tier(1, 9), Tier(2, 8)))
    qw.codes[1, qw.columns(0)[3]] = 2
    with pytest.raises(ValueError, match="code 2 does not fit in 1 planes"):
        pack(qw)


def test_columns_that_disagree_with_the_tiers_are_refused():
    qw = random_weight(3, (Tier(1, 9), Tier(1, 15)))
    # 10 and 14 columns take the same bytes as 9 and 15
    qw.tier_of[qw.columns(1)[0]] = 0
    with pytest.raises(PackedFormatError, match=r"tier: column counts \[10, 14\]"):
        pack(qw)


def test_an_overlay_comes_back(random_packed):
    pw = random_packed(5, 64, overlay=0.1, column_scale=True)
    again = pack(unpack(pw))
    assert again.layout == pw.layout
    assert all(torch.equal(t, again.tensors[name]) for name, t in pw.tensors.items())


def test_every_tensor_is_made_on_the_weight_s_device():
    """A factory call without a device would land on `meta` here and fail to mix with the rest."""
    qw = random_weight(3, (Tier(0, 3), Tier(1, 9), Tier(4, 8, tied=True, offset=True)))
    expected = pack(qw).tensors
    with torch.device("meta"):
        pw = pack(qw)
        back = unpack(pw)
    assert all(torch.equal(pw.tensors[name], t) for name, t in expected.items())
    assert_same(back, qw)
