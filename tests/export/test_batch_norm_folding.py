import copy
import warnings

import pytest
import torch
from compressed_models import compressed
from small_modules import Classifier
from torch import nn
from torch.nn.utils import parametrizations

from lrf_lightning import fold_batch_norms
from lrf_lightning.modules import LowRankModule

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def trained(model):
    """Batch norms as training leaves them, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def check(model, sample, left=()):
    """Fold, compare on another batch, and return the folded model; the norms named in ``left`` must be there still."""
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model, sample)
    assert norms(folded) == list(left)
    other = torch.randn(5, *sample.shape[1:])
    with torch.no_grad():
        expected, found = model(other), folded(other)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the model itself was changed"
    return folded


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), nn.BatchNorm1d, (2, 6)),
    "linear_unbiased": (lambda: nn.Linear(6, 8, bias=False), nn.BatchNorm1d, (2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), nn.BatchNorm1d, (2, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d, (2, 6, 7, 6)),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d, (2, 6, 7, 6)),
    "conv2d_reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (2, 6, 7, 6)),
    "conv2d_sync": (lambda: nn.Conv2d(6, 8, 3), nn.SyncBatchNorm, (2, 6, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), nn.BatchNorm3d, (2, 6, 3, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 8, 3), nn.BatchNorm1d, (2, 6, 4)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d, (2, 6, 4, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(6, 8, 2), nn.BatchNorm3d, (2, 6, 3, 2, 2)),
}


class TestKinds:
    @pytest.mark.parametrize("low_rank", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_layer_and_norm(self, name, low_rank):
        make, norm, shape = LAYERS[name]
        model = nn.Sequential(make(), norm(8), nn.ReLU())
        if low_rank:
            compressed(model, {"0": 2})
        folded = check(trained(model), torch.randn(shape))
        assert isinstance(folded[0], LowRankModule) == low_rank
        assert isinstance(folded[1], nn.Identity)
        if low_rank:
            assert torch.equal(folded[0].right_factor, model[0].right_factor), "only the second factor changes"

    def test_low_rank_transposed_convolution_with_groups(self):
        model = compressed(nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)), {"0": 2})
        check(trained(model), torch.randn(2, 6, 4, 4))

    def test_norm_without_weight(self):
        check(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))), torch.randn(2, 3, 5, 5))

    def test_in_a_lightning_module(self):
        class Called(Classifier):
            def forward(self, x):
                return self.net(x)

        check(trained(Called(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))), torch.randn(2, 6))

    def test_torchvision_and_timm(self):
        timm = pytest.importorskip("timm")
        check(trained(timm.create_model("resnet10t", num_classes=7)), torch.randn(2, 3, 32, 32))


class Block(nn.Module):
    """A convolution and a batch norm that can be used in ways that forbid folding."""

    def __init__(self, forward, **others):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.call = forward
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x, extra=None):
        return self.call(self, x, extra)


def once(b, x, extra):
    return b.norm(b.conv(x))


USES = {
    "output_used_twice": lambda b, x, _: (y := b.conv(x)) + b.norm(y),
    "norm_called_twice": lambda b, x, _: b.norm(b.norm(b.conv(x))),
    "norm_shared_by_two_places": lambda b, x, _: b.norm(b.conv(x)) + b.norm(x),
    "convolution_called_twice": lambda b, x, _: b.norm(b.conv(x)) + b.conv(x).relu(),
    "something_in_between": lambda b, x, _: b.norm(b.conv(x).relu()),
    "norm_first": lambda b, x, _: b.conv(b.norm(x)),
    "weight_read": lambda b, x, _: b.norm(b.conv(x)) + b.conv.weight.sum(),
    "bias_of_the_norm_read": lambda b, x, _: b.norm(b.conv(x)) + b.norm.bias.sum(),
    "convolution_returned": lambda b, x, _: torch.cat([b.norm(y := b.conv(x)), y]),
    "function_of_the_shape": lambda b, x, _: b.norm(b.conv(x)) * (y := b.conv(x)).shape[0] + y,
}


class TestLeftAlone:
    @pytest.mark.parametrize("use", USES)
    def test_use(self, use):
        check(trained(Block(USES[use])), torch.randn(2, 4, 5, 5), left=["norm"])

    def test_folded_otherwise(self):
        check(trained(Block(once)), torch.randn(2, 4, 5, 5))

    def test_optional_arguments_are_left_out_in_the_trace_too(self):
        block = trained(Block(lambda b, x, extra: b.norm(b.conv(x)) if extra is None else b.conv(x) + extra))
        check(block, torch.randn(2, 4, 5, 5))

    def test_module_that_hangs_in_two_places(self):
        shared = Block(once)
        shared.again = shared.conv
        check(trained(shared), torch.randn(2, 4, 5, 5), left=["norm"])

    def test_weight_shared_with_another_layer(self):
        block = Block(lambda b, x, _: b.norm(b.conv(x)) + b.other(x), other=nn.Conv2d(4, 4, 3, padding=1))
        block.other.weight = block.conv.weight
        check(trained(block), torch.randn(2, 4, 5, 5), left=["norm"])

    @pytest.mark.parametrize("name", ["conv", "norm"])
    def test_hooks(self, name):
        block = trained(Block(once))
        block.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
        check(block, torch.randn(2, 4, 5, 5), left=["norm"])

    def test_parametrized_weight(self):
        block = Block(once)
        parametrizations.weight_norm(block.conv)
        check(trained(block), torch.randn(2, 4, 5, 5), left=["norm"])

    def test_no_running_statistics(self):
        # its outputs depend on the batch, so that it cannot be a part of the layer
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
        assert norms(fold_batch_norms(model, torch.randn(2, 3, 5, 5))) == ["1"]

    def test_norm_over_the_length_after_a_linear_layer(self):
        model = trained(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
        check(model, torch.randn(2, 8, 6), left=["1"])  # (batch, length, features), with a length of 8

    def test_dense_transposed_convolution_with_groups(self):
        model = trained(nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)))
        check(model, torch.randn(2, 6, 4, 4), left=["1"])

    def test_subclasses(self):
        class Activated(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        model = nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        check(trained(model), torch.randn(2, 3, 7, 7), left=["1"])

    def test_a_model_that_cannot_be_traced_says_so(self):
        block = trained(Block(lambda b, x, _: b.norm(b.conv(x)) if x.sum() > 1e9 else b.norm(b.conv(-x))))
        with pytest.warns(UserWarning, match=r"batch norms are not folded, since Block cannot be traced \(TraceError"):
            check(block, torch.randn(2, 4, 5, 5), left=["norm"])

    def test_nothing_to_fold_needs_no_trace(self):
        class Branching(nn.Linear):
            def forward(self, x):
                return super().forward(x) if x.sum() > 0 else x

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fold_batch_norms(Branching(3, 3).eval(), torch.ones(2, 3))


@pytest.mark.parametrize("part", ["", "norm"])
def test_training_mode_is_refused(part):
    block = Block(once).eval()
    block.get_submodule(part).training = True
    with pytest.raises(ValueError, match=r"(norm|the model) is in training mode.*call model.eval\(\) first"):
        fold_batch_norms(block, torch.randn(2, 4, 5, 5))


def test_what_a_model_keeps_of_a_call_is_no_stand_in():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.first, self.all = nn.Linear(6, 8), nn.BatchNorm1d(8), None, []

        def forward(self, x):
            x = self.norm(self.layer(x))
            if self.first is None:
                self.first = x.detach()[:1] * 0 + 1
            self.all.append(x)
            return x * self.first

    folded = check(trained(Caches()), torch.randn(2, 6))
    assert isinstance(folded.first, torch.Tensor)
    assert all(isinstance(value, torch.Tensor) for value in folded.all)


def test_forwards_of_their_own_are_not_folded_away():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[0].forward = lambda x: torch.nn.functional.linear(x, model[0].weight).relu()
    model[3].forward = lambda x: x + 1
    check(trained(model), torch.randn(2, 6), left=["1", "3"])


@pytest.mark.parametrize("watched", ["0", "1"])
def test_hooks_around_the_layer_or_the_norm_alone(watched):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.BatchNorm1d(8)))
    assert norms(fold_batch_norms(trained(model), torch.randn(2, 6))) == []
    model.get_submodule(watched).register_forward_hook(lambda *_: None)
    check(model, torch.randn(2, 6), left=["1.0"])
    around = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    around[0].register_forward_hook(lambda *_: None)
    check(trained(around), torch.randn(2, 6))
