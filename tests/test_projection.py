"""Random projections keep inner products, and are the same numbers everywhere and always."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from coterie.errors import CoterieError
from coterie.features import projection
from coterie.features.projection import (
    PROJECTIONS,
    Projection,
    RademacherProjection,
    SketchProjection,
    make_projection,
    projection_key,
    splitmix64,
)

every_kind = pytest.mark.parametrize("kind", PROJECTIONS)
few = settings(deadline=None, max_examples=25)
BITS = (1 << 64) - 1


normal = partial(helpers.normal, dtype=torch.float64)


def plain_splitmix64(state: int) -> int:
    """The published finaliser on Python's own integers, for the state after the increment."""
    z = state & BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
    return z ^ (z >> 31)


def unsigned(values: torch.Tensor) -> list[int]:
    return [value & BITS for value in values.tolist()]


def matrix(kind: str, size: int, d_proj: int, *, seed: int = 0, name: str = "w") -> torch.Tensor:
    """The projection as an explicit matrix: what it makes of every unit vector."""
    return make_projection(kind, d_proj, seed)(name, torch.eye(size, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------- random bits


def test_the_hash_gives_the_published_numbers():
    """The first outputs of the reference generator for the seeds 0 and 1234567."""
    from_zero = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert unsigned(splitmix64(torch.arange(1, 6), 0)) == from_zero
    from_seed = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert unsigned(splitmix64(torch.arange(1, 5), 1234567)) == from_seed


@few
@given(key=st.integers(0, BITS), counters=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8))
def test_the_hash_equals_unsigned_integer_arithmetic(key, counters):
    expected = [plain_splitmix64(counter * 0x9E3779B97F4A7C15 + key) for counter in counters]
    assert unsigned(splitmix64(torch.tensor(counters), key)) == expected


def test_every_bit_of_the_hash_is_a_fair_coin_and_no_two_counters_collide():
    values = splitmix64(torch.arange(20_000), projection_key(0, "w"))
    assert len(values.unique()) == 20_000
    ones = torch.stack([(values >> bit) & 1 for bit in range(64)]).double().mean(dim=1)
    assert (ones - 0.5).abs().max().item() < 5 * 0.5 / math.sqrt(20_000)


def test_keys_differ_between_seeds_and_names_and_never_change():
    keys = {projection_key(seed, name) for seed in range(3) for name in ("a", "b", "1:a", "")}
    assert len(keys) == 12
    assert projection_key(0, "w") == 4934497159915746195


# ------------------------------------------------------------------------------------------------------- inner products


@every_kind
@pytest.mark.parametrize(("size", "d_proj"), [(3000, 256), (100, 256), (5000, 64)], ids=["large", "small", "narrow"])
def test_inner_products_are_kept_within_the_error_of_johnson_and_lindenstrauss(kind, size, d_proj):
    """Over many pairs: no bias, and a spread of sqrt((1 + cos^2) / d) about the true cosine."""
    vectors = torch.nn.functional.normalize(normal(60, size) + 0.5 * normal(size, seed=1), dim=1)
    true = vectors @ vectors.T
    pairs = torch.triu_indices(60, 60, offset=1)
    errors = []
    for seed in range(4):
        found = make_projection(kind, d_proj, seed)("w", vectors)
        errors.append((found @ found.T - true)[pairs[0], pairs[1]])
    error = torch.cat(errors)
    expected = math.sqrt((1 + true[pairs[0], pairs[1]].square().mean().item()) / d_proj)
    assert error.square().mean().sqrt().item() < 1.15 * expected
    assert error.abs().max().item() < 6 * expected
    assert abs(error.mean().item()) < expected / 2  # pairs share vectors, so their errors go together


@every_kind
def test_lengths_are_kept_on_average_over_seeds(kind):
    vector = normal(1, 700)
    lengths = [make_projection(kind, 128, seed)("w", vector).square().sum().item() for seed in range(60)]
    ratio = torch.tensor(lengths).mean().item() / vector.square().sum().item()
    assert abs(ratio - 1) < 4 * math.sqrt(2 / 128 / 60)


@every_kind
def test_the_worst_case_of_equal_entries_is_kept_too(kind):
    """Constant vectors have no signs of their own to help: only the projection's are random."""
    ones = torch.ones(1, 2000, dtype=torch.float64)
    found = torch.tensor([make_projection(kind, 128, seed)("w", ones).square().sum().item() for seed in range(40)])
    assert abs(found.mean().item() / 2000 - 1) < 4 * math.sqrt(2 / 128 / 40)


@every_kind
def test_tensors_of_two_names_are_projected_independently(kind):
    """Otherwise the projections of two layers' gradients, added up, would count their products."""
    vector = torch.nn.functional.normalize(normal(1, 2000), dim=1)
    overlaps = []
    for seed in range(40):
        make = make_projection(kind, 128, seed)
        overlaps.append((make("first", vector) * make("second", vector)).sum().item())
    found = torch.tensor(overlaps)
    assert found.square().mean().sqrt().item() < 1.5 / math.sqrt(128)
    assert abs(found.mean().item()) < 4 / math.sqrt(128 * 40)


# -------------------------------------------------------------------------------------------------------- same numbers


@every_kind
def test_a_projection_is_a_function_of_its_seed_and_the_name(kind):
    values = normal(3, 50)
    first = make_projection(kind, 16, seed=5)("w", values)
    assert torch.equal(make_projection(kind, 16, seed=5)("w", values), first)
    assert not torch.allclose(make_projection(kind, 16, seed=6)("w", values), first)
    assert not torch.allclose(make_projection(kind, 16, seed=5)("v", values), first)


@every_kind
def test_the_order_of_calls_does_not_matter(kind):
    values, one, other = normal(3, 50), make_projection(kind, 16), make_projection(kind, 16)
    forward = {name: one(name, values) for name in ("a", "b", "c")}
    backward = {name: other(name, values) for name in ("c", "b", "a", "c")}
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


@every_kind
@few
@given(rows=st.integers(1, 5), size=st.integers(1, 70), seed=st.integers(0, 1000))
def test_projecting_is_linear_and_looks_at_one_row_at_a_time(kind, rows, size, seed):
    project = make_projection(kind, 16, seed)
    x, y = normal(rows, size, seed=seed), normal(rows, size, seed=seed + 1)
    torch.testing.assert_close(project("w", 2 * x - 3 * y), 2 * project("w", x) - 3 * project("w", y))
    torch.testing.assert_close(project("w", x), torch.cat([project("w", row[None]) for row in x]))
    torch.testing.assert_close(project("w", x), x @ matrix(kind, size, 16, seed=seed))
    assert project("w", x).shape == (rows, 16)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_keep_their_precision(kind, dtype):
    values = normal(2, 300)
    found = make_projection(kind, 32)("w", values.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), values @ matrix(kind, 300, 32), rtol=1e-4, atol=1e-4)
    if dtype == torch.float64:
        torch.testing.assert_close(found, values @ matrix(kind, 300, 32), rtol=1e-13, atol=1e-13)


