import itertools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from small_modules import Classifier, loader, trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lrf_lightning.data.loaders import ROLES, check_loaders, resolve_loaders


class Stream(IterableDataset):
    """A dataset without indices and without a length."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(torch.arange(self.size))


def numbers(size=20, batch_size=4, first=0, **options):
    """A loader of the numbers from ``first`` on."""
    return DataLoader(TensorDataset(torch.arange(first, first + size)), batch_size=batch_size, **options)


def fitted(val=None, *, datamodule=None, **options):
    """A trainer that has fitted on validation data, and its module."""

    class Reads(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if isinstance(batch[0], torch.Tensor) else None

    run, module = trainer(**({"max_epochs": 1, "limit_train_batches": 1} | options)), Reads()
    if datamodule is None:
        run.fit(module, loader(16), val)
    else:
        run.fit(module, datamodule=datamodule)
    return run, module


def samples(batches):
    found = []
    for batch in batches:
        batch = batch[0] if isinstance(batch, (list, tuple)) else batch
        found += batch.flatten().tolist()
    return found


def parts(loaders):
    return [samples(getattr(loaders, role)) for role in ROLES]


class TestSplit:
    @pytest.mark.parametrize("size", [3, 4, 20, 33])
    def test_samples_are_cut_into_disjoint_parts(self, size):
        loaders = resolve_loaders(*fitted(numbers(size)), seed=0)
        found = parts(loaders)
        assert sorted(itertools.chain(*found)) == list(range(size))
        assert all(found)
        assert found == parts(loaders), "every pass is the same"
        if size == 20:
            assert [len(part) for part in found] == [8, 6, 6]
        assert "disjoint parts of the validation data" in loaders.notes[0]

    def test_depends_on_the_seed_alone(self):
        run, module = fitted(numbers(20))
        first, again, other = (parts(resolve_loaders(run, module, seed=seed)) for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_shares_of_given_splits_go_to_the_others(self):
        given = numbers(5, first=100)
        loaders = resolve_loaders(*fitted(numbers(20)), selection=given)
        found = parts(loaders)
        assert found[1] == [100, 101, 102, 103, 104]
        assert [len(part) for part in found] == [11, 5, 9]
        assert not set(found[0]) & set(found[2])

    def test_batches_of_a_stream(self):
        loaders = resolve_loaders(*fitted(DataLoader(Stream(40), batch_size=2), limit_val_batches=20))
        found = parts(loaders)
        assert sorted(itertools.chain(*found)) == list(range(40))
        assert [len(part) for part in found] == [16, 12, 12]

    def test_too_few_samples(self):
        with pytest.raises(ValueError, match="has 2 samples, too few to be split into calibration, selection, verif"):
            resolve_loaders(*fitted(numbers(2)))

    def test_repeated_samples_stay_in_one_part(self):
        found = parts(resolve_loaders(*fitted(numbers(6, sampler=[0, 0, 1, 1, 2, 3, 4, 5, 5]))))
        assert sorted(itertools.chain(*found)) == [0, 1, 2, 3, 4, 5]

    def test_unbatched_loader_with_lists_of_indices(self):
        data = TensorDataset(torch.arange(12))
        source = DataLoader(data, batch_size=None, sampler=[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
        found = parts(resolve_loaders(*fitted(source)))
        assert sorted(itertools.chain(*found)) == list(range(12))
        assert all(len(part) % 3 == 0 for part in found)

    def test_a_loader_that_changes_its_batches_is_run_as_it_is(self):
        class Halves(DataLoader):
            def __iter__(self):
                for batch in super().__iter__():
                    yield [batch[0] / 2]

        run, module = fitted(Halves(TensorDataset(torch.arange(40)), batch_size=2))
        found = parts(resolve_loaders(run, module))
        assert sorted(itertools.chain(*found)) == [number / 2 for number in range(40)]

    def test_batches_of_a_batch_sampler_stay_whole(self):
        """Such as pairs, or samples of equal length."""
        pairs = [[2 * i, 2 * i + 1] for i in range(12)]
        run, module = fitted(DataLoader(TensorDataset(torch.arange(24)), batch_sampler=pairs))
        found = resolve_loaders(run, module)
        batches = [tuple(batch[0].tolist()) for role in ROLES for batch in getattr(found, role)]
        assert sorted(batches) == [tuple(pair) for pair in pairs]
        assert all(len(list(getattr(found, role))) > 2 for role in ROLES)
        few = fitted(DataLoader(TensorDataset(torch.arange(24)), batch_sampler=pairs[:2]))
        with pytest.raises(ValueError, match="has 2 batches, which its batch sampler has put together, too few"):
            resolve_loaders(*few)

    def test_first_of_several_loaders(self):
        loaders = resolve_loaders(*fitted([numbers(12), numbers(12, first=100)]))
        assert sorted(itertools.chain(*parts(loaders))) == list(range(12))
        assert "uses the first of 2 loaders" in loaders.notes[0]

    @pytest.mark.parametrize("wrap", [lambda x: {"a": x, "b": numbers(4)}, lambda x: CombinedLoader([x], "sequential")])
    def test_collections_of_loaders(self, wrap):
        assert sorted(itertools.chain(*parts(resolve_loaders(*fitted(wrap(numbers(12))))))) == list(range(12))

    @pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
    def test_loaders_that_are_combined_stay_together(self, mode):
        pairs = {"a": numbers(20, shuffle=True), "b": numbers(20, first=100)}
        run, module = fitted(CombinedLoader(pairs, mode))
        check_loaders(run, module)
        found = resolve_loaders(run, module)
        seen = []
        for role in ROLES:
            batches = list(getattr(found, role))
            assert [set(batch) for batch in batches] == [{"a", "b"}] * len(batches)
            seen += [batch["b"][0] for batch in batches]
            for batch, again in zip(batches, getattr(found, role), strict=True):
                torch.testing.assert_close(again, batch, rtol=0, atol=0)
        assert sorted(torch.cat(seen).tolist()) == list(range(100, 120))

    def test_a_stream_that_begins_differently_on_every_pass(self):
        generator = torch.Generator().manual_seed(0)

        class Reshuffled(Stream):
            def __iter__(self):
                return iter(torch.randperm(self.size, generator=generator))

        run, module = fitted(DataLoader(Reshuffled(40), batch_size=4))
        with pytest.warns(UserWarning, match="begins differently on every pass"):
            resolve_loaders(run, module)


class TestLimits:
    @pytest.mark.parametrize(
        ("limit", "expected"), [(2, 8), (0.4, 8), (100, 20), (1.0, 20), (0, 20)], ids=lambda value: repr(value)
    )
    def test_limit_val_batches(self, limit, expected):
        loaders = resolve_loaders(*fitted(numbers(20), limit_val_batches=limit))
        assert sorted(itertools.chain(*parts(loaders))) == list(range(expected))
        assert any("limit_val_batches" in note for note in loaders.notes) == (expected < 20)

    def test_a_stream_keeps_a_batch_for_every_split(self):
        found = parts(resolve_loaders(*fitted(DataLoader(Stream(40), batch_size=2), limit_val_batches=1)))
        assert found == [[0, 1], [2, 3], [4, 5]]

    @pytest.mark.parametrize("count", [True, 3])
    def test_fast_dev_run_cuts_every_split(self, count):
        run, module = fitted(numbers(60), fast_dev_run=count)
        loaders = resolve_loaders(run, module, calibration=numbers(60, first=100))
        assert [len(part) for part in parts(loaders)] == [4 * max(2, int(count))] * 3

    def test_fast_dev_run_with_a_stream(self):
        run, module = fitted(DataLoader(Stream(40), batch_size=2), fast_dev_run=True)
        assert [len(part) for part in parts(resolve_loaders(run, module))] == [4, 4, 4]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(16)

    def val_dataloader(self):
        return numbers(20)

    def calibration_dataloader(self):
        return numbers(4, first=100)

    def special(self):
        return [numbers(4, first=200)]

    def nothing(self):
        return None


class TestSources:
    def test_order_of_the_sources(self):
        run, module = fitted(datamodule=Data())
        found = parts(resolve_loaders(run, module, selection="special"))
        assert found[:2] == [[100, 101, 102, 103], [200, 201, 202, 203]]
        assert sorted(found[2]) == list(range(20))
        explicit = parts(resolve_loaders(run, module, calibration=[torch.tensor([7])], selection="special"))
        assert explicit[0] == [7]

    def test_names_of_loaders_that_were_passed_to_fit(self):
        run, module = fitted(numbers(20))
        found = parts(resolve_loaders(run, module, verification="val_dataloader", selection=numbers(4, first=100)))
        assert found[2] == list(range(20))

    def test_methods_of_the_module(self):
        run, module = fitted(numbers(20))
        module.selection_dataloader = lambda: numbers(3, first=50)
        assert parts(resolve_loaders(run, module))[1] == [50, 51, 52]

    def test_a_method_that_returns_nothing(self):
        run, module = fitted(datamodule=Data())
        with pytest.raises(ValueError, match=r"selection: nothing\(\) returned None"):
            resolve_loaders(run, module, selection="nothing")

    def test_a_method_that_was_not_prepared(self):
        class Unprepared(Data):
            def test_dataloader(self):
                return self.unprepared

        with pytest.raises(ValueError, match=r"verification: test_dataloader\(\) raised AttributeError: .*stage='fit'"):
            resolve_loaders(*fitted(datamodule=Unprepared()), verification="test_dataloader")

    def test_no_validation_data(self):
        run, module = fitted()
        with pytest.raises(ValueError, match="there is no data for verification"):
            resolve_loaders(run, module, calibration=numbers(), selection=numbers())

    def test_an_empty_generator(self):
        run, module = fitted(numbers(20))
        with pytest.raises(ValueError, match="selection holds no batch"):
            resolve_loaders(run, module, selection=iter([]))

    def test_shuffled_loaders_are_repeatable(self):
        run, module = fitted(numbers(20))
        loaders = resolve_loaders(run, module, selection=numbers(40, shuffle=True))
        first, second = samples(loaders.selection), samples(loaders.selection)
        assert first == second != list(range(40))
        assert sorted(first) == list(range(40))


class TestOverlaps:
    def test_the_same_loader(self):
        run, module = fitted(numbers(20))
        shared = numbers(8)
        with pytest.warns(UserWarning, match=r"selection and verification share data \(8 of 8"):
            loaders = resolve_loaders(run, module, selection=shared, verification=shared)
        assert any("share data" in note for note in loaders.notes)

    def test_validation_data_given_by_name_and_split(self):
        run, module = fitted(numbers(20))
        with pytest.warns(UserWarning, match="calibration and verification share data"):
            resolve_loaders(run, module, calibration="val_dataloader")

    def test_none(self, recwarn):
        run, module = fitted(numbers(20))
        recwarn.clear()
        assert all("share" not in note for note in resolve_loaders(run, module).notes)
        assert [w for w in recwarn if "share" in str(w.message)] == []


class TestChecksBeforeTraining:
    def test_unknown_names_are_told_with_the_owners(self):
        run, module = fitted(datamodule=Data())
        with pytest.raises(ValueError, match="verification='val_loader' is no method of Data or Reads"):
            check_loaders(run, module, verification="val_loader")

    def test_names_of_passed_loaders_are_known(self):
        run, module = fitted(numbers(20))
        check_loaders(run, module, selection="train_dataloader")
        with pytest.raises(ValueError, match="'test_dataloader' is no method"):
            check_loaders(run, module, selection="test_dataloader")

    def test_nothing_is_drawn_from_loaders(self):
        class Explodes(DataLoader):
            def __iter__(self):
                raise AssertionError

        run, module = fitted(numbers(20))
        check_loaders(run, module, selection=Explodes(TensorDataset(torch.ones(2))))

    def test_empty_loader(self):
        run, module = fitted(numbers(20))
        with pytest.raises(ValueError, match=r"calibration holds no batch.*drop_last"):
            check_loaders(run, module, calibration=numbers(2, drop_last=True))
