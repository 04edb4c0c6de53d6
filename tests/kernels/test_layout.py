"""The packed layout byte for byte: golden bytes, round trips, the bits of a real file, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pbq_kernels.layout import (
    MAX_FEATURES,
    PackedFormatError,
    PackedWeight,
    Tier,
    WeightLayout,
    check_tensors,
    encode_overlay,
    expand_scales,
    overlay_positions,
    pack_bits,
    pack_codes,
    unpack_bits,
    unpack_codes,
)
from pbq_kernels.reference import dequantize

RandomPacked = Callable[..., PackedWeight]

# The worked example of docs/format.md: every byte, and the weight that they mean.
EXAMPLE = WeightLayout(
    2,
    10,
    (Tier(0, 1), Tier(1, 4), Tier(2, 3, group_size=2), Tier(4, 2, tied=True, offset=True)),
)
EXAMPLE_BYTES = {
    "weight": "0d2966 0835aa",
    "scale": "0038 0034 0038 003c 0040 0030 003c 0038 003c 0034 0034 0034",
    "offset": "0038 00bc",
    "tier": "01 03 00 02 01 02 01 03 02 01",
}
EXAMPLE_WEIGHT = [
    [0.5, 1.125, 0.0, 0.75, -0.5, -0.75, 0.5, -0.125, 1.0, 0.5],
    [-1.0, -4.75, 0.0, -0.5, -1.0, 0.5, -1.0, 2.75, 0.5, 1.0],
]
EXAMPLE_CODES = {1: [[1, 0, 1, 1], [0, 0, 0, 1]], 2: [[3, 0, 2], [1, 2, 3]], 3: [[10, 5], [0, 15]]}


def from_hex(text: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).reshape(shape)


def to_hex(tensor: Tensor) -> str:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def example() -> PackedWeight:
    specs = EXAMPLE.tensors()
    return PackedWeight(
        EXAMPLE, {n: from_hex(EXAMPLE_BYTES[n], s.dtype, s.shape) for n, s in specs.items()}
    )


def test_the_golden_bytes_mean_the_golden_weight() -> None:
    pw = example()
    assert dequantize(pw).tolist() == EXAMPLE_WEIGHT
    assert pw.permutation().tolist() == [2, 0, 4, 6, 9, 3, 5, 8, 1, 7]
    assert pw.stored_bits == EXAMPLE.stored_bits == 8 * (6 + 24 + 4 + 10)


def test_the_specification_shows_the_golden_bytes() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "format.md").read_text()
    shown = text.partition("## Example")[2]
    described = shown.partition("`")[2].partition("`")[0]
    assert WeightLayout.from_dict(json.loads(described)) == EXAMPLE
    hex_text = "".join(shown.split())
    for name, spec in EXAMPLE.tensors().items():
        data = EXAMPLE_BYTES[name].replace(" ", "")
        row = 2 * spec.nbytes // (1 if name == "tier" else EXAMPLE.n)
        assert all(data[i : i + row] in hex_text for i in range(0, len(data), row))
    assert "f3 f1 7f" in shown


def test_the_golden_codes_become_the_golden_bytes() -> None:
    parts = [
        pack_codes(torch.tensor(codes, dtype=torch.uint8), EXAMPLE.tiers[i].planes)
        for i, codes in EXAMPLE_CODES.items()
    ]
    assert to_hex(torch.cat(parts, 1)) == EXAMPLE_BYTES["weight"].replace(" ", "")


def test_bits_are_packed_least_significant_first_and_padded_with_zeros() -> None:
    bits = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0, 0, 1, 0]])
    assert to_hex(pack_bits(bits)) == "01019600"


@pytest.mark.parametrize(
    ("entries", "counts", "stream"),
    [
        # gaps 3, 16 = 15 + 1 | 37 = 15 + 15 + 7
        ([(0, 3), (0, 20), (1, 37)], [2, 1], "f3f17f"),
        # an odd number of nibbles is padded by a skip
        ([(0, 3), (0, 20)], [2, 0], "f3f1"),
        # a gap of exactly 15 is a skip and then 0; neighbours have gap 0
        ([(1, 15), (1, 16)], [0, 2], "0ff0"),
    ],
)
def test_overlay_stream(entries: list[tuple[int, int]], counts: list[int], stream: str) -> None:
    mask = torch.zeros(2, 40, dtype=torch.bool)
    for row, column in entries:
        mask[row, column] = True
    count, gap = encode_overlay(mask)
    assert count.tolist() == counts
    assert to_hex(gap) == stream.ljust(2 * len(gap), "f")


def test_overlay_replaces_entries_after_the_column_scale() -> None:
    layout = WeightLayout(2, 3, (Tier(1, 3),), column_scale=True, overlay=1, overlay_bytes=1)
    tensors = {
        "weight": from_hex("05 02", torch.uint8, (2, 1)),
        "scale": from_hex("003c 0040", torch.float16, (2, 1)),
        "column_scale": from_hex("0038 003c 0040", torch.float16, (3,)),
        "overlay_count": from_hex("00000000 01000000", torch.int32, (2,)),
        "overlay_gap": from_hex("f2", torch.uint8, (1,)),
        "overlay_value": from_hex("fd", torch.int8, (1,)),
        "overlay_scale": from_hex("0000 0038", torch.float16, (2,)),
    }
    W = dequantize(PackedWeight(layout, tensors))
    assert W.tolist() == [[0.5, -1.0, 2.0], [-1.0, 2.0, -1.5]]


AWKWARD_K = [1, 7, 63, 96, 577]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 33]), st.sampled_from(AWKWARD_K), st.integers(0, 2**31))
def test_pack_bits_round_trip(n: int, k: int, seed: int) -> None:
    bits = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < 0.5
    data = pack_bits(bits)
    assert data.shape == (n, math.ceil(k / 8))
    assert torch.equal(unpack_bits(data, k), bits.to(torch.uint8))
    # the slow twin: one row is one little-endian number
    for row, stored in zip(bits.tolist(), data.tolist(), strict=True):
        assert sum(bit << i for i, bit in enumerate(row)) == int.from_bytes(bytes(stored), "little")


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([1, 33]),
    st.sampled_from(AWKWARD_K),
    st.integers(0, 8),
    st.integers(0, 2**31),
)
def test_pack_codes_round_trip(n: int, k: int, planes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**planes, (n, k), dtype=torch.uint8, generator=generator)
    data = pack_codes(codes, planes)
    assert data.shape == (n, Tier(planes, k).row_bytes)
    assert torch.equal(unpack_codes(data, planes, k), codes)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 33]),
    st.sampled_from(AWKWARD_K),
    st.sampled_from([0.0, 0.003, 0.1, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_overlay_round_trip(n: int, k: int, share: float, seed: int) -> None:
    mask = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < share
    count, gap = encode_overlay(mask)
    # the layout's own bound on the stream's length must admit every mask
    layout = WeightLayout(n, k, (Tier(1, k),), overlay=int(mask.sum()), overlay_bytes=len(gap))
    if mask.any():
        rows, columns = overlay_positions(layout, {"overlay_count": count, "overlay_gap": gap})
        assert torch.equal(torch.stack([rows, columns], 1), mask.nonzero())


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    """Any layout of awkward size: empty tiers, groups that do not divide, every option."""
    n, k = draw(st.sampled_from([1, 3, 33])), draw(st.sampled_from(AWKWARD_K))
    cuts = sorted(draw(st.lists(st.integers(0, k), max_size=4)))
    tiers = tuple(
        Tier(
            planes=draw(st.integers(0, 8)),
            columns=stop - start,
            tied=draw(st.booleans()),
            offset=draw(st.booleans()),
            group_size=draw(st.sampled_from([-1, 1, 5, 64, 1000])),
        )
        for start, stop in zip([0, *cuts], [*cuts, k], strict=True)
    )
    return WeightLayout(n, k, tiers, column_scale=draw(st.booleans()))


@settings(deadline=None, max_examples=100)
@given(layouts())
def test_a_description_survives_json(layout: WeightLayout) -> None:
    assert WeightLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def data_bytes(path: Path) -> int:
    """Bytes of all tensors by the offsets in a safetensors header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = [e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()]
    assert len(data) == 8 + length + sum(sizes)
    return sum(sizes)


