"""The peers compute what metabench computes: else their times would compare nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environ, metabench
from torch import Tensor

from metabench.algorithms import maml, protonet
from metabench.algorithms.base import Algorithm
from metabench.algorithms.plain import import_part, plain_conv4
from metabench.backbones import Backbone, Conv4
from metabench.catalogue import Catalogue, catalogue
from metabench.episodes import Batch, Episode, Problem
from metabench.errors import ConfigError, Unsupported

FOLDER = Path(__file__).parent.parent / "suites" / "peers"
SIDE = 16  # the smallest image both poolings take
MAMLS = ("maml-clone", "maml-higher", "maml-torchopt", "maml-learn2learn")
# Float64 leaves some 1e-11 after five steps through four batch norms; a term left out of the gradient would leave 1e-2.
SAME = 1e-8


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return catalogue(sorted(FOLDER.glob("*.py")))


def problem(ways: int = 5) -> Problem:
    return Problem(shape=(1, SIDE, SIDE), loss="cross_entropy", ways=ways)


def episode(*, ways: int = 5, shots: int = 1, queries: int = 2, tasks: int = 2) -> Episode:
    """Random images, the queries in an order that gives nothing away."""
    draw = torch.Generator().manual_seed(0)

    def batch(count: int) -> Batch:
        x = torch.rand(tasks, ways * count, 1, SIDE, SIDE, generator=draw, dtype=torch.float64)
        y = torch.arange(ways).repeat_interleave(count)
        return Batch(x, torch.stack([y[torch.randperm(len(y), generator=draw)] for _ in range(tasks)]), ways)

    return Episode(batch(shots), batch(queries), torch.arange(tasks))


def peer(known: Catalogue, name: str, ways: int, **params: Any) -> Algorithm:
    """A peer in float64, or a skip with the reason it gives."""
    torch.manual_seed(0)
    try:
        made: Algorithm = known.algorithm(name).load().build(problem(ways), **params)
    except Unsupported as error:
        pytest.skip(str(error))
    return made.double()


def ours(build: Any, ways: int, **params: Any) -> Any:
    torch.manual_seed(0)
    return build(problem(ways), **params).double()


def shaken(algorithm: Algorithm) -> None:
    """Move shifts and gains off 0 and 1, alike in both, so that nothing hides behind symmetry."""
    draw = torch.Generator().manual_seed(1)
    by_name = dict(algorithm.named_parameters())
    for i in range(4):
        for value in (v for n, v in by_name.items() if plain_name(n, algorithm) in (f"beta{i}", f"gamma{i}")):
            with torch.no_grad():
                value.add_(0.3 * torch.randn(value.shape, generator=draw, dtype=value.dtype))


def plain_name(name: str, algorithm: Algorithm) -> str:
    """'conv0', 'beta3', 'weight', ...: what a parameter is, whether a peer's or metabench's."""
    *path, last = name.split(".")
    if not isinstance(algorithm, maml.Maml | protonet.ProtoNet):
        module = algorithm.get_submodule(".".join(path))
        of_kind = [m for m in algorithm.modules() if type(m) is type(module)]
        number = next(i for i, m in enumerate(of_kind) if m is module)
        kind = {"Conv2d": ("conv", "bias"), "BatchNorm2d": ("gamma", "beta")}.get(type(module).__name__)
        return f"{kind[last == 'bias']}{number}" if kind else f"head.{last}"
    return f"head.{last}" if "head" in path else last


def gradients(algorithm: Algorithm) -> dict[str, Tensor]:
    named = algorithm.named_parameters()
    return {plain_name(name, algorithm): p.grad for name, p in named if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far apart two gradients are, relative to the length of the expected one."""
    assert found.keys() == expected.keys()
    apart = sum((found[name] - expected[name]).square().sum() for name in expected)
    whole = sum(value.square().sum() for value in expected.values())
    return float(torch.as_tensor(apart / whole).sqrt())