def test_the_numbers_of_format_one_never_change():
    """They stand in saved centroids: other numbers need another format."""
    assert projection.PROJECTION_FORMAT == 1
    sketch, dense = (matrix(kind, 6, 4, seed=3, name="layer.lora_A") for kind in ("sketch", "rademacher"))
    assert [pattern(row) for row in sketch] == ["..+.", "...-", "-...", ".-..", "-...", ".-.."]
    assert [pattern(row) for row in dense] == ["++++", "-++-", "-+--", "-++-", "---+", "-+-+"]


def pattern(row: torch.Tensor) -> str:
    return "".join(".+-"[int(sign)] for sign in row.sign())


# ------------------------------------------------------------------------------------------------------------- matrices


@few
@given(size=st.integers(1, 90), d_proj=st.integers(2, 24), seed=st.integers(0, 1000))
def test_the_sketch_sends_every_element_to_one_place_with_a_sign_and_fills_places_evenly(size, d_proj, seed):
    found = matrix("sketch", size, d_proj, seed=seed)
    assert found.count_nonzero(dim=1).tolist() == [1] * size
    assert set(found.unique().tolist()) <= {-1.0, 0.0, 1.0}
    for start in range(0, size, d_proj):
        assert found[start : start + d_proj].abs().sum(dim=0).max().item() <= 1  # a run shares no place
    filled = found.abs().sum(dim=0)
    assert filled.max() - filled.min() <= 1


