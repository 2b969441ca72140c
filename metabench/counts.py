"""How much work a piece of code is, counted and not timed: operations, bytes, graph nodes, launches, peak memory.

Every count is of one call of a thunk, which must run eagerly (compiled code hides its operations) and whose caller has
made one call before, so that what the first call alone does (lazy initialisation, moments of an optimiser) stays out.
Equal work gives equal counts, whatever else the machine does; `peak_memory` alone depends on the allocator, too.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from metabench.errors import Unsupported

Thunk = Callable[[], object]
Shape = Sequence[int]

aten = torch.ops.aten

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def flops(thunk: Thunk) -> int:
    """Floating-point operations of one call, a multiplication and an addition counting two.

    Counted are matrix products, convolutions, attention and linear systems, forward and backward to any order: the
    work whose peak rate the machine's roof states. Not counted are element-wise operations, reductions, pooling,
    normalisation, softmax, distances (`cdist`), comparisons and optimiser updates; padding counts as if multiplied.
    Batching tasks by vmap gives the same count as running them one by one (a test proves it for MAML).

    Raises:
        Unsupported: the thunk runs an operation full of products whose number is not known here (`UNKNOWN`).
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        thunk()
    return int(counter.get_total_flops())


def _convolution_backward(
    gradient: Shape,
    x: Shape,
    weight: Shape,
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    mask: Sequence[bool],
    **kwargs: object,
) -> int:
    """Gradients of the input and of the weight cost as many products as the forward pass each.

    Instead of torch's own formula (2.13), which forgets `groups` in the gradient of the weight: vmap over tasks makes
    grouped convolutions, and T tasks came out T times too dear.
    """
    pixels = math.prod((x if transposed else gradient)[2:])
    return 2 * x[0] * pixels * math.prod(weight) * sum(mask[:2])


def _product(*shapes: object, **kwargs: object) -> int:
    """The last two of `shapes` multiplied: matrix by vector, vector by vector, batches of matrices summed."""
    left, right = [s for s in shapes if isinstance(s, torch.Size)][-2:]
    return 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)