def trained(algorithm: Algorithm, data: Episode) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one training step, as its own trainer takes it."""
    algorithm.train()
    loss = algorithm.trainer(1).step(data)["loss"]
    return float(loss), gradients(algorithm)


def answers(algorithm: Algorithm, data: Episode) -> Tensor:
    algorithm.eval()
    with torch.no_grad():
        return algorithm.adapt(data.support, seeds=data.seeds)(data.query.x)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("backbone", ["conv4-strided", "conv4"])
@pytest.mark.parametrize("name", MAMLS)
def test_maml_through_a_library_is_the_same_function_with_the_same_gradient(
    known: Catalogue, name: str, backbone: str, steps: int
) -> None:
    params = {"backbone": backbone, "inner_steps": steps, "test_steps": steps}
    theirs = peer(known, name, 5, **params)
    mine = ours(maml.build, 5, **params, norm="batch", adapt_norm=True)
    for algorithm in (mine, theirs):
        shaken(algorithm)
    data = episode()
    expected = answers(mine, data)
    assert (answers(theirs, data) - expected).norm() <= SAME * expected.norm()
    loss, gradient = trained(mine, data)
    found, found_gradient = trained(theirs, data)
    assert found == pytest.approx(loss, rel=SAME)
    assert distance(found_gradient, gradient) <= SAME


@pytest.mark.parametrize("name", MAMLS)
def test_evaluation_leaves_a_peer_as_it_was(known: Catalogue, name: str) -> None:
    algorithm = peer(known, name, 3)
    before = {key: value.clone() for key, value in algorithm.state_dict().items()}
    data = episode(ways=3)
    first = answers(algorithm, data)
    assert not first.requires_grad
    assert torch.equal(answers(algorithm, data), first)
    assert all(torch.equal(value, before[key]) for key, value in algorithm.state_dict().items())
    assert all(isinstance(value, torch.nn.Parameter) and value.is_leaf for value in algorithm.parameters())
    none = algorithm.adapt(data.support, seeds=data.seeds, steps=0)(data.query.x)
    assert not torch.equal(none, first)
    assert algorithm.unsupported(problem(3)) is None
    assert "3 ways" in (algorithm.unsupported(problem(4)) or "")


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_protonet_through_easyfsl_is_the_same_function_with_the_same_gradient(known: Catalogue, norm: str) -> None:
    theirs = peer(known, "protonet-easyfsl", 4, norm=norm)
    mine = ours(protonet.build, 4, norm=norm)
    for algorithm in (mine, theirs):
        shaken(algorithm)
    data = episode(ways=4, shots=2, queries=3)
    one = Episode(data.support.pick(slice(0, 1)), data.query.pick(slice(0, 1)), data.seeds[:1])
    loss, gradient = trained(mine, one)  # one task: with more, running averages see all of them at once or in turn
    found, found_gradient = trained(theirs, one)
    assert found == pytest.approx(loss, rel=SAME)
    assert distance(found_gradient, gradient) <= SAME
    if norm == "running":
        averages = [m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for i, layer in enumerate(averages):
            assert torch.allclose(layer.running_mean, mine.backbone.get_buffer(f"mean{i}"), rtol=SAME)
            assert torch.allclose(layer.running_var, mine.backbone.get_buffer(f"var{i}"), rtol=SAME)


@pytest.mark.parametrize("norm", ["running", "batch"])
def test_protonet_through_easyfsl_answers_as_ours(known: Catalogue, norm: str) -> None:
    theirs, mine = peer(known, "protonet-easyfsl", 4, norm=norm), ours(protonet.build, 4, norm=norm)
    data = episode(ways=4, shots=2, queries=3)
    expected = answers(mine, data)
    assert (answers(theirs, data) - expected).norm() <= SAME * expected.norm()


def test_easyfsl_itself_takes_the_distance_not_its_square(known: Catalogue) -> None:
    """Why the row needs a subclass; once easyfsl squares it, the subclass goes."""
    theirs, data = peer(known, "protonet-easyfsl", 4), episode(ways=4)
    expected = answers(theirs, data)
    library = type(theirs.on_images).__mro__[1]
    plain = library(backbone=theirs.on_images.backbone).eval()
    with torch.no_grad():
        plain.process_support_set(data.support.x[0], data.support.y[0])
        assert torch.allclose(-plain(data.query.x[0]).square(), expected[0], rtol=SAME)


@pytest.mark.parametrize("pool", ["max", "stride"])
@pytest.mark.parametrize("gamma", [True, False])
def test_the_plain_network_is_the_backbone(pool: Any, gamma: bool) -> None:
    torch.manual_seed(0)
    body = Conv4((1, SIDE, SIDE), norm="batch", pool=pool, average=pool == "stride", filters=5, eps=1e-3, gamma=gamma)
    x = torch.rand(6, 1, SIDE, SIDE, dtype=torch.float64)
    plain = plain_conv4(body.double()).double()
    assert torch.allclose(plain(x), body(x), rtol=SAME)
    assert not any(isinstance(module, Backbone) for module in plain.modules())


# --- episodes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(known: Catalogue) -> Any:
    return known.dataset("glyphs-dataloader").load().build()


def bind(loaded: Any, *, subset: str = "train", rotations: str = "none", **shape: Any) -> Any:
    asked = {"ways": 5, "shots": 1, "queries": 3, **shape}
    return loaded.tasks(subset, rotations=rotations, seed=0, device="cpu", **asked)


def test_loaded_episodes_are_tasks_of_different_images(loaded: Any) -> None:
    found = bind(loaded, ways=20, shots=2, queries=5).episodes(3, 4)
    assert found.support.x.shape == (4, 40, 1, 28, 28) and found.query.x.shape == (4, 100, 1, 28, 28)
    assert found.support.ways == found.query.ways == 20
    assert found.support.x.dtype == torch.float32 and 0 <= found.query.x.min() < found.query.x.max() <= 1
    for t in range(4):
        assert found.support.y[t].bincount().tolist() == [2] * 20 and found.query.y[t].bincount().tolist() == [5] * 20
        both = torch.cat([found.support.x[t], found.query.x[t]]).flatten(1)
        assert len(both.unique(dim=0)) == len(both)


def test_loaded_episodes_are_images_of_the_same_classes_as_glyphs(loaded: Any) -> None:
    """Support and queries of a label come from one class of the subset, and unequal labels from unequal ones."""
    data = loaded._data
    members = torch.from_numpy(data.images[data.subsets["val"]]).flatten(2)
    found = bind(loaded, subset="val").episodes(0, 2)
    for t in range(2):
        origin = {}
        for batch in (found.support, found.query):
            for image, label in zip((batch.x[t] * 255).round().flatten(1), batch.y[t].tolist(), strict=True):
                homes = (members == image).all(-1).any(1).nonzero().flatten().tolist()
                origin.setdefault(label, set(homes)).intersection_update(homes)
        assert all(origin.values())
        assert len(set.union(*origin.values())) >= 5


def test_loaded_task_i_is_the_same_from_wherever_it_is_asked(loaded: Any) -> None:
    whole = bind(loaded).episodes(0, 6)
    tasks = bind(loaded)
    state = torch.get_rng_state()
    for start, count in ((4, 2), (0, 3), (3, 1), (4, 1)):
        part = tasks.episodes(start, count)
        assert torch.equal(part.support.x, whole.support.x[start : start + count])
        assert torch.equal(part.query.y, whole.query.y[start : start + count])
    assert torch.equal(torch.get_rng_state(), state)


def test_loaded_tasks_declare_what_glyphs_declares(known: Catalogue, loaded: Any) -> None:
    mine, theirs = (known.dataset(name).meta for name in ("glyphs", "glyphs-dataloader"))
    assert {key: theirs[key] for key in ("splits", "shape", "images_per_class", "problem")} == {
        key: mine[key] for key in ("splits", "shape", "images_per_class", "problem")
    }
    assert bind(loaded).problem == bind(loaded._data).problem
    for wrong in ({"rotations": "classes"}, {"ways": None}, {"ways": 5000}, {"shots": 18}):
        with pytest.raises(ConfigError):
            bind(loaded, **wrong)


# --- libraries that are not there -------------------------------------------------------------------------------


def test_bytes_and_floats_in_memory_make_the_same_episodes(known: Catalogue, loaded: Any) -> None:
    floats = known.dataset("glyphs-dataloader").load().build(store="float32")
    one, other = bind(loaded).episodes(0, 3), bind(floats).episodes(0, 3)
    assert torch.equal(one.support.x, other.support.x) and torch.equal(one.query.y, other.query.y)


@pytest.mark.parametrize("name", [*MAMLS[1:], "protonet-easyfsl"])
def test_a_library_that_is_not_there_is_named_with_the_way_to_get_it(
    known: Catalogue, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = name.partition("-")[2]
    module = known.algorithm(name).load()  # the file itself imports without the library
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=rf"needs {library}.*(metabench\[peers\]|docs/peers.md)"):
        module.build(problem())


def test_a_library_that_is_not_there_is_a_skipped_row(tmp_path: Path) -> None:
    (tmp_path / "higher.py").write_text("raise ImportError('not here')\n")
    suite = tmp_path / "absent.yaml"
    suite.write_text(f"""