def test_the_sketch_draws_fair_signs_and_another_order_for_every_run():
    found = matrix("sketch", 2048, 64)
    assert abs(found.sum().item()) < 4 * math.sqrt(2048)
    orders = found.abs().unflatten(0, (-1, 64)).argmax(dim=2)
    assert len({tuple(order.tolist()) for order in orders}) == 32
    assert all(sorted(order.tolist()) == list(range(64)) for order in orders)


def test_the_sketch_equals_a_loop_over_the_published_hash():
    """In a run, the element with the smallest hash goes to the first place, and so on; the lowest bit is its sign."""
    size, d_proj, seed, name = 23, 8, 4, "w"
    expected = torch.zeros(size, d_proj, dtype=torch.float64)
    hashes = [plain_splitmix64(n * 0x9E3779B97F4A7C15 + projection_key(seed, name)) for n in range(24)]
    for start in range(0, 24, d_proj):
        order = sorted(range(start, start + d_proj), key=lambda n: hashes[n] >> 1)
        for place, element in enumerate(order):
            if element < size:
                expected[element, place] = 1 if hashes[element] & 1 else -1
    assert torch.equal(matrix("sketch", size, d_proj, seed=seed, name=name), expected)


@pytest.mark.parametrize("d_proj", [4, 32, 40])
def test_the_dense_projection_is_of_fair_signs_over_the_root_of_its_dimensions(d_proj):
    found = matrix("rademacher", 900, d_proj) * math.sqrt(d_proj)
    torch.testing.assert_close(found.abs(), torch.ones_like(found))
    assert abs(found.mean().item()) < 4 / math.sqrt(found.numel())
    overlaps = found.T @ found / 900 - torch.eye(d_proj)
    assert overlaps.abs().max().item() < 5 / math.sqrt(900)


def test_the_dense_projection_equals_a_loop_over_the_published_hash():
    """Element n has words n * W, n * W + 1, ...; the lowest 32 bits of each are signs."""
    d_proj, words = 40, 2
    expected = torch.zeros(5, d_proj, dtype=torch.float64)
    for element in range(5):
        for place in range(d_proj):
            counter = element * words + place // 32
            bits = plain_splitmix64(counter * 0x9E3779B97F4A7C15 + projection_key(4, "w"))
            expected[element, place] = (1 if bits >> (place % 32) & 1 else -1) / math.sqrt(d_proj)
    torch.testing.assert_close(matrix("rademacher", 5, d_proj, seed=4), expected)


@pytest.mark.parametrize("elements", [1, 16, 100, 1 << 24])
def test_the_dense_projection_does_not_depend_on_the_size_of_its_blocks(elements, monkeypatch):
    values = normal(3, 70)
    expected = RademacherProjection(16)("w", values)
    monkeypatch.setattr(projection, "BLOCK_ELEMENTS", elements)
    torch.testing.assert_close(RademacherProjection(16)("w", values), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(matrix("rademacher", 70, 16), matrix("rademacher", 70, 16))


def test_projections_are_made_by_name_and_unknown_names_are_told():
    assert isinstance(make_projection("sketch", 8), SketchProjection)
    assert isinstance(make_projection("rademacher", 8), RademacherProjection)
    assert all(isinstance(make_projection(kind, 8), Projection) for kind in PROJECTIONS)
    assert make_projection("sketch", 8).d_proj == 8
    with pytest.raises(
        CoterieError, match="no projection is called 'sketsh'. Did you mean 'sketch'. There are: rademacher"
    ):
        make_projection("sketsh", 8)
