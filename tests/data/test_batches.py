import itertools

import pytest
import torch
from small_modules import loader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lrf_lightning.data.batches import EveryNth, FirstBatches, fixed_order, overlaps, rebuilt, sample_identities


class Numbers(Dataset):
    """Yields its indices, or lists of them if asked for several."""

    def __init__(self, size=10):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.as_tensor(index)


class Stream(IterableDataset):
    def __init__(self, size=10):
        self.size = size

    def __iter__(self):
        return iter(range(self.size))


def values(batches):
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3, "shuffle": True},
        {"batch_size": 3, "shuffle": True, "drop_last": True, "generator": torch.Generator()},
        {"batch_size": 3, "sampler": WeightedRandomSampler([1.0] * 10, 7)},
        {"batch_sampler": BatchSampler(RandomSampler(Numbers(), generator=torch.Generator()), 4, drop_last=False)},
        {"batch_size": None, "shuffle": True},
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(Numbers()), 4, drop_last=False)},
    ],
    ids=["shuffled", "own generator", "weighted", "batch sampler", "unbatched", "lists of indices"],
)
class TestFixedOrder:
    def test_every_pass_is_the_same_and_like_one_of_the_loader(self, options):
        original = DataLoader(Numbers(), **options)
        ordered = fixed_order(original, seed=1)
        first = values(ordered)
        assert first == values(ordered) == values(fixed_order(original, seed=1))
        assert [len(b) if isinstance(b, list) else 1 for b in first] == [
            len(b) if isinstance(b, list) else 1 for b in values(original)
        ]
        assert len(ordered) == len(first)
        assert first == values(fixed_order(original, seed=1)), "however often the loader was used in between"
        assert first != values(fixed_order(original, seed=2))

    def test_generators_stay(self, options):
        original = DataLoader(Numbers(), **options)
        generators = [original.generator, getattr(original.batch_sampler, "sampler", original.sampler)]
        generators = [g for g in (generators[0], getattr(generators[1], "generator", None)) if g is not None]
        before = [torch.get_rng_state(), *(g.get_state() for g in generators)]
        fixed_order(original, seed=1)
        for state, after in zip(before, [torch.get_rng_state(), *(g.get_state() for g in generators)], strict=True):
            assert torch.equal(state, after)


class TestOtherSources:
    def test_iterators_are_read_once(self):
        ordered = fixed_order(iter([torch.ones(1), torch.zeros(2)]), seed=0)
        assert values(ordered) == values(ordered) == [[1.0], [0.0, 0.0]]

    def test_lists_and_loaders_of_another_kind_stay(self):
        class Own(DataLoader):
            def __iter__(self):
                return iter([torch.ones(1)])

        batches, own = [torch.ones(1)], Own(Numbers())
        assert fixed_order(batches, seed=0) is batches
        assert fixed_order(own, seed=0) is own

    def test_streams_keep_their_batches(self):
        ordered = fixed_order(DataLoader(Stream(), batch_size=4, drop_last=True), seed=0)
        assert values(ordered) == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_options_of_a_loader_are_kept(self):
        def collate(items):
            return torch.stack(items) + 100

        original = DataLoader(Numbers(), batch_size=2, collate_fn=collate, timeout=0, worker_init_fn=print)
        ordered = rebuilt(original, [[3, 1], [2]])
        assert values(ordered) == [[103, 101], [102]]
        assert (ordered.collate_fn, ordered.worker_init_fn, ordered.num_workers) == (collate, print, 0)


class TestParts:
    def test_first_batches(self):
        first = FirstBatches([1, 2, 3], 2)
        assert (list(first), len(first)) == ([1, 2], 2)
        assert len(FirstBatches([1], 2)) == 1
        with pytest.raises(TypeError):
            len(FirstBatches(iter([]), 2))

    @pytest.mark.parametrize("size", range(8))
    def test_parts_are_disjoint_and_complete(self, size):
        parts = [EveryNth(range(size), "aba", part) for part in "ab"]
        assert sorted(itertools.chain(*parts)) == list(range(size))
        assert [len(part) for part in parts] == [len(list(part)) for part in parts]


class TestIdentities:
    def test_subsets_of_subsets(self):
        data = Numbers(20)
        inner = Subset(Subset(data, range(10, 20)), [0, 1, 2])
        first = sample_identities(fixed_order(DataLoader(inner, batch_size=2), 0))
        assert first == sample_identities(fixed_order(DataLoader(Subset(data, [12, 10, 11])), 0))
        assert not first & sample_identities(fixed_order(DataLoader(Subset(data, [13])), 0))

    def test_rows_of_one_tensor(self):
        rows = torch.arange(20.0).reshape(10, 2)
        whole = fixed_order(DataLoader(TensorDataset(rows)), 0)
        part = fixed_order(DataLoader(TensorDataset(rows[7:]), batch_size=2), 0)
        copied = fixed_order(DataLoader(TensorDataset(rows.clone())), 0)
        assert len(sample_identities(whole) & sample_identities(part)) == 3
        assert not sample_identities(whole) & sample_identities(copied)

    def test_lists_of_indices(self):
        data = Numbers()
        sampler = BatchSampler(SequentialSampler(data), 4, drop_last=False)
        by_lists = fixed_order(DataLoader(Subset(data, range(5, 10)), batch_size=None, sampler=[[0, 1], [2]]), 0)
        whole = fixed_order(DataLoader(data, batch_size=None, sampler=sampler), 0)
        assert len(sample_identities(by_lists) & sample_identities(whole)) == 3

    def test_streams_batches_and_parts(self):
        stream = DataLoader(Stream())
        assert sample_identities(stream) & sample_identities(FirstBatches(DataLoader(stream.dataset), 3))
        assert not sample_identities(stream) & sample_identities(DataLoader(Stream()))
        parts = [sample_identities(EveryNth(stream, "aabb", part)) for part in "ab"]
        assert not parts[0] & parts[1]
        batch = torch.ones(2)
        assert sample_identities([batch]) & sample_identities([torch.ones(2), batch])


def test_overlaps_are_told_for_every_pair():
    data = TensorDataset(torch.arange(10.0))
    loaders = {
        role: fixed_order(DataLoader(Subset(data, indices), 4), 0)
        for role, indices in (("calibration", [0, 1, 2]), ("selection", [2, 3, 4]), ("verification", [4, 5, 6, 7]))
    }
    choice, fit = overlaps(loaders)
    assert choice.startswith("selection and verification share data (1 of 4")
    assert "the verdict is not independent of the choice" in choice
    assert fit.startswith("calibration and selection share data (1 of 3")
    assert overlaps({role: loader(seed=seed) for seed, role in enumerate(loaders)}) == []
