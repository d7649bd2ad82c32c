import functools
import gc
import threading
from collections import Counter

import numpy
import pytest
import torch
from small_modules import QUICK, Classifier, clouds, loader, network, trainer
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lrf_lightning import LowRankCompression, compress, export_program, load_compressed, restore_dense
from lrf_lightning.copies.model_copy import copied_model, shareable


class Holder:
    """Any object that is no module."""

    def __init__(self, content):
        self.content = content

    def method(self):
        return self.content


def model(**attributes):
    new = network()
    new.__dict__.update(attributes)
    return new


def large():
    return torch.arange(2**19, dtype=torch.float32)


class TestShared:
    def test_what_cannot_be_copied(self):
        old = model(lock=threading.Lock(), numbers=[1])
        new = copied_model(old)
        assert new.lock is old.lock
        assert new.numbers == [1]
        assert new.numbers is not old.numbers

    def test_an_error_that_is_not_about_an_attribute(self):
        class Own(nn.Linear):
            def __deepcopy__(self, memo):
                raise KeyError("own")

        with pytest.raises(KeyError, match="own"):
            copied_model(nn.Sequential(Own(2, 2)))

    def test_the_trainer_wherever_it_hangs(self):
        module = Classifier()
        run = trainer(max_epochs=1)
        run.fit(module, loader())
        module.mine, module.helper = run, Holder([run])
        new = copied_model(module, data=False)
        assert new.mine is run
        assert new.helper is not module.helper
        assert new.helper.content == [run]
        assert new._trainer is None

    def test_data(self):
        data = TensorDataset(*clouds())
        old = model(data=data, helper=Holder({"loaders": [DataLoader(data)]}))
        new = copied_model(old)
        assert new.data is data
        assert new.helper.content["loaders"][0] is old.helper.content["loaders"][0]
        assert copied_model(old, data=False).data is not data

    def test_data_that_refers_to_the_model_is_copied(self):
        old = model()
        data = TensorDataset(*clouds())
        data.transform = old[0].forward
        old.data, old.loader = data, DataLoader(data)
        new = copied_model(old)
        assert new.data is not data
        assert new.data.transform.__self__ is new[0]
        assert new.loader.dataset is new.data


class TestCopied:
    def test_tensors_on_a_graph(self):
        old = model()
        old.last = [old(torch.ones(1, 12))]
        assert copied_model(old).last[0].grad_fn is None

    def test_what_refers_to_the_model_refers_to_the_copy(self):
        old = model()
        old.helper = Holder(old[2])
        old.method, old.part = old.helper.method, functools.partial(torch.add, old[0].weight)
        new = copied_model(old)
        assert new.helper.content is new[2]
        assert new.method() is new[2]
        assert new.part.args[0] is new[0].weight

    def test_tied_and_parametrized_weights(self):
        old = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
        old[1].weight = old[0].weight
        new = copied_model(old)
        assert new[1].weight is new[0].weight
        x = torch.ones(1, 4)
        torch.testing.assert_close(new(x), old(x), rtol=0, atol=0)
        new[2].parametrizations.weight.original1.data.zero_()
        assert bool(old[2].weight.any())


class TestClosures:
    def test_of_hooks_and_attributes(self):
        old = model()
        old.features, outside = {}, []
        found = old.features

        def noted(key):
            def hook(module, args, output, *, owner=old):
                owner.features[key] = output
                found[key, "too"] = output
                outside.append(module)

            return hook

        old[2].register_forward_hook(noted("a"))
        old[2].register_forward_hook(functools.partial(noted("b")))
        old.first = lambda x: old[0](x)
        new = copied_model(old)
        new(torch.ones(1, 12))
        assert old.features == {}
        assert set(new.features) == {"a", "b", ("a", "too"), ("b", "too")}
        assert outside == [new[2], new[2]], "what is no part of the model is shared"
        with torch.no_grad():
            new[0].weight.zero_()
            new[0].bias.zero_()
        assert not new.first(torch.ones(1, 12)).any()
        assert old.first(torch.ones(1, 12)).any()

    def test_a_forward_method_that_was_wrapped(self):
        old = model()
        inner = old[0].forward
        old[0].forward = lambda x: inner(x) + 1
        new = copied_model(old)
        with torch.no_grad():
            new[0].weight.zero_()
            new[0].bias.zero_()
        torch.testing.assert_close(new[0](torch.ones(1, 12)), torch.ones(1, 24))

    def test_functions_that_hold_nothing_of_the_model_stay(self):
        number = [1]

        def unbound():
            return later

        old = model(act=lambda x: x + number[0], unbound=unbound)
        new = copied_model(old)
        assert new.act is old.act
        assert new.unbound is unbound
        later = 1