description: A test
plugins: ["{FOLDER / "maml_higher.py"}"]
grid:
  tasks: [{{dataset: glyphs, ways: 5, shots: 1, queries: 1}}]
  algorithms: [{{name: maml-higher, train: {{tasks: 1, steps: 1}}}}]
evaluation: {{episodes: 2}}
measures: [accuracy]
controls: false
threads: 1
""")
    here = environ(PYTHONPATH=f"{tmp_path}:{Path(__file__).parent.parent}")
    done = metabench("run", suite, "--out", tmp_path / "out", env=here)
    rows = "".join(file.read_text() for file in (tmp_path / "out").rglob("results.csv"))
    assert "skipped" in rows and "needs higher (not here): pip install 'metabench[peers]'" in rows, done.stderr


def test_a_part_is_imported_past_the_packages_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "broken_around" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text("import there_is_no_such_module\n")
    (inner / "part.py").write_text("from broken_around.inner.beside import VALUE\n")
    (inner / "beside.py").write_text("VALUE = 7\n")
    (inner / "torn.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_part("broken_around.inner.part", fix="reinstall it").VALUE == 7
    assert not [name for name in sys.modules if name.startswith("broken_around")]
    with pytest.raises(ImportError):
        importlib.import_module("broken_around")
    for name, message in (
        ("broken_around.inner.torn", r"does not import \(No module named 'there_is_no_such_module'\): reinstall it"),
        ("there_is_no_such_module.part", "needs there_is_no_such_module: reinstall it"),
    ):
        with pytest.raises(Unsupported, match=message):
            import_part(name, fix="reinstall it")
