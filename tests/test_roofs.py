"""The machine's roofs, and the least time that work takes beneath them. No wall-clock figure is asserted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metabench import roofs
from metabench.errors import Unsupported
from metabench.roofline import bound

MACHINE = {"float32_flops": 1e11, "bf16_flops": 4e11, "bytes": 1e10, "threads": 2.0}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(roofs, "SECONDS", 0.0)
    monkeypatch.setattr(roofs, "FIRST_SIDE", 64)
    monkeypatch.setattr(roofs, "LAST_SIDE", 128)
    monkeypatch.setattr(roofs, "COPIED", 2**20)


def test_every_roof_is_measured_positive_and_finite(quick):
    state = torch.get_rng_state()
    found = roofs.measure()
    assert set(found) == {"float32_flops", "bf16_flops", "bytes", "threads"}
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert found["threads"] == torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), state)
    assert bound(1e9, 1e6, found, "bf16")[0] > 0


def test_the_roofs_of_a_precision_are_called_as_the_cells_call_it():
    from metabench.cells import PRECISIONS

    assert set(roofs.PRECISIONS) == set(PRECISIONS)


def test_controls_are_fixed_work():
    first, second = roofs.controls(), roofs.controls()
    assert set(first) == {"matmul", "python"}
    product = first["matmul"]()
    assert isinstance(product, torch.Tensor)
    assert torch.equal(product.clone(), second["matmul"]())
    assert first["python"]() == second["python"]() == sum(i * i for i in range(roofs.CONTROL_LOOPS))


@pytest.mark.parametrize(
    ("flops", "bytes", "precision", "seconds", "limit"),
    [
        (1e11, 0, "float32", 1.0, "compute"),
        (1e11, 1e9, "bf16", 0.25, "compute"),
        (1e11, 5e9, "bf16", 0.5, "memory"),
        (0, 1e10, "float32", 1.0, "memory"),
        (1e11, 1e10, "float32", 1.0, "compute"),  # a tie
        (0, 0, "float32", 0.0, "compute"),
    ],
)
def test_the_slower_of_computing_and_moving_bounds_the_work(flops, bytes, precision, seconds, limit):
    assert bound(flops, bytes, MACHINE, precision) == (pytest.approx(seconds), limit)


@given(st.floats(0, 1e18), st.floats(0, 1e18), st.floats(1, 100))
def test_more_work_never_takes_less(flops, bytes, factor):
    least, _ = bound(flops, bytes, MACHINE, "float32")
    assert bound(factor * flops, factor * bytes, MACHINE, "float32")[0] >= least
    assert least >= max(flops / MACHINE["float32_flops"], bytes / MACHINE["bytes"])


def test_a_precision_without_a_roof_is_named_with_those_that_have_one():
    with pytest.raises(Unsupported, match=r"'float64' \(measured: bf16, float32\)"):
        bound(1, 1, MACHINE, "float64")


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_impossible_figures_are_refused(wrong):
    for work in ((wrong, 1), (1, wrong)):
        with pytest.raises(ValueError, match="flops and bytes must be"):
            bound(*work, MACHINE, "float32")
    for key in ("float32_flops", "bytes"):
        with pytest.raises(ValueError, match="roofs must be"):
            bound(1, 1, {**MACHINE, key: 0.0 if wrong == -1.0 else wrong}, "float32")
