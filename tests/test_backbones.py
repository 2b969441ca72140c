from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from metabench import backbones
from metabench.algorithms.base import tracking
from metabench.backbones import FORESEEN, METABENCH_BACKBONES, Conv4, Koch, Norm, Pool, make_backbone
from metabench.errors import ConfigError


def little(norm: Norm = "support", *, pool: Pool = "max", filters: int = 3, side: int = 16) -> Conv4:
    torch.manual_seed(0)
    body = Conv4((1, side, side), norm=norm, pool=pool, filters=filters).double()
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if name.startswith(("beta", "gamma", "scale", "offset")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return body


def pictures(tasks: int, n: int, *, seed: int = 0, side: int = 16) -> Tensor:
    return torch.randn(tasks, n, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def params(body: nn.Module) -> dict[str, Tensor]:
    return dict(body.named_parameters())


def textbook(body: Conv4, *, track: bool) -> nn.Sequential:
    """PyTorch's own layers, ReLU before pooling, with `body`'s weights."""
    layers: list[nn.Module] = []
    for i in range(4):
        weight = body.get_parameter(f"conv{i}")
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=body.padding[i], stride=body.stride)
        norm = nn.BatchNorm2d(weight.shape[0], eps=body.eps, track_running_stats=track)
        for own, name in ((conv.weight, "conv"), (conv.bias, "bias"), (norm.weight, "gamma"), (norm.bias, "beta")):
            assert own is not None
            own.data = body.get_parameter(f"{name}{i}").detach().clone()
        layers += [conv, norm, nn.ReLU()] + [nn.MaxPool2d(2)] * (i < body.pooled)
    return nn.Sequential(*layers, nn.Flatten()).double()


@pytest.mark.parametrize(
    ("name", "out", "count"),
    [
        ("conv4", 64, 111_936),
        ("conv4-strided", 64, 111_936),
        ("conv4-strided-flat", 256, 111_936),
        ("conv4-maps", 64 * 5 * 5, 111_936),
    ],
)
def test_sizes_on_omniglot(name: str, out: int, count: int) -> None:
    body = make_backbone(name, (1, 28, 28), norm="support")
    assert body.out_dim == out
    assert sum(p.numel() for p in body.parameters()) == count
    assert body(torch.zeros(3, 1, 28, 28)).shape == (3, out)
    bare = make_backbone(name, (1, 28, 28), norm="support", gamma=False)
    assert sum(p.numel() for p in bare.parameters()) == count - 4 * 64


def test_sizes_on_other_shapes() -> None:
    assert make_backbone("conv4", (3, 84, 84), norm="support").out_dim == 1600
    mlp = make_backbone("mlp", (1,), norm="support")
    assert mlp.out_dim == 40 and sum(p.numel() for p in mlp.parameters()) == 80 + 1640
    assert make_backbone("mlp64", (1,), norm="support").out_dim == 64
    assert len(METABENCH_BACKBONES) == 8


def test_impossible_requests_name_the_fix() -> None:
    with pytest.raises(ConfigError, match="known: conv4"):
        make_backbone("resnet", (1, 28, 28), norm="support")
    with pytest.raises(ConfigError, match="use mlp"):
        make_backbone("conv4", (1,), norm="support")
    with pytest.raises(ConfigError, match="16x16"):
        make_backbone("conv4", (1, 12, 12), norm="support")
    with pytest.raises(ConfigError, match="10x10"):
        make_backbone("conv4-maps", (1, 9, 9), norm="support")
    with pytest.raises(ConfigError, match=r"koch35 needs images of 35x35 pixels, got 28x28.*size: 35"):
        make_backbone("koch35", (1, 28, 28), norm="running")


def test_glorot_initialisation() -> None:
    body = make_backbone("conv4-strided", (1, 28, 28), norm="support", glorot=True)
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    weight = body.get_parameter("conv2").detach()
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    assert float(body.get_parameter("bias2").detach().abs().max()) == 0


@pytest.mark.parametrize("pool", ["max", "stride", "early"])
def test_each_task_is_a_batch_of_pytorchs_layers(pool: Pool) -> None:
    """Also proves that pooling before the ReLU gives the same, in value and in gradient."""
    body, x = little(pool=pool), pictures(3, 5)
    plain = textbook(body, track=False)
    got = body.apply_to(params(body), x)[0]
    wanted = torch.stack([plain(task) for task in x])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    target = torch.randn_like(wanted)
    (got * target).sum().backward()
    (wanted * target).sum().backward()
    gradient = body.get_parameter("conv0").grad
    torch.testing.assert_close(gradient, plain[0].weight.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pool", ["max", "early"])
def test_running_mode_is_pytorchs_batch_norm_and_moves_only_while_tracked(pool: Pool) -> None:
    body = little("running", pool=pool)
    plain = textbook(body, track=True)
    x = pictures(1, 6)[0]
    untouched = {n: b.clone() for n, b in body.named_buffers()}
    body.train()
    torch.testing.assert_close(body(x), plain.train()(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(b, untouched[n]) for n, b in body.named_buffers())
    with tracking(body):
        body(x)
    assert not body.tracking
    for i, layer in enumerate(m for m in plain if isinstance(m, nn.BatchNorm2d)):
        torch.testing.assert_close(body.get_buffer(f"mean{i}"), layer.running_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(body.get_buffer(f"var{i}"), layer.running_var, rtol=1e-10, atol=1e-12)
    body.eval()
    moved = {n: b.clone() for n, b in body.named_buffers()}
    torch.testing.assert_close(body(x), plain.eval()(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(b, moved[n]) for n, b in body.named_buffers())


def test_tracking_ends_when_a_step_fails() -> None:
    body = little("running")
    with pytest.raises(ZeroDivisionError), tracking(body):
        _ = 1 / 0
    assert not body.tracking


INDUCTIVE: list[Norm] = ["running", "support", "each", "tasknorm", "layer"]


@settings(max_examples=25, deadline=None)
@given(norm=st.sampled_from(INDUCTIVE), picked=st.sets(st.integers(0, 5), min_size=1), seed=st.integers(0, 99))
def test_inductive_features_do_not_depend_on_the_other_queries(norm: Norm, picked: set[int], seed: int) -> None:
    body = little(norm, pool="stride").eval()
    support, queries = pictures(2, 4, seed=seed), pictures(2, 6, seed=seed + 100)
    with torch.no_grad():
        _, stats = body.embed_support(params(body), support)
        every = body.embed_query(params(body), queries, support, stats)
        few = body.embed_query(params(body), queries[:, sorted(picked)], support, stats)
    torch.testing.assert_close(few, every[:, sorted(picked)], rtol=0, atol=1e-12)


def test_support_mode_reuses_the_supports_statistics_and_batch_mode_the_queries() -> None:
    support, queries = pictures(2, 4), pictures(2, 3, seed=1)
    inductive, transductive = little("support"), little("batch")
    features, stats = inductive.embed_support(params(inductive), support)
    again = inductive.embed_query(params(inductive), support, support, stats)
    torch.testing.assert_close(features, again, rtol=0, atol=1e-12)
    got = transductive.embed_query(params(transductive), queries, support, stats)
    torch.testing.assert_close(got, inductive.apply_to(params(inductive), queries)[0], rtol=0, atol=1e-12)
    assert (inductive.embed_query(params(inductive), queries, support, stats) - got).abs().max() > 1e-3


def test_each_is_a_batch_of_the_support_and_one_query() -> None:
    body, support, queries = little("each"), pictures(2, 4), pictures(2, 3, seed=1)
    _, stats = body.embed_support(params(body), support)
    got = body.embed_query(params(body), queries, support, stats)
    plain = textbook(body, track=False)
    for task in range(2):
        for query in range(3):
            alone = plain(torch.cat([support[task], queries[task, query : query + 1]]))[-1]
            torch.testing.assert_close(got[task, query], alone, rtol=1e-10, atol=1e-12)


def slow_layer(body: Conv4, h: Tensor, i: int, context: Tensor) -> Tensor:
    """TaskNorm-I of images h by support activations `context` (both before norm), one channel of an image at a time."""
    scale, offset = float(body.get_parameter(f"scale{i}")), float(body.get_parameter(f"offset{i}"))
    blend = 1 / (1 + torch.exp(torch.tensor(-(scale * context.shape[0] + offset), dtype=torch.float64)))
    out = torch.empty_like(h)
    for n in range(h.shape[0]):
        for c in range(h.shape[1]):
            values, own = context[:, c], h[n, c]
            mean = blend * values.mean() + (1 - blend) * own.mean()
            var = blend * (values.var(correction=0) + (values.mean() - mean) ** 2)
            var = var + (1 - blend) * (own.var(correction=0) + (own.mean() - mean) ** 2)
            gain, shift = body.get_parameter(f"gamma{i}")[c], body.get_parameter(f"beta{i}")[c]
            out[n, c] = gain * (own - mean) / torch.sqrt(var + body.eps) + shift
    return out


def test_tasknorm_is_the_papers_formula_and_blends_by_the_size_of_the_support() -> None:
    body, support, queries = little("tasknorm"), pictures(1, 5), pictures(1, 3, seed=1)
    with torch.no_grad():
        features, stats = body.embed_support(params(body), support)
        got = body.embed_query(params(body), queries, support, stats)
        context, h = support[0], queries[0]
        for i in range(4):
            weight, bias = body.get_parameter(f"conv{i}"), body.get_parameter(f"bias{i}")
            context, h = (F.conv2d(v, weight, bias, padding=1) for v in (context, h))
            context, h = slow_layer(body, context, i, context), slow_layer(body, h, i, context)
            context, h = (F.max_pool2d(F.relu(v), 2) for v in (context, h))
    torch.testing.assert_close(features[0], context.flatten(1), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got[0], h.flatten(1), rtol=1e-9, atol=1e-10)


def test_layer_norm_is_over_channels_and_pixels_of_one_image() -> None:
    body, x = little("layer"), pictures(1, 2)
    h = x[0]
    for i in range(4):
        h = F.conv2d(h, body.get_parameter(f"conv{i}"), body.get_parameter(f"bias{i}"), padding=1)
        h = F.layer_norm(h, h.shape[1:], eps=body.eps)
        h = h * body.get_parameter(f"gamma{i}")[:, None, None] + body.get_parameter(f"beta{i}")[:, None, None]
        h = F.max_pool2d(F.relu(h), 2)
    torch.testing.assert_close(body.apply_to(params(body), x)[0][0], h.flatten(1), rtol=1e-9, atol=1e-11)


def test_strided_average_is_the_mean_of_the_flat_features() -> None:
    torch.manual_seed(0)
    flat = make_backbone("conv4-strided-flat", (1, 28, 28), norm="support")
    mean = make_backbone("conv4-strided", (1, 28, 28), norm="support")
    mean.load_state_dict(flat.state_dict())
    x = torch.rand(1, 3, 1, 28, 28)
    wide = flat.apply_to(params(flat), x)[0].reshape(1, 3, 64, 4).mean(-1)
    torch.testing.assert_close(mean.apply_to(params(mean), x)[0], wide)


def test_one_channel_images_run_channels_last_from_the_first_layer():
    """With one channel `contiguous(channels_last)` changes no stride; the convolution then answers the slow way."""
    backbone = make_backbone("conv4", (1, 28, 28), norm="running")
    seen = []
    original = backbone._shrink
    backbone._shrink = lambda h, i: seen.append(h.is_contiguous()) or original(h, i)  # (1, N, H, W, C)
    backbone(torch.rand(4, 1, 28, 28))
    assert seen == [True] * 4


@pytest.mark.parametrize("name", ["conv4", "conv4-strided-flat"])
@pytest.mark.parametrize("norm", ["running", "support"])
def test_the_layout_changes_no_feature(name: str, norm: Norm) -> None:
    body = make_backbone(name, (3, 20, 20), norm=norm).double()
    x = torch.randn(2, 4, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = body.embed_support(params(body), x)[0]
    body.channels_last = False
    torch.testing.assert_close(body.embed_support(params(body), x)[0], last, rtol=1e-10, atol=1e-12)
    seen = []
    original = body._shrink
    body._shrink = lambda h, i: seen.append(h[0].permute(0, 3, 1, 2).is_contiguous()) or original(h, i)
    body.embed_support(params(body), x)
    assert all(seen)


def test_many_channels_normalise_as_few() -> None:
    """Beyond a few input channels the first layer's statistics come from its output, not its patches."""
    torch.manual_seed(0)
    for channels in (FORESEEN, FORESEEN + 1):
        body = Conv4((channels, 16, 16), norm="running", filters=3).double().train()
        x = torch.randn(5, channels, 16, 16, dtype=torch.float64)
        plain = textbook(body, track=True).train()
        with tracking(body):
            torch.testing.assert_close(body(x), plain(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(body.get_buffer("mean0"), plain[1].running_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(body.get_buffer("var0"), plain[1].running_var, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(body.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", METABENCH_BACKBONES)
def test_an_embedding_compiles_as_one_graph(name: str) -> None:
    side = {"koch105": 105, "koch35": 35}.get(name, 16)
    shape = (4,) if name.startswith("mlp") else (1, side, side)
    body = make_backbone(name, shape, norm="running" if len(shape) == 3 else "layer").eval()
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    whole = torch.compile(body, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.equal(whole(x), body(x))


def koch_textbook(body: Koch) -> nn.Sequential:
    """PyTorch's own layers, ReLU before pooling, with `body`'s weights."""
    layers: list[nn.Module] = []
    for i in range(4):
        weight = body.get_parameter(f"conv{i}")
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2])
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(body.get_parameter(f"bias{i}").detach())
        layers += [conv, nn.ReLU()] + [nn.MaxPool2d(2)] * (i < 3)
    last = nn.Linear(1, 1)
    last.weight, last.bias = (nn.Parameter(body.get_parameter(f"{name}4").detach()) for name in ("weight", "bias"))
    return nn.Sequential(*layers, nn.Flatten(), last, nn.Sigmoid())


def test_kochs_network_is_the_papers() -> None:
    torch.manual_seed(0)
    body = make_backbone("koch105", (1, 105, 105), norm="running")
    assert isinstance(body, Koch) and body.out_dim == 4096 and body.widest == 64 * 96 * 96
    assert sum(p.numel() for p in body.parameters()) == 38_947_648  # with the pair's head of 4097: 38.95 million
    x = torch.rand(2, 1, 105, 105)
    plain, sides, h = koch_textbook(body), [], x
    for layer in plain:
        h = layer(h)
        sides += [tuple(h.shape[1:])] if isinstance(layer, nn.Conv2d | nn.MaxPool2d) else []
    assert sides == [
        (64, 96, 96), (64, 48, 48), (128, 42, 42), (128, 21, 21), (128, 18, 18), (128, 9, 9), (256, 6, 6),
    ]  # fmt: skip
    torch.testing.assert_close(body(x), h, rtol=1e-3, atol=1e-4)
    assert 0.25 < ((h > 0.01) & (h < 0.99)).double().mean() < 0.4  # saturated from birth, as its docstring says
    weights = {name: p.detach() for name, p in body.named_parameters()}
    for name, p in weights.items():
        spread, middle = (0.01, 0.5) if name.startswith("bias") else (0.2 if name == "weight4" else 0.01, 0.0)
        few = 5 * spread / len(p.flatten()) ** 0.5  # standard errors
        assert abs(p.mean() - middle) < few and abs(p.std() - spread) < few, name


def test_kochs_reduced_network_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    body = make_backbone("koch35", (1, 35, 35), norm="running").double()
    assert isinstance(body, Koch) and [p.shape[-1] for n, p in params(body).items() if "conv" in n] == [5, 3, 2, 2]
    x = pictures(1, 5, side=35)[0]
    plain = koch_textbook(body)
    wanted = plain(x)
    monkeypatch.setattr(backbones, "AT_ONCE", 2 * body.widest)  # in parts of 2, 2 and 1
    for channels_last in (True, False):
        body.channels_last = channels_last
        got = body(x)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    target = torch.randn_like(wanted)
    (got * target).sum().backward()
    (wanted * target).sum().backward()
    torch.testing.assert_close(body.get_parameter("conv0").grad, plain[0].weight.grad, rtol=1e-8, atol=1e-12)
    body.bf16 = True
    rounded = body(x)
    assert rounded.dtype == torch.float64 and 0 < (rounded - wanted).abs().max() < 0.05


def test_kochs_network_with_weights_of_each_tasks_own() -> None:
    torch.manual_seed(0)
    body = make_backbone("koch35", (1, 35, 35), norm="support").double()
    x = pictures(2, 3, side=35)
    own = {name: torch.stack([p, p * 1.1]).detach() for name, p in body.named_parameters()}
    own["bias4"] = body.get_parameter("bias4").detach()  # shared
    got, stats = body.apply_to(own, x)
    assert stats == ()
    for task in range(2):
        mine = {name: p[task] if name != "bias4" else p for name, p in own.items()}
        torch.testing.assert_close(got[task], body.features(mine, x[task : task + 1])[0], rtol=1e-12, atol=1e-14)
