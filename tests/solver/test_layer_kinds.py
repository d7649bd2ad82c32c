"""The whole solver on small models of every layer kind."""

import copy

import pytest
import torch
from layer_catalogue import Conv1D
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from lrf_lightning import compress
from lrf_lightning.modules import LowRankModule, SplitAttention
from lrf_lightning.saving.structure_hook import splits_in
from lrf_lightning.solver.factors.factorization import factorize
from lrf_lightning.solver.layers import layer_statistics
from lrf_lightning.solver.layers.layer_statistics import LayerStatistics
from lrf_lightning.solver.layers.row_readers import row_reader
from lrf_lightning.solver.layers.statistics import RowSampler, collect_statistics
from lrf_lightning.solver.predictions.curves import component_derivatives
from lrf_lightning.surgery import find_layers, set_structure

CLASSES = 4


class Pooled(nn.Module):
    """A body, the mean over everything behind the channels, and a linear head."""

    def __init__(self, body: nn.Module, features: int, channel: int = 1):
        super().__init__()
        self.body, self.head, self.channel = body, nn.Linear(features, CLASSES), channel

    def forward(self, x):
        return self.head(self.body(x).movedim(self.channel, -1).flatten(1, -2).mean(1))


class Transformer(nn.Module):
    """Embedding, encoder with a padding mask, and a head."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.embedding, self.batch_first = nn.Embedding(30, 16, padding_idx=0), batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        tokens = self.embedding(x) if self.batch_first else self.embedding(x).transpose(0, 1)
        hidden = self.encoder(tokens, src_key_padding_mask=x == 0)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        kept = (x != 0)[..., None]
        return self.head((hidden * kept).sum(1) / kept.sum(1))


class Cross(nn.Module):
    """Attention from learnt queries to tokens of another width."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 16))
        self.attention = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        mixed, weights = self.attention(self.queries.expand(len(x), -1, -1), x, x)
        return self.head(mixed.mean(1)) + weights.sum() * 0