def _attention(query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *args: object, **kwargs: object
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _factor(a: Shape, *args: object, **kwargs: object) -> int:
    """Cholesky's factors of n x n matrices: n^3 / 3 operations each, as is usual to count them (Golub and Van Loan)."""
    return math.prod(a[:-1]) * a[-1] ** 2 // 3


def _solve(a: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    """n x n systems with k right-hand sides each: 2 n^3 / 3 for the LU factors, then `_substitute`."""
    return 2 * _factor(a) + 2 * a[-1] * _columns(a, b)


def _substitute(factors: Shape, *others: object, **kwargs: object) -> int:
    """Forward and backward substitution with k right-hand sides: 2 n^2 k."""
    b = next(shape for shape in reversed(others) if isinstance(shape, torch.Size))
    return 2 * factors[-1] * _columns(factors, b)


def _substitute_by(b: Shape, factors: Shape, *args: object, **kwargs: object) -> int:
    """The same for the operation that names the right-hand sides first."""
    return _substitute(factors, b)


def _substitute_once(factors: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    """One triangular system instead of two: n^2 k."""
    return _substitute(factors, b) // 2


def _columns(a: Shape, b: Shape) -> int:
    """The numbers in all right-hand sides, broadcast over the batch of the matrices (..., n, n): a vector is one."""
    batch = math.prod(a[:-2])
    each = math.prod(b[len(b) - (1 if len(b) == len(a) - 1 else 2) :])
    return max(batch * each, math.prod(b))


def _unknown(name: str) -> Callable[..., int]:
    def refuse(*args: object, **kwargs: object) -> int:
        raise Unsupported(f"the FLOPs of aten::{name} are not known: give it a formula in metabench/counts.py")

    return refuse


UNKNOWN = (
    "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_trilinear",
    "linalg_lu_factor_ex", "linalg_ldl_factor_ex", "linalg_inv_ex",
    "_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_qr", "linalg_lstsq", "cholesky_inverse", "_linalg_det",
)  # fmt: skip

# what torch's counter lacks, and would silently take for nothing
FORMULAS: dict[Any, Any] = {
    aten.convolution_backward: _convolution_backward,
    **dict.fromkeys((aten.mv, aten.dot, aten.vdot, aten.addmv, aten.addbmm, aten._addmm_activation), _product),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.linalg_cholesky_ex: _factor,
    aten._linalg_solve_ex: _solve,
    aten.linalg_lu_solve: _substitute,
    aten.linalg_solve_triangular: _substitute_once,
    aten.cholesky_solve: _substitute_by,
    **{getattr(aten, name): _unknown(name) for name in UNKNOWN if hasattr(aten, name)},
}


def bytes_moved(thunk: Thunk) -> int:
    """Bytes that one call moves from and to memory if every operation runs by itself with cold caches.

    The sum over operations of the tensors read and the tensors written, each counted once per operation, so that an
    in-place operation reads and writes its target. A broadcast tensor counts what is stored of it; a lookup by index
    counts what it fetches of its source; filling and copying read nothing of their target. Views, queries of shapes
    and plain allocations move nothing. Real execution may move less (caches, fusion) and more (a kernel's scratch
    memory, which is not seen). Holds beneath torch.func.grad and vmap and in backward passes.

    Raises:
        Unsupported: a tensor that is not strided (sparse, nested): what is read of it cannot be told.
    """
    traffic = _Traffic()
    with traffic:
        thunk()
    return traffic.bytes


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what each operation moves; composite operations are taken apart first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        self.bytes += _moved(func, args, kwargs, result)
        return result


# by name, without namespace and overload
ALLOCATES = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
SHAPE_ONLY = {
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_full",
}  # fmt: skip
OVERWRITES = {
    "copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_",
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_",
}  # fmt: skip
LOOKS_UP = {"index", "index_select", "gather", "embedding", "take"}
READS_ONLY = {"_local_scalar_dense", "equal"}  # of all operations without a tensor as result, those that read data


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes read and written by one operation; the schema says which arguments it writes to."""
    name = func._schema.name.partition("::")[2]
    if name in ALLOCATES or torch.Tag.inplace_view in func.tags:
        return 0
    read: list[Tensor] = []
    written: list[Tensor] = []
    for argument, tensors in _arguments(func, args, kwargs):
        target = argument.alias_info is not None and argument.alias_info.is_write
        if target:
            written += tensors
        if not (target and (argument.is_out or name in OVERWRITES)):
            read += tensors
    stored = {t.untyped_storage().data_ptr() for t in _strided([*read, *written])}
    written += [t for t in _strided(_tensors(result)) if t.untyped_storage().data_ptr() not in stored]
    if not written and name not in READS_ONLY:
        return 0  # a view, or a question about the shape
    if name in SHAPE_ONLY:
        read = []
    if name in LOOKS_UP:
        source, *read = read
        return min(_extent(source), _total(written)) + _total(read) + _total(written)
    return _total(read) + _total(written)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, list[Tensor]]]:
    """Each argument of the schema that was given, with the tensors in it."""
    for i, argument in enumerate(func._schema.arguments):
        yield argument, _tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _strided(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise Unsupported(f"bytes are counted of strided tensors only, not of {tensor.layout}")
    return tensors


def _total(tensors: list[Tensor]) -> int:
    """Bytes of the tensors, equal views once."""
    return sum({(t.data_ptr(), t.dtype, t.shape, t.stride()): _extent(t) for t in tensors}.values())


def _extent(tensor: Tensor) -> int:
    """Bytes that the elements of a tensor occupy: broadcast dimensions and overlapping windows share theirs."""
    stored = math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not size)
    return min(stored * tensor.element_size(), tensor.untyped_storage().nbytes())


def autograd_nodes(output: Tensor | Iterable[Tensor]) -> int:
    """Nodes of the autograd graph behind a tensor or several: what one backward pass from them would visit.

    The nodes that accumulate gradients into leaves (one per parameter reached) are among them. A constant has no
    nodes, and neither has a leaf itself.
    """
    tensors = [output] if isinstance(output, Tensor) else list(output)
    # kept in the set: a node lives on while its Python object does, so that it is met as the same object again
    seen = {t.grad_fn for t in tensors if t.grad_fn is not None}
    waiting = list(seen)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return len(seen)


def launches(thunk: Thunk) -> int:
    """CUDA kernels that one call launches (copies, fills by memset and events are not kernels).

    Counted are the calls of the CUDA runtime and driver, not the kernels' records on the device, of which the profiler
    may lose some. A replayed CUDA graph shows none of its kernels.

    Raises:
        Unsupported: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise Unsupported("launches are counted on CUDA devices only")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        thunk()
        torch.cuda.synchronize()
    return sum(_is_launch(event.name) for event in profile.events() or ())


def _is_launch(name: str) -> bool:
    """Whether a runtime or driver call launches a kernel: cudaLaunchKernel, its ExC variant, cuLaunchKernelEx, ..."""
    return name.startswith(("cudaLaunch", "cuLaunch")) and "Kernel" in name


def peak_memory(thunk: Thunk, device: torch.device | str) -> int:
    """Bytes that one call needs beyond what is allocated before it, at the moment it needs most.

    On CUDA the tensors of torch's allocator. On the CPU the resident memory of the process, kernels' scratch memory
    included, exact to some pages; there the call must be made in a fresh process in which nothing else runs, all
    inputs are prepared, and the thunk was called once. Memory that libraries keep from call to call is not counted.
    What the call frees and glibc does not give back counts as well: for the need of the code alone, start the process
    with `environment.ALLOCATORS["returned"]`.

    Raises:
        Unsupported: a device other than these, or a system that cannot reset the peak (all but Linux with glibc).
    """
    gc.collect()
    kind = torch.device(device)
    if kind.type == "cuda":
        return _peak_on_cuda(thunk, kind)
    if kind.type == "cpu":
        return _peak_on_cpu(thunk)
    raise Unsupported(f"peak memory is measured on cpu and cuda, not on {kind.type}")


def _peak_on_cuda(thunk: Thunk, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    thunk()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(thunk: Thunk) -> int:
    """The rise of the resident set's high-water mark; before, freed memory goes back to the system, to be seen anew."""
    _return_freed_memory()
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")  # the mark falls to what is resident (Linux, proc(5))
    except OSError as error:
        raise Unsupported(f"peak memory on the CPU needs a writable {CLEAR_REFS} (Linux): {error.strerror}") from None
    before = _high_water_mark()
    thunk()
    return _high_water_mark() - before


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # no such function, no such library, no handle on this system
        raise Unsupported("peak memory on the CPU needs the malloc_trim of glibc (Linux)") from None


def _high_water_mark() -> int:
    """VmHWM in bytes."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Unsupported(f"peak memory on the CPU needs the line VmHWM in {STATUS}")