@settings(deadline=None, max_examples=50)
@given(layout=layouts(), share=st.sampled_from([0.0, 0.07]), seed=st.integers(0, 2**31))
def test_stored_bits_are_the_bytes_of_a_file(
    random_packed: RandomPacked,
    tmp_path_factory: pytest.TempPathFactory,
    layout: WeightLayout,
    share: float,
    seed: int,
) -> None:
    pw = random_packed(
        layout.n,
        layout.k,
        layout.tiers,
        seed=seed,
        column_scale=layout.column_scale,
        overlay=share,
    )
    path = tmp_path_factory.mktemp("bits") / "model.safetensors"
    save_file(dict(pw.tensors), path)
    assert 8 * data_bytes(path) == pw.stored_bits == pw.layout.stored_bits
    assert pw.bits_per_weight == pw.stored_bits / (layout.n * layout.k)


def test_group_of_column_counts_in_storage_order() -> None:
    assert Tier(1, 7, group_size=3).group_of_column().tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert Tier(1, 3).group_of_column().tolist() == [0, 0, 0]
    assert Tier(1, 0).group_of_column().tolist() == []


def test_scales_of_a_tier_without_any_are_where_the_others_are() -> None:
    layout = WeightLayout(3, 5, (Tier(2, 0), Tier(0, 2), Tier(1, 3)))
    tensors = {
        n: torch.zeros(s.shape, dtype=s.dtype, device="meta") for n, s in layout.tensors().items()
    }
    scales = expand_scales(layout, tensors)
    assert [s.device.type for s in scales] == ["meta", "meta", "meta"]
    assert [tuple(s.shape) for s in scales] == [(3, 0, 2), (3, 1, 0), (3, 1, 1)]


