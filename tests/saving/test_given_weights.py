import copy
import pickle

import fsspec
import pytest
import torch
from compressed_models import RANKS, Net, compressed
from safetensors.torch import save_file
from small_modules import FEATURES, Classifier, loader, network, trainer
from torch import nn

from lrf_lightning import compress
from lrf_lightning.modules import LowRankModule
from lrf_lightning.saving.given_weights import with_weights


def drawn(model):
    """The model with weights of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def same(one, other):
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.module.", "net.model."])
def test_state_dict_with_something_in_front_of_the_names(front):
    trained, fresh = drawn(Net()), Net()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    state = {front + name: value for name, value in trained.state_dict().items()}
    if front:
        state["criterion.weight"] = torch.ones(3)  # what does not belong to the model
    same(with_weights(fresh, state), trained)
    same(with_weights(fresh, {"epoch": 3, "state_dict": state}), trained)
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)


def test_lightning_checkpoint(tmp_path):
    module = Classifier()
    runner = trainer(max_epochs=1)
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    same(with_weights(network(), tmp_path / "last.ckpt"), module.net)
    same(with_weights(Classifier(), tmp_path / "last.ckpt"), module)


def test_files_of_torch_and_safetensors_and_remote_ones(tmp_path):
    trained = drawn(Net())
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        same(with_weights(Net(), tmp_path / name), trained)
    with fsspec.open("memory://bucket/net.pt", "wb") as file:
        file.write((tmp_path / "net.pt").read_bytes())
    try:
        same(with_weights(Net(), "memory://bucket/net.pt"), trained)
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_weights_that_are_compressed_already():
    trained = compressed(Net(), RANKS)
    loaded = with_weights(Net(), {f"model.{name}": value for name, value in trained.state_dict().items()})
    assert isinstance(loaded.conv, LowRankModule)
    same(loaded, trained)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


class TestRefused:
    def test_pickles(self, tmp_path):
        for content in (pickle.dumps(Bomb()), None):
            if content is None:
                torch.save({"state_dict": network().state_dict(), "more": Bomb()}, tmp_path / "x.ckpt")
            else:
                (tmp_path / "x.ckpt").write_bytes(content)
            with pytest.raises(ValueError, match=r"x\.ckpt' is damaged, or it holds more than plain data"):
                with_weights(network(), tmp_path / "x.ckpt")
        assert not (tmp_path / "exploded").exists()

    def test_other_files(self, tmp_path):
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(ValueError, match=r"list\.pt' holds a list, no state dict"):
            with_weights(network(), tmp_path / "list.pt")
        with pytest.raises(FileNotFoundError, match=r"cannot read .*missing\.pt"):
            with_weights(network(), tmp_path / "missing.pt")

    def test_what_does_not_fit(self):
        state = network().state_dict()
        with pytest.raises(ValueError, match=r'(?s)weights does not fit Sequential: .*Missing key.*"4\.bias"'):
            with_weights(network(), {name: value for name, value in state.items() if name != "4.bias"})
        with pytest.raises(ValueError, match=r"(?s)weights does not fit Sequential: .*size mismatch for 0\.weight"):
            with_weights(network(32), state)
        with pytest.raises(ValueError, match=r"weights does not fit Linear: it has no name like '\w+', only 'a\.b'"):
            with_weights(nn.Linear(2, 2), {"a.b": torch.ones(2)})

    def test_two_models_in_one_file(self):
        state = {f"{front}.{name}": v for front in ("model", "ema") for name, v in network().state_dict().items()}
        with pytest.raises(ValueError, match=r"fits Sequential behind both '(model|ema)\.' and '(model|ema)\.'"):
            with_weights(network(), state)
        points = torch.randn(2, FEATURES)
        chosen = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
        assert torch.equal(with_weights(network(), chosen)(points), with_weights(network(), chosen)(points))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tensor_with_several_names_may_be_written_under_one(tmp_path):
    trained = drawn(Tied())
    save_file({"embedding.weight": trained.embedding.weight.detach()}, tmp_path / "model.safetensors")
    found = with_weights(Tied(), tmp_path / "model.safetensors")
    same(found, trained)
    assert found.head.weight is found.embedding.weight


def test_files_of_compressed_models_with_shared_factors(tmp_path):
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.Tanh(), nn.Linear(12, 12))
    model[2].weight = shared.weight
    data = [[(torch.randn(20, 12),)] for _ in range(3)]
    options = {"objective": "budget", "keep": 0.5, "speed": "none"}
    result = compress(model, lambda model, batch: model(batch[0]).square().mean(1), *data, **options)
    result.save(tmp_path)
    found = with_weights(copy.deepcopy(model), tmp_path / "model.safetensors")
    same(found, result.model)
    assert found[2].left_factor is found[0].left_factor