class Recursive(nn.Module):
    """Two layers with one weight and biases of their own, and a third one between."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last.weight = self.first.weight
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.last(self.middle(self.first(x).relu()).relu()).relu())


class LanguageModel(nn.Module):
    """Next-token logits with one table for both ends; ``head_first`` lists the output layer before the embedding."""

    def __init__(self, head_first: bool = False):
        super().__init__()
        embedding, head = nn.Embedding(30, 16), nn.Linear(16, 30)
        head.weight = embedding.weight
        parts = {"head": head, "embedding": embedding} if head_first else {"embedding": embedding, "head": head}
        for name, module in parts.items():
            self.add_module(name, module)
        self.middle = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)).relu().mean(1))


class Experts(nn.Module):
    """Every token is sent to one of the experts; the first one gets few, sometimes none, and is called all the same."""

    def __init__(self):
        super().__init__()
        self.input, self.router = nn.Linear(12, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        hidden = self.input(x).relu()
        flat = hidden.flatten(0, 1)
        chances = (self.router(flat) - 2 * torch.tensor([1.0, 0.0, 0.0]).to(flat)).softmax(-1)
        chosen, mixed = chances.argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (places,) = (chosen == number).nonzero(as_tuple=True)
            mixed = mixed.index_put((places,), expert(flat[places]) * chances[places, number, None])
        return self.head((hidden + mixed.reshape(hidden.shape)).mean(1))


def tokens():
    x = torch.randint(1, 30, (96, 6))
    x[::3, 4:] = 0
    return x


def body(*layers):
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])


MODELS = {
    "conv1d": (
        lambda: Pooled(body(nn.Conv1d(6, 16, 3, padding="same"), nn.Conv1d(16, 16, 3, groups=2, stride=2)), 16),
        lambda: torch.randn(96, 6, 9),
        {"body.0", "body.2"},
    ),
    "conv2d": (
        lambda: Pooled(
            body(nn.Conv2d(6, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 16, 3, dilation=2)), 16
        ),
        lambda: torch.randn(96, 6, 7, 7),
        {"body.0", "body.2"},
    ),
    "conv3d": (
        lambda: Pooled(body(nn.Conv3d(4, 12, 2), nn.Conv3d(12, 12, 2, padding="same")), 12),
        lambda: torch.randn(96, 4, 4, 4, 4),
        {"body.0", "body.2"},
    ),
    "transposed": (
        lambda: Pooled(
            body(nn.ConvTranspose1d(8, 12, 3, stride=2, output_padding=1), nn.ConvTranspose1d(12, 12, 4, groups=2)), 12
        ),
        lambda: torch.randn(96, 8, 5),
        {"body.0", "body.2"},
    ),
    "transposed2d": (
        lambda: Pooled(body(nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1), nn.ConvTranspose2d(8, 8, 3)), 8),
        lambda: torch.randn(96, 8, 3, 3),
        {"body.0", "body.2"},
    ),
    "hugging_face": (
        lambda: Pooled(body(Conv1D(24, 16), Conv1D(16, 24)), 16, channel=-1),
        lambda: torch.randn(96, 5, 16),
        {"body.0", "body.2"},
    ),
    "transformer": (lambda: Transformer(True), tokens, {"embedding", "encoder.layers.0.self_attn.v_proj"}),
    "time_major": (lambda: Transformer(False), tokens, {"embedding", "encoder.layers.1.linear2"}),
    "cross_attention": (
        Cross,
        lambda: torch.randn(96, 5, 12),
        {f"attention.{part}" for part in SplitAttention.PROJECTIONS},
    ),
    "tied_table": (LanguageModel, tokens, {"embedding", "middle"}),
    "tied_table_head_first": (lambda: LanguageModel(head_first=True), tokens, {"head", "middle"}),
    "experts": (Experts, lambda: torch.randn(96, 5, 12), {"input", "experts.1.0", "experts.2.2"}),
    "shared_weight": (Recursive, lambda: torch.randn(96, 16), {"first", "middle"}),
}


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def solved(make, inputs, **settings):
    model, x = make(), inputs()
    teacher = torch.randn(x[0].numel(), CLASSES)
    y = (x.flatten(1).float() @ teacher).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, len(x), 16)]
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()
    result = compress(model.eval(), loss, batches[:3], batches[3:4], batches[4:], points=2, **settings)
    return model, result, x[:16]


@pytest.mark.parametrize(("make", "inputs", "expected"), MODELS.values(), ids=MODELS)
def test_every_kind_is_solved_and_can_be_rebuilt(make, inputs, expected):
    state = copy.deepcopy(make().state_dict())
    model, result, x = solved(make, inputs, objective="budget", keep=0.6)
    layers = {layer.name: layer for layer in result.layers}
    assert expected <= {name for name, layer in layers.items() if layer.curve is not None}
    assert result.ranks
    assert result.params_model[1] < result.params_model[0]
    assert result.params_model[1] == sum(parameter.numel() for parameter in result.model.parameters())
    assert result.params_layers[1] <= 0.6 * result.params_layers[0]
    fresh = make().eval()
    set_structure(fresh, result.ranks, splits_in(result.model.state_dict()))
    fresh.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert_close(fresh(x), result.model(x))
        assert torch.isfinite(result.model(x)).all()
    assert set(model.state_dict()) == set(state), "the user's model has changed"


@pytest.mark.parametrize("name", ["transposed", "hugging_face", "transformer", "cross_attention", "shared_weight"])
def test_a_nearly_full_budget_nearly_keeps_the_outputs(name):
    """Factors that were put in the wrong way round would give other outputs at any rank."""
    make, inputs, _ = MODELS[name]
    model, generous, x = solved(make, inputs, objective="budget", keep=0.97, metric="euclidean", range_factor=1e9)
    assert generous.ranks
    with torch.no_grad():
        expected = model(x)
        error = (generous.model(x) - expected).norm() / (expected - expected.mean()).norm()
    assert error < 0.35


def test_shared_weights_are_factorized_once_and_shared_again():
    _, result, _ = solved(*MODELS["shared_weight"][:2], objective="budget", keep=0.6)
    assert "last" not in result.ranks
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert reasons["last"] == "shares the weight of 'first' and is factorized with it"
    assert result.model.first.left_factor is result.model.last.left_factor
    assert result.model.first.bias is not result.model.last.bias


def test_predictions_for_a_shared_weight_count_both_calls():
    """The derivative along the whole weight is that of the loss when the shared weight is scaled."""
    model = Recursive().double().eval()
    batch = (torch.randn(8, 16, dtype=torch.float64), torch.randint(CLASSES, (8,)))
    candidate = next(c for c in find_layers(model)[0] if c.name == "first")
    layer = {"first": LayerStatistics(candidate, row_reader(candidate))}
    factors = {"first": factorize(candidate.matrices())}
    heads, totals = component_derivatives(model, layer, factors, loss, [batch], torch.device("cpu"))["first"].loss
    step = 1e-6
    changes = []
    for sign in (1, -1):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.first.weight.mul_(1 + sign * step)
        changes.append(loss(scaled, batch).detach())
    assert_close(totals, (changes[0] - changes[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    assert_close(heads.sum(1), totals)


@pytest.mark.parametrize("head_first", [False, True])
def test_predictions_for_a_tied_table_count_lookups_and_products(head_first):
    model = LanguageModel(head_first).double().eval()
    batch = (tokens()[:8], torch.randint(CLASSES, (8,)))
    candidate = next(c for c in find_layers(model)[0] if c.twins)
    assert candidate.transposed == candidate.twins == (("embedding",) if head_first else ("head",))
    layers = collect_statistics(model, [candidate], loss, [batch], torch.device("cpu"), sampler=RowSampler(10**6, 1, 0))
    factors = {name: factorize(candidate.matrices()) for name in layers}
    heads, totals = component_derivatives(model, layers, factors, loss, [batch], torch.device("cpu"))[
        candidate.name
    ].loss
    step, changes = 1e-6, []
    for sign in (1, -1):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.embedding.weight.mul_(1 + sign * step)
        changes.append(loss(scaled, batch).detach())
    assert_close(totals, (changes[0] - changes[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    assert_close(heads.sum(1), totals)
    layer = layers[candidate.name]
    assert (layer.inputs.mean.dim(), layer.gradients.mean.dim()) == ((3, 2) if head_first else (2, 3))
    products, lookups = 1, batch[0].shape[1]
    assert layer.flops(None) == 30 * 16 * products
    assert layer.flops(2) == 2 * (30 + 16) * products + 2 * 16 * lookups


def test_lookups_alone_have_no_multiply_adds_to_save():
    make, inputs, _ = MODELS["transformer"]
    with pytest.raises(ValueError, match=r"cost='flops' is 0 for .*embedding.*Use cost='params'"):
        solved(make, inputs, objective="budget", cost="flops", include=["embedding"])


def test_a_tied_table_stays_tied():
    _, result, _ = solved(*MODELS["tied_table"][:2], objective="budget", keep=0.6, include=["embedding", "head"])
    assert set(result.ranks) == {"embedding"}
    assert result.model.embedding.left_factor is result.model.head.left_factor
    assert result.model.embedding.right_factor is result.model.head.right_factor


def test_only_the_diagonal_is_kept_of_a_side_that_is_too_large(monkeypatch):
    monkeypatch.setattr(layer_statistics, "LARGEST_SIDE", 20)
    make, inputs, _ = MODELS["tied_table"]
    _, result, _ = solved(make, inputs, objective="budget", keep=0.6)
    assert result.ranks
    wide = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES))
    candidates, _ = find_layers(wide)
    batch = (torch.randn(8, 24), torch.randint(CLASSES, (8,)))
    layers = collect_statistics(wide, candidates, loss, [batch], torch.device("cpu"), sampler=RowSampler(9, 8, 0))
    assert_close(layers["0"].inputs.mean, batch[0].double().square().mean(0)[None])
    assert [layer.gradients.mean.dim() for layer in layers.values()] == [3, 2, 3]
    _, result, _ = solved(lambda: copy.deepcopy(wide), lambda: torch.randn(96, 24), objective="budget", keep=0.6)
    assert result.ranks


def test_without_a_choice_attention_is_put_back():
    model, result, _ = solved(
        *MODELS["transformer"][:2], objective="budget", keep=0.9, include=["embedding"], refinements=0
    )
    assert set(result.ranks) == {"embedding"}
    assert not any(isinstance(module, SplitAttention) for module in result.model.modules())
    assert sum(isinstance(module, LowRankModule) for module in result.model.modules()) == 1
    before = {name: value for name, value in model.state_dict().items() if "self_attn" in name}
    after = {name: value for name, value in result.model.state_dict().items() if "self_attn" in name}
    assert_close(after, before, rtol=0, atol=0)
