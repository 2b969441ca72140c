"""Counts of work: exact figures on operations whose cost is known by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import environ
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from metabench import counts
from metabench.algorithms import maml
from metabench.algorithms.maml import Maml
from metabench.environment import ALLOCATORS
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import Unsupported
from metabench.tasks import Strategy

FLOAT = 4  # bytes
WAYS = 3


def meta_step(strategy: Strategy, tasks: int):
    """A training step of MAML, after one that makes the optimiser's moments."""

    def batch() -> Batch:
        y = torch.arange(WAYS).expand(tasks, -1)
        return Batch(torch.randn(tasks, WAYS, 1, 16, 16), y, WAYS)

    model: Maml = maml.build(Problem(shape=(1, 16, 16), loss="cross_entropy", ways=WAYS), strategy=strategy)
    trainer = model.train().trainer(10)
    episode = Episode(support=batch(), query=batch(), seeds=torch.arange(tasks))
    trainer.step(episode)
    return lambda: trainer.step(episode)


# --- flops


def test_a_matrix_product_takes_two_flops_per_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert counts.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert counts.flops(lambda: a + a) == 0


@pytest.mark.parametrize(
    ("thunk", "products"),
    [
        (lambda: torch.ones(3, 5) @ torch.ones(5), 15),
        (lambda: torch.ones(5) @ torch.ones(5), 5),
        (lambda: torch.addmv(torch.ones(3), torch.ones(3, 5), torch.ones(5)), 15),
        (lambda: torch.addbmm(torch.ones(3, 7), torch.ones(2, 3, 5), torch.ones(2, 5, 7)), 2 * 3 * 5 * 7),
        (lambda: F.scaled_dot_product_attention(*(torch.ones(1, 2, 4, 8) for _ in range(3))), 2 * 2 * 4 * 4 * 8),
    ],
)
def test_what_torchs_counter_leaves_out_is_counted_too(thunk, products):
    assert counts.flops(thunk) == 2 * products


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_gradients_of_a_convolution_cost_as_much_as_its_forward_pass(groups, transposed):
    convolution = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 4, 9, 9)
    pixels = 9 * 9 if transposed else 5 * 5  # where the filter is applied: on the input's or the output's grid
    forward = 2 * 2 * pixels * (4 * 6 // groups) * 3 * 3

    assert counts.flops(lambda: convolution(x)) == forward
    assert counts.flops(lambda: convolution(x).sum().backward()) == 2 * forward
    x.requires_grad_()
    assert counts.flops(lambda: convolution(x).sum().backward()) == 3 * forward
    convolution.requires_grad_(False)
    assert counts.flops(lambda: convolution(x).sum().backward()) == 2 * forward


def test_gradients_of_second_order_are_counted():
    """y = xw; g = dl/dw is a product more; the gradient of g needs that of both factors of x^T dl/dy."""
    x, w = torch.randn(5, 3), torch.randn(3, 2, requires_grad=True)
    product = 2 * 5 * 3 * 2

    def first():
        return torch.autograd.grad((x @ w).square().sum(), w, create_graph=True)[0]

    assert counts.flops(first) == 2 * product
    # g = x^T (2xw): back through both, the gradients of 2xw and of w
    assert counts.flops(lambda: torch.autograd.grad(first().sum(), w)) == 4 * product


def test_inner_loops_of_torch_func_are_seen():
    x, w = torch.randn(4, 5, 3), torch.randn(3, 2)
    gradient = torch.func.grad(lambda w, x: (x @ w).square().sum())
    one = counts.flops(lambda: gradient(w, x[0]))
    assert one == 2 * (2 * 5 * 3 * 2)
    assert counts.flops(lambda: torch.func.vmap(gradient, (None, 0))(w, x)) == 4 * one


def test_a_module_inside_torch_func_is_seen():
    net = nn.Linear(3, 2, bias=False)
    params, x = dict(net.named_parameters()), torch.randn(4, 5, 3)
    gradient = torch.func.grad(lambda p, x: torch.func.functional_call(net, p, (x,)).square().sum())
    assert counts.flops(lambda: torch.func.vmap(gradient, (None, 0))(params, x)) == 4 * 2 * (2 * 5 * 3 * 2)


def test_a_meta_step_of_many_tasks_costs_as_many_times_that_of_one_however_it_is_run():
    one = counts.flops(meta_step("serial", 1))
    assert one > 0
    for tasks in (2, 3):
        assert counts.flops(meta_step("serial", tasks)) == tasks * one
        assert counts.flops(meta_step("vmap", tasks)) == tasks * one


def test_linear_systems_count_as_is_usual() -> None:
    """n^3 / 3 for Cholesky, 2 n^3 / 3 for LU, 2 n^2 a right-hand side for both substitutions."""
    a, b = torch.eye(6).repeat(4, 1, 1), torch.ones(4, 6, 2)
    close = torch.linalg.cholesky(a)
    assert counts.flops(lambda: torch.linalg.cholesky(a)) == 4 * 6**3 // 3
    assert counts.flops(lambda: torch.linalg.solve(a, b)) == 4 * (2 * 6**3 // 3 + 2 * 6**2 * 2)
    assert counts.flops(lambda: torch.linalg.solve(a[0], b[0, :, 0])) == 2 * 6**3 // 3 + 2 * 6**2
    assert counts.flops(lambda: torch.cholesky_solve(b, close)) == 4 * 2 * 6**2 * 2
    assert counts.flops(lambda: torch.linalg.solve_triangular(close, b, upper=False)) == 4 * 6**2 * 2
    # backward: one solve with the transpose, and the outer product that is the gradient of the matrix
    a.requires_grad_()
    both = counts.flops(lambda: torch.linalg.solve(a, b).sum().backward())
    assert both == 4 * (2 * 6**3 // 3 + 2 * 2 * 6**2 * 2 + 2 * 6 * 2 * 6)


@pytest.mark.parametrize("thunk", [lambda: nn.LSTM(2, 3)(torch.ones(4, 5, 2)), lambda: torch.linalg.inv(torch.eye(3))])
def test_an_operation_without_a_formula_is_refused_not_taken_for_nothing(thunk):
    with pytest.raises(Unsupported, match="FLOPs of aten::"):
        counts.flops(thunk)


# --- bytes

N = 1000
x, y = torch.randn(N), torch.randn(N)
matrix, other = torch.randn(20, 30), torch.randn(30, 40)
target, index = torch.zeros(N), torch.tensor([1, 5, 7])


@pytest.mark.parametrize(
    ("thunk", "elements"),
    [
        (lambda: x + y, 3 * N),
        (lambda: x * 2, 2 * N),
        (lambda: x * x, 2 * N),  # the same data is read once
        (lambda: x.sum(), N + 1),
        (lambda: x.sum().item(), N + 2),
        (lambda: matrix @ other, 20 * 30 + 30 * 40 + 20 * 40),
        (lambda: x.clone(), 2 * N),
        (lambda: torch.cat([x, y]), 4 * N),
        (lambda: torch.equal(x, y), 2 * N),
        # in place: the target is read and written, unless it is only overwritten
        (lambda: target.add_(y), 3 * N),
        (lambda: target.mul_(0.5), 2 * N),
        (lambda: target.copy_(y), 2 * N),
        (lambda: target.zero_(), N),
        (lambda: target.normal_(), N),
        (lambda: torch.add(x, y, out=target), 3 * N),
        (lambda: target[:10].add_(1), 20),
        (lambda: torch._foreach_add_([target, x.clone()], 1.0), 2 * N + 4 * N),
        # made from nothing
        (lambda: torch.zeros(N), N),
        (lambda: torch.zeros_like(x), N),
        (lambda: torch.empty(N), 0),
        (lambda: torch.empty_like(x), 0),
        # views
        (lambda: x.view(10, 100).t()[3:], 0),
        (lambda: matrix.detach().unsqueeze(0).expand(9, -1, -1), 0),
        (lambda: matrix.split(5), 0),
        (lambda: matrix.contiguous().reshape(-1), 0),
        (lambda: torch.ops.aten._unsafe_view(matrix, [600]), 0),
        (lambda: torch.zeros(2, 3).t_(), 6),
        (lambda: matrix.t().contiguous(), 2 * 600),
        # a broadcast operand is as large as what is stored of it
        (lambda: x[:1].expand(N) + x, 1 + 2 * N),
        (lambda: matrix + matrix[0], 600 + 30 + 600),
        (lambda: x.unfold(0, 10, 1).sum(1), N + N - 9),
        (lambda: x[::2].clone(), N),
        (lambda: torch.zeros(0, 5) + 1, 0),
        # lookups fetch what they give, and read the index (int64)
        (lambda: x[index], 3 + 3 + 2 * 3),
        (lambda: x.index_select(0, index), 3 + 3 + 2 * 3),
        (lambda: F.embedding(index, matrix), 90 + 90 + 2 * 3),
    ],
)  # fmt: skip
def test_each_operation_reads_its_inputs_and_writes_its_outputs(thunk, elements):
    assert counts.bytes_moved(thunk) == FLOAT * elements


def test_precision_halves_the_bytes():
    half = x.bfloat16()
    assert counts.bytes_moved(lambda: half + half.flip(0)) == 2 * (3 * N + 2 * N)
    assert counts.bytes_moved(lambda: x.bfloat16()) == (FLOAT + 2) * N


def test_composite_operations_are_taken_apart_with_and_without_gradients():
    weight = torch.randn(40, 30)
    expected = FLOAT * (20 * 30 + 30 * 40 + 20 * 40)
    assert counts.bytes_moved(lambda: F.linear(matrix, weight)) == expected
    with torch.inference_mode():
        assert counts.bytes_moved(lambda: F.linear(matrix, weight)) == expected


def test_a_backward_pass_is_counted():
    w = torch.randn(N, requires_grad=True)
    # forward: product, sum; backward: a one is written, the expanded one times x gives the gradient
    forward, backward = 3 * N + N + 1, 1 + (1 + 2 * N)
    assert counts.bytes_moved(lambda: (w * x).sum().backward()) == FLOAT * (forward + backward)


def test_bytes_hold_beneath_grad_and_vmap():
    def gradient(w, x):
        return torch.func.grad(lambda w: (w * x).sum())(w)

    plain = counts.bytes_moved(lambda: gradient(y, x))
    assert plain == FLOAT * ((3 * N + N + 1) + 1 + (1 + 2 * N))
    rows = x.expand(4, N).clone()
    batched = torch.func.vmap(lambda row: torch.func.grad(lambda r: (r * r).sum())(row))
    assert counts.bytes_moved(lambda: batched(rows)) > FLOAT * 4 * 4 * N
    double = torch.func.vmap(lambda row: row * 2)
    assert counts.bytes_moved(lambda: double(rows)) == FLOAT * 2 * 4 * N


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_an_expanded_tensor_counts_its_storage(shape, data):
    drawn = torch.randn(shape)
    factor = data.draw(st.integers(2, 5))
    wide = drawn.unsqueeze(0).expand(factor, *shape)
    moved = counts.bytes_moved(lambda: wide.neg())
    assert moved == FLOAT * math.prod(shape) * (1 + factor)


@pytest.mark.parametrize("strategy", ["serial", "vmap"])
def test_the_bytes_of_a_meta_step_repeat_and_grow_with_the_tasks(strategy):
    one, three = meta_step(strategy, 1), meta_step(strategy, 3)
    moved = [counts.bytes_moved(thunk) for thunk in (one, three, one, three)]
    assert moved[:2] == moved[2:]
    assert moved[0] < moved[1] < 3.1 * moved[0]  # the optimiser's part is shared, but tasks are put together


def test_sparse_tensors_are_refused():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(Unsupported, match="strided tensors only"):
        counts.bytes_moved(lambda: sparse * 2)


def test_a_failing_thunk_leaves_no_counter_behind():
    for count in (counts.flops, counts.bytes_moved):
        with pytest.raises(ZeroDivisionError):
            count(lambda: 1 / 0)
    assert counts.flops(lambda: matrix @ other) == 2 * 20 * 30 * 40
    assert counts.bytes_moved(lambda: x.neg()) == FLOAT * 2 * N


# --- nodes


def test_the_nodes_of_a_graph_are_its_operations_and_its_leaves():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert counts.autograd_nodes(a) == 0
    assert counts.autograd_nodes(a.detach() * 2) == 0
    assert counts.autograd_nodes(a * b) == 3  # the product and two leaves
    shared = a.exp()
    assert counts.autograd_nodes(shared * shared) == 3
    assert counts.autograd_nodes([shared + 1, shared * b]) == 5


def test_the_graph_through_an_inner_step_is_larger_than_without():
    a = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(a.exp().sum(), a, create_graph=True)
    assert counts.autograd_nodes(a - gradient) == 4  # leaf, exp, its gradient's product, difference
    assert counts.autograd_nodes(a - gradient.detach()) == 2


def test_a_deep_graph_is_walked_without_recursion():
    leaf = torch.ones(1, requires_grad=True)
    out = leaf
    for _ in range(5 * sys.getrecursionlimit()):
        out = out + 1
    assert counts.autograd_nodes(out) == 5 * sys.getrecursionlimit() + 1


# --- launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_launches_need_a_device():
    with pytest.raises(Unsupported, match="launches are counted on CUDA devices only"):
        counts.launches(lambda: None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_launches_are_counted():
    there = torch.ones(1000, device="cuda")

    def thunk():
        for _ in range(5):
            there.add_(1)

    thunk()
    assert counts.launches(thunk) == 5


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("cudaLaunchKernel", True),
        ("cudaLaunchKernelExC", True),
        ("cuLaunchKernel", True),
        ("cuLaunchKernelEx", True),
        ("cudaLaunchCooperativeKernel", True),
        ("cudaLaunchHostFunc", False),
        ("cudaMemcpyAsync", False),
        ("cudaDeviceSynchronize", False),
        ("aten::add_", False),
    ],
)
def test_launches_are_told_from_other_calls(name, kernel):
    assert counts._is_launch(name) is kernel


# --- memory

MEGA = 10**6
PEAK = """
import torch
from metabench import counts
{setup}
thunk()
print(counts.peak_memory(thunk, "cpu"))
"""
TEMPORARY = """
def thunk():
    torch.ones(50_000_000)
"""
LIKE_TRAINING = """
kept = torch.ones(25_000_000)
def thunk():
    for _ in range(3):
        half = kept * 2
        whole = torch.cat([half, half])  # 100 + 200 MB at once; the rest is smaller
        del half
        whole.sum()
        del whole
        [torch.ones(250_000) for _ in range(100)]
"""


def peak(setup: str, allocator: str) -> int:
    code = PEAK.format(setup=setup)
    env = {k: v for k, v in environ().items() if not k.startswith("MALLOC_")} | ALLOCATORS[allocator]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    if "Unsupported" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_the_peak_of_a_call_is_what_it_allocates(allocator):
    assert peak(TEMPORARY, allocator) == pytest.approx(200 * MEGA, rel=0.05)


def test_the_peak_of_many_allocations_is_what_lives_at_once_where_freed_memory_is_returned():
    assert peak(LIKE_TRAINING, "returned") == pytest.approx(300 * MEGA, rel=0.02)
    assert peak(LIKE_TRAINING, "default") > 0.98 * 300 * MEGA
    assert peak(LIKE_TRAINING, "kept") > 0.98 * 300 * MEGA


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_call_that_needs_nothing_has_next_to_no_peak(allocator):
    setup = "kept = torch.ones(50_000_000)\ndef thunk():\n    kept.mul_(2)"
    assert 0 <= peak(setup, allocator) < 5 * MEGA


def test_where_the_peak_cannot_be_reset_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(counts, "CLEAR_REFS", tmp_path / "not" / "there")
    with pytest.raises(Unsupported, match="needs"):
        counts.peak_memory(lambda: None, "cpu")
    (tmp_path / "status").write_text("Name:\tpython\n")
    monkeypatch.setattr(counts, "STATUS", tmp_path / "status")
    monkeypatch.setattr(counts, "CLEAR_REFS", tmp_path / "clear_refs")
    with pytest.raises(Unsupported, match="needs"):
        counts.peak_memory(lambda: None, "cpu")


def test_other_devices_have_no_peak():
    with pytest.raises(Unsupported, match="cpu and cuda, not on mps"):
        counts.peak_memory(lambda: None, "mps")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_on_a_device_is_that_of_its_allocator():
    def thunk():
        torch.ones(2**20, device="cuda")

    thunk()
    assert counts.peak_memory(thunk, "cuda") == FLOAT * 2**20
