from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from metabench.tasks import CACHE, Execution, Strategy, choose, fastest, per_task

EVERY = [Execution("serial"), Execution("vmap", 2), Execution("grouped", 2), Execution("unfold", 3)]
every_execution = pytest.mark.parametrize("execution", EVERY, ids=str)


def cubic(params: dict[str, Tensor]) -> Tensor:
    return (params["a"] ** 3 * params["b"]).sum()


def leaves() -> dict[str, Tensor]:
    return {
        "a": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True),
    }


@every_execution
def test_map_keeps_nested_structures_with_the_task_axis_first(execution: Execution) -> None:
    def fn(pair: tuple[Tensor, dict[str, Tensor]], x: Tensor) -> tuple[dict[str, Tensor], tuple[()], Tensor]:
        return {"sum": pair[0] + pair[1]["k"]}, (), x.sum(1)

    first, second = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)
    sums, nothing, totals = execution.map(fn, (first, {"k": second}), torch.arange(12.0).reshape(3, 4))
    assert torch.equal(sums["sum"], first + 1) and nothing == ()
    assert torch.equal(totals, torch.tensor([6.0, 22.0, 38.0]))


def test_chunks_are_what_was_asked_for() -> None:
    for execution, sizes in ((Execution("serial", 2), [1] * 5), (Execution("unfold", 2), [2, 2, 1])):
        seen: list[int] = []
        execution.map(lambda x, seen=seen: seen.append(len(x)) or x, torch.zeros(5, 1))
        assert seen == sizes
    assert [str(e) for e in (Execution("serial"), Execution("vmap", 3))] == ["serial", "vmap/3"]


@every_execution
def test_second_order_gradient_is_differentiable(execution: Execution) -> None:
    start = leaves()
    gradient = execution.gradient(cubic, start, second_order=True)
    torch.testing.assert_close(gradient["a"], 3 * start["a"] ** 2 * start["b"])
    (second,) = torch.autograd.grad(gradient["a"].sum(), start["a"])
    torch.testing.assert_close(second, 6 * start["a"] * start["b"])


@every_execution
@pytest.mark.parametrize(("second_order", "grad_enabled"), [(False, True), (False, False), (True, False)])
def test_otherwise_the_gradient_is_a_constant(execution: Execution, second_order: bool, grad_enabled: bool) -> None:
    start = leaves()
    with torch.set_grad_enabled(grad_enabled):
        gradient = execution.gradient(cubic, start, second_order=second_order)
    assert not any(v.requires_grad for v in gradient.values())
    torch.testing.assert_close(gradient["b"], start["a"].detach() ** 3)
    assert all(v.requires_grad and v.grad is None for v in start.values())


@every_execution
def test_frozen_parameters_stay_frozen(execution: Execution) -> None:
    start = {name: value.detach() for name, value in leaves().items()}
    gradient = execution.gradient(cubic, start, second_order=True)
    torch.testing.assert_close(gradient["b"].detach(), start["a"] ** 3)
    assert not any(v.requires_grad for v in start.values())


@every_execution
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_gradient_and_what_else_the_loss_gives_are_constants(execution: Execution, grad_enabled: bool) -> None:
    start = leaves()
    with torch.set_grad_enabled(grad_enabled):
        gradient, (more, nothing) = execution.gradient_and_more(lambda p: (cubic(p), ({"b": 2 * p["b"]}, ())), start)
    torch.testing.assert_close(gradient["b"], start["a"].detach() ** 3)
    torch.testing.assert_close(more["b"], 2 * start["b"].detach())
    assert nothing == () and not more["b"].requires_grad and not any(v.requires_grad for v in gradient.values())
    assert all(v.requires_grad and v.grad is None for v in start.values())


@every_execution
def test_outer_gradients_flow_through_map_alike(execution: Execution) -> None:
    weight = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def outer(x: Tensor) -> Tensor:
        fast = per_task({"w": weight}, len(x))
        step = execution.gradient(lambda p: (((p["w"] * x).sum(1) - 1) ** 2).sum(), fast, second_order=True)
        return (((fast["w"] - 0.1 * step["w"]) * x).sum(1) - 1) ** 2

    got = torch.autograd.grad(execution.map(outer, x).mean(), weight)[0]
    # by hand: g = 2 (w.x - 1) x, and the adapted w has the derivative 1 - 0.2 x x'
    wanted = torch.zeros(2, dtype=torch.float64)
    for one in x:
        moved = weight.detach() - 0.2 * (weight.detach() @ one - 1) * one
        wanted += 2 * (moved @ one - 1) * (one - 0.2 * one * (one @ one)) / len(x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_choice_is_a_rule_on_shapes() -> None:
    x = torch.zeros(8, 10, 1)
    fits = CACHE // (4 * 10 * 3)  # activations of an example for which three tasks fit
    assert choose("auto", x, widest=fits, stride=2) == Execution("unfold", 3)
    assert choose("auto", x, widest=fits, stride=1) == Execution("grouped", 3)
    assert choose("auto", x, widest=100 * fits, stride=1).chunk == 1
    assert choose("auto", x[:4], widest=fits, stride=1).chunk == 2  # rather than three tasks and one
    assert choose("auto", x.double(), widest=1, stride=1).chunk == 8
    assert choose("serial", x, widest=1, stride=1) == Execution("serial")
    assert choose("vmap", x, widest=fits, stride=1) == Execution("vmap", 3)


def test_the_rules_choice_stays_unless_another_is_clearly_faster() -> None:
    seconds: dict[Strategy, float] = {"unfold": 0.02, "grouped": 0.018, "vmap": 0.002}
    runs: list[Strategy] = []

    def run(strategy: Strategy) -> None:
        runs.append(strategy)
        time.sleep(seconds[strategy])

    assert fastest(run, ("unfold", "grouped")) == "unfold"
    assert runs == ["unfold", "grouped"] * 4
    assert fastest(run, ("unfold", "grouped", "vmap")) == "vmap"
    assert fastest(run, ("grouped",)) == "grouped"