class TestConstants:
    def run(self, change):
        old = model(bank=Holder([large(), large().numpy()]), small=torch.zeros(2), view=large())
        old.register_buffer("buffer", large())
        old.view = old.buffer.view(2, -1)
        new = copied_model(old)
        change(new)
        return new, copied_model(new, shareable(new, old))

    def test_are_shared_once_it_was_seen_that_nothing_writes_to_them(self):
        first, second = self.run(lambda _: None)
        assert second.bank is not first.bank
        assert second.bank.content[0] is first.bank.content[0]
        assert second.bank.content[1] is first.bank.content[1]
        assert second.small is not first.small

    def test_what_was_written_to_is_copied(self):
        def change(new):
            new.bank.content[0].data[3] = -1
            new.bank.content[1][3] = -1

        first, second = self.run(change)
        assert second.bank.content[0] is not first.bank.content[0]
        assert second.bank.content[1] is not first.bank.content[1]
        numpy.testing.assert_array_equal(second.bank.content[1], first.bank.content[1])

    def test_views_of_buffers_are_those_of_the_copy(self):
        _, second = self.run(lambda _: None)
        assert second.view.data_ptr() == second.buffer.data_ptr()


class Locked(Classifier):
    """With an attribute that cannot be copied in the module and in one of its layers."""

    def __init__(self):
        super().__init__()
        self.lock, self.net[2].lock = threading.Lock(), threading.Lock()

    def training_step(self, batch, batch_idx):
        with self.lock:
            return super().training_step(batch, batch_idx)


def loss(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("objective", ["lossless", "frontier", "budget"])
def test_a_module_with_a_lock_is_compressed(tmp_path, objective):
    compression = LowRankCompression(objective=objective, dirpath=tmp_path, strict=True, **QUICK)
    trainer(callbacks=[compression]).fit(Locked(), loader(), loader(seed=1))
    result = compression.result
    assert torch.isfinite(load_compressed(Locked(), tmp_path).loss(next(iter(loader()))))
    restore_dense(result.model)
    if objective == "frontier":
        for point in result.frontier:
            result.at(point.keep)


def test_a_model_with_a_lock_without_lightning(tmp_path):
    net = model(lock=threading.Lock())
    net.append(nn.BatchNorm1d(4))
    batches = list(loader())
    result = compress(net, loss, batches, batches, batches, objective="budget", weights=net.state_dict(), **QUICK)
    assert result.model.lock is net.lock
    with torch.no_grad():
        export_program(result.model.eval(), batches[0][0], tmp_path / "model.pt2")


class Counted:
    """Counts how many of it are alive, as an attribute that is written to in the model would be."""

    alive = most = 0

    def __init__(self, data=None):
        self.data = large() if data is None else data
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __deepcopy__(self, memo):
        return type(self)(self.data.clone())

    def __del__(self):
        Counted.alive -= 1


class CountedData(Counted, TensorDataset):
    pass


def test_data_is_copied_once_however_many_models_are_measured():
    gc.collect()
    Counted.alive = Counted.most = 0
    module = Classifier()
    module.data = CountedData()
    compression = LowRankCompression(objective="lossless", save=False, strict=True, points=6)
    trainer(callbacks=[compression]).fit(module, loader(), loader(seed=1))
    assert Counted.most == 2, "the user's and that of the copy that is compressed"


def test_constants_are_not_copied_for_every_model():
    module = Classifier()
    module.bank = large()
    seen = Counter()

    def measured(net, batch):
        seen[net.bank.data_ptr()] += 1
        return net.loss(batch) + 0 * net.bank[0]

    compression = LowRankCompression(objective="lossless", save=False, strict=True, points=6, loss=measured)
    trainer(callbacks=[compression]).fit(module, loader(), loader(seed=1))
    assert len(seen) <= 4
    assert compression.result.model.bank.data_ptr() != module.bank.data_ptr()