TIER = {"planes": 1, "columns": 7}
GOOD = {"n": 3, "k": 7, "tiers": [TIER]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "tiers"),
        (None, "tiers"),
        ({}, "tiers"),
        ({**GOOD, "tiers": {}}, "tiers"),
        ({**GOOD, "tiers": []}, "0 tiers"),
        ({**GOOD, "tiers": [TIER] * 65}, "64"),
        ({**GOOD, "tiers": [7]}, "expected an object"),
        ({**GOOD, "tiers": [{"planes": 1}]}, "missing field 'columns'"),
        ({"k": 7, "tiers": [TIER]}, "missing field 'n'"),
        ({**GOOD, "surprise": 1}, "unknown field 'surprise'"),
        ({**GOOD, "tiers": [{**TIER, "surprise": 1}]}, "unknown field 'surprise'"),
        ({**GOOD, "n": True}, "'n' has type bool"),
        ({**GOOD, "n": 3.0}, "'n' has type float"),
        ({**GOOD, "n": "3"}, "'n' has type str"),
        ({**GOOD, "n": 0}, "n=0"),
        ({**GOOD, "n": -3}, "n=-3"),
        ({**GOOD, "n": 10**400}, "impossible shape"),
        ({**GOOD, "k": MAX_FEATURES + 1}, "impossible shape"),
        ({**GOOD, "k": 8}, "7 columns, the weight has 8"),
        ({**GOOD, "column_scale": 1}, "'column_scale' has type int"),
        ({**GOOD, "tiers": [{**TIER, "planes": 9}]}, "9 planes"),
        ({**GOOD, "tiers": [{**TIER, "planes": -1}]}, "-1 planes"),
        ({**GOOD, "tiers": [{**TIER, "planes": True}]}, "'planes' has type bool"),
        ({**GOOD, "tiers": [{**TIER, "tied": 1}]}, "'tied' has type int"),
        ({**GOOD, "tiers": [{**TIER, "columns": -7}, {**TIER, "columns": 14}]}, "-7 columns"),
        ({**GOOD, "tiers": [{**TIER, "group_size": 0}]}, "group_size 0"),
        ({**GOOD, "tiers": [{**TIER, "group_size": -2}]}, "group_size -2"),
        ({**GOOD, "tiers": [{**TIER, "group_size": 10**400}]}, "group_size 1000"),
        ({**GOOD, "overlay": -1}, "-1 overlay entries"),
        ({**GOOD, "overlay": 22, "overlay_bytes": 11}, "22 overlay entries"),
        ({**GOOD, "overlay": 0, "overlay_bytes": 1}, "overlay_gap of 1 bytes"),
        ({**GOOD, "overlay": 4, "overlay_bytes": 1}, "overlay_gap of 1 bytes"),
        ({**GOOD, "overlay": 4, "overlay_bytes": 10**12}, "overlay_gap of"),
        ({**GOOD, "rank": -1}, "impossible rank -1"),
        ({**GOOD, "rank": 10**400}, "impossible rank 1000"),
        ({**GOOD, "rank": True}, "'rank' has type bool"),
        ({**GOOD, "rank": "4"}, "'rank' has type str"),
        ({**GOOD, "rank": 4, "overlay": 4, "overlay_bytes": 4}, "has no overlay"),
    ],
)
def test_a_hostile_description_is_refused(data: object, says: str) -> None:
    with pytest.raises(PackedFormatError, match=says):
        WeightLayout.from_dict(data)  # type: ignore[arg-type]


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def with_value(tensor: Tensor, index: int, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: without(t, "scale"), "x.scale: missing"),
        (lambda t: {**t, "surprise": t["tier"]}, "x.surprise: not part"),
        (lambda t: {**t, "weight": t["weight"].to(torch.int8)}, "x.weight: torch.int8"),
        (lambda t: {**t, "weight": t["weight"][:, 1:]}, "x.weight: .*the layout says"),
        (lambda t: {**t, "scale": with_value(t["scale"], 3, math.nan)}, "x.scale: non-finite"),
        (lambda t: {**t, "offset": with_value(t["offset"], 0, math.inf)}, "x.offset: non-finite"),
        (lambda t: {**t, "tier": 1 - t["tier"]}, "x.tier: column counts"),
        (lambda t: {**t, "tier": with_value(t["tier"], 0, 200)}, "x.tier: column counts"),
        (
            lambda t: {**t, "overlay_count": with_value(t["overlay_count"], 0, -1)},
            "x.overlay_count: does not add up",
        ),
        (
            lambda t: {**t, "overlay_gap": torch.full_like(t["overlay_gap"], 255)},
            "x.overlay_gap: holds another number",
        ),
        (
            # all entries in row 0: their gaps add up to more than a row has columns
            lambda t: {**t, "overlay_count": with_value(t["overlay_count"] * 0, 0, 48)},
            "x.overlay_gap: an entry lies outside",
        ),
    ],
)
def test_tensors_that_are_not_the_layouts_are_refused(
    random_packed: RandomPacked, change: Callable[[dict[str, Tensor]], dict], says: str
) -> None:
    tiers = (Tier(1, 40), Tier(4, 23, tied=True, offset=True))
    pw = random_packed(9, 63, tiers, overlay=0.07, seed=5)
    assert pw.layout.overlay == 48
    check_tensors(pw.layout, pw.tensors, "x", values=True)
    with pytest.raises(PackedFormatError, match=says):
        check_tensors(pw.layout, change(dict(pw.tensors)), "x", values=True)
