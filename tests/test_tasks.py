from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metabench.tasks import Execution, Strategy, choose

BOTH: list[Strategy] = ["serial", "vmap"]


def cubic(params: dict[str, Tensor]) -> Tensor:
    return (params["a"] ** 3 * params["b"]).sum()


def leaves() -> dict[str, Tensor]:
    return {
        "a": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True),
    }


@pytest.mark.parametrize("strategy", BOTH)
def test_map_keeps_nested_structures_with_the_task_axis_first(strategy: Strategy) -> None:
    def fn(pair: tuple[Tensor, dict[str, Tensor]], x: Tensor) -> tuple[dict[str, Tensor], tuple[()], Tensor]:
        return {"sum": pair[0] + pair[1]["k"]}, (), x.sum()

    first, second = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)
    sums, nothing, totals = Execution(strategy).map(fn, (first, {"k": second}), torch.arange(12.0).reshape(3, 4))
    assert torch.equal(sums["sum"], first + 1) and nothing == ()
    assert torch.equal(totals, torch.tensor([6.0, 22.0, 38.0]))


@pytest.mark.parametrize("strategy", BOTH)
def test_results_that_do_not_depend_on_the_task_get_the_task_axis(strategy: Strategy) -> None:
    shared = torch.tensor([1.0, 2.0])
    got = Execution(strategy).map(lambda x: (shared, x), torch.zeros(3, 1))[0]
    assert torch.equal(got, shared.expand(3, 2))


@pytest.mark.parametrize("strategy", BOTH)
def test_second_order_gradient_is_differentiable(strategy: Strategy) -> None:
    start = leaves()
    gradient = Execution(strategy).gradient(cubic, start, second_order=True)
    torch.testing.assert_close(gradient["a"], 3 * start["a"] ** 2 * start["b"])
    (second,) = torch.autograd.grad(gradient["a"].sum(), start["a"])
    torch.testing.assert_close(second, 6 * start["a"] * start["b"])


@pytest.mark.parametrize("strategy", BOTH)
@pytest.mark.parametrize(("second_order", "grad_enabled"), [(False, True), (False, False), (True, False)])
def test_otherwise_the_gradient_is_a_constant(strategy: Strategy, second_order: bool, grad_enabled: bool) -> None:
    start = leaves()
    with torch.set_grad_enabled(grad_enabled):
        gradient = Execution(strategy).gradient(cubic, start, second_order=second_order)
    assert not any(v.requires_grad for v in gradient.values())
    torch.testing.assert_close(gradient["b"], start["a"].detach() ** 3)
    assert all(v.requires_grad and v.grad is None for v in start.values())


@pytest.mark.parametrize("strategy", BOTH)
def test_frozen_parameters_stay_frozen(strategy: Strategy) -> None:
    start = {name: value.detach() for name, value in leaves().items()}
    gradient = Execution(strategy).gradient(cubic, start, second_order=True)
    torch.testing.assert_close(gradient["b"].detach(), start["a"] ** 3)
    assert not any(v.requires_grad for v in start.values())


def test_outer_gradients_flow_through_map_alike() -> None:
    weight = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def outer(execution: Execution) -> Tensor:
        def task(x: Tensor) -> Tensor:
            step = execution.gradient(lambda p: ((p["w"] * x).sum() - 1) ** 2, {"w": weight}, second_order=True)
            return (((weight - 0.1 * step["w"]) * x).sum() - 1) ** 2

        return torch.autograd.grad(execution.map(task, x).mean(), weight)[0]

    torch.testing.assert_close(outer(Execution("serial")), outer(Execution("vmap")), rtol=1e-12, atol=1e-14)


def test_choice_is_a_rule_on_shapes() -> None:
    few, many, single = torch.zeros(4, 10, 1), torch.zeros(4, 11, 1), torch.zeros(1, 10, 1)
    assert [choose("auto", x, limit=10).strategy for x in (few, many, single)] == ["vmap", "serial", "serial"]
    assert choose("serial", few, limit=10).strategy == "serial"
    assert choose("vmap", many, limit=10).strategy == "vmap"
