"""What a run with other samples shows of a loss's rows, and what it makes of a step's loss."""

import random

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional

from lrf_lightning.solver.running.batch_contents import picked
from lrf_lightning.solver.running.evaluation import evaluate, loss_differences
from lrf_lightning.steps.row_layout import row_layouts
from lrf_lightning.steps.step_loss import StepLoss

SIZE, STEPS, CLASSES = 6, 3, 5
CPU = torch.device("cpu")


def layout_of(rows, batch=None):
    """The layout of rows that a function makes of a batch."""
    batch = torch.randn(SIZE, 4) if batch is None else batch
    return row_layouts(lambda batch: [rows(batch)], batch, SIZE, 0.0)


def repeated(x):
    """Shape (steps, batch, 4)."""
    return torch.stack([x * (1 + step) for step in range(STEPS)])


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("samples", lambda x: x.sum(1)),
        ("samples", lambda x: repeated(x).transpose(0, 1)),
        ("samples", lambda x: repeated(x).transpose(0, 1).flatten(0, 1)),
        ("blocks", lambda x: repeated(x).flatten(0, 1)),
        ("second", repeated),
        ("mixed", lambda x: (x @ x.T).logsumexp(1)),
        ("mixed", lambda x: (x @ x.T).flatten()),
        ("mixed", lambda x: x.sum(1) - x.mean()),
        ("mixed", lambda x: x.sum(1) + x[:1].sum() * (torch.arange(SIZE) % 2)),  # only half of them depend on another
        ("samples", lambda x: x.sum(1) + torch.randn(SIZE)),
        ("samples", lambda x: x.sum(1) * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))),
        ("blocks", lambda x: repeated(x + torch.randn_like(x)).flatten(0, 1)),
        ("unknown", lambda x: x.sum(1) + random.SystemRandom().random()),
        ("unknown", lambda x: torch.ones(2 * SIZE)),
        ("unknown", lambda x: x.sum()),
        ("unknown", lambda x: x.flatten()[1:]),
    ],
)
def test_rows_are_those_of_samples_or_not(layout, rows):
    assert layout_of(rows) == (layout,)


def test_what_belongs_to_no_sample_may_confirm_but_not_refute():
    grid = torch.linspace(0, 1, 4)
    batch = {"x": torch.randn(SIZE, 4), "grid": grid}
    assert layout_of(lambda batch: (batch["x"] * batch["grid"]).sum(1), batch) == ("samples",)
    batch = {"x": torch.randn(SIZE, 4), "edges": torch.tensor([[0, 1], [1, 2]])}
    assert layout_of(lambda batch: batch["x"].sum(1) + batch["x"][batch["edges"][0]].sum(), batch) == ("unknown",)


def test_a_step_that_cannot_be_tried_has_no_layouts():
    def picky(batch):
        if len(batch.unique(dim=0)) < SIZE:
            raise ValueError("duplicates")
        return batch

    assert layout_of(picky) == ()


def test_samples_are_picked_from_every_kind_of_batch():
    x = torch.arange(3)
    index = [2, 0, 0]
    batch = {"x": x, "more": [x + 1, ("a", "b", "c")], "scale": 2.0, "one": torch.tensor(5), "none": None}
    found, complete = picked(batch, index)
    assert complete
    assert found["x"].tolist() == index
    assert found["more"][0].tolist() == [3, 1, 1]
    assert found["more"][1] == ("c", "a", "a")
    assert (found["scale"], found["one"], found["none"]) == (2.0, torch.tensor(5), None)
    (x_found, other), complete = picked((x, torch.zeros(2, 3)), index)
    assert (x_found.tolist(), other.shape, complete) == (index, (2, 3), False)
    ragged = [torch.zeros(n) for n in (4, 2, 1)]
    assert [len(part) for part in picked((ragged, x), index)[0][0]] == [1, 4, 4]
    assert picked([x, x, x], index)[0][1].tolist() == index, "the parts of a batch are no samples"
    assert picked((x, object()), index)[1] is False


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, CLASSES)

    def outputs(self, x):
        """Shape (steps, batch, classes)."""
        return torch.stack([self.net(x * (1 + 0.1 * step)) for step in range(STEPS)])


class Steps(Net):
    def validation_step(self, batch):
        x, y = batch
        return functional.cross_entropy(self.outputs(x).flatten(0, 1), y.repeat(STEPS))

    def losses(self, batch):
        x, y = batch
        z = self.outputs(x).transpose(0, 1).flatten(0, 1)
        return functional.cross_entropy(z, y.repeat_interleave(STEPS), reduction="none").view(SIZE, -1).mean(1)


class Targets(Net):
    """Regression of something made of the labels, at every step."""

    def target(self, y):
        return functional.one_hot(y, CLASSES).float().expand(STEPS, -1, -1)

    def validation_step(self, batch):
        return functional.mse_loss(self.outputs(batch[0]), self.target(batch[1]))

    def losses(self, batch):
        return (self.outputs(batch[0]) - self.target(batch[1])).square().mean((0, 2))


class Pairs(Net):
    def validation_step(self, batch):
        x, y = batch
        z = self.net(x)
        return functional.binary_cross_entropy_with_logits((z @ z.T).flatten(), (y[:, None] == y).float().flatten())

    def losses(self, batch):
        return self.validation_step(batch)[None]


class Noisy(Steps):
    """Its noise is another one in every run, which hides the layout, and its targets are none of the batch's."""

    def validation_step(self, batch):
        x, y = batch
        return functional.cross_entropy(
            self.outputs(x + random.SystemRandom().random()).flatten(0, 1), (y + 1).repeat(STEPS) % CLASSES
        )


@pytest.mark.parametrize("module", [Steps, Targets, Pairs])
def test_pairs_are_what_is_independent(module):
    torch.manual_seed(0)
    one, two = module(), module()
    batches = [(torch.randn(SIZE, 4), torch.randint(CLASSES, (SIZE,))) for _ in range(4)]
    loss = StepLoss()
    differences, weights = loss_differences(*(evaluate(each, loss, batches, CPU) for each in (one, two)))
    with torch.no_grad():
        expected = torch.cat([one.losses(batch) - two.losses(batch) for batch in batches])
    torch.testing.assert_close(differences.float(), expected)
    assert len(weights) == len(expected)


def test_rows_that_fit_no_sample_for_sure_are_compared_by_batch():
    batches = [(torch.randn(SIZE, 4), torch.randint(CLASSES, (SIZE,))) for _ in range(4)]
    assert len(evaluate(Noisy(), StepLoss(), batches, CPU).losses) == len(batches)


class Counting(Net):
    """Keeps state that it changes in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.noise = torch.Generator().manual_seed(0)

    def validation_step(self, batch):
        self.count.add_(1)
        return self.count * functional.cross_entropy(self.net(batch[0]), batch[1]) + torch.rand(
            (), generator=self.noise
        )


def test_looking_for_the_loss_leaves_no_state_behind():
    module, loss = Counting(), StepLoss()
    batches = [(torch.randn(SIZE, 4), torch.randint(CLASSES, (SIZE,))) for _ in range(3)]
    first, second = (evaluate(module, loss, batches, CPU).losses for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(SIZE, STEPS, 1), (1, SIZE, STEPS)])
def test_the_first_batch_of_two_shows_the_layout_for_all(sizes):
    loss, module = StepLoss(), Targets()
    batches = [(torch.randn(size, 4), torch.randint(CLASSES, (size,))) for size in sizes]
    assert len(evaluate(module, loss, batches, CPU).losses) == SIZE + STEPS + 1
    assert loss._source.layouts == (("mse_loss", "second"),)


class Trimmed(Net):
    """Cuts a batch to its longest sample."""

    def validation_step(self, batch):
        x, y, lengths = batch
        steps = int(lengths.max())
        z = torch.stack([self.net(x * (1 + step)) for step in range(steps)], 1)
        return functional.cross_entropy(z.flatten(0, 1), (y[:, None] + torch.arange(steps)).flatten() % CLASSES)


class Twofold(Steps):
    """Has a second loss for some batches, the first one among them."""

    def validation_step(self, batch):
        loss, (x, y) = super().validation_step(batch), batch
        return loss + functional.mse_loss(self.net(x)[:, :4], x) if y[0] else loss


@pytest.mark.parametrize("module", [Trimmed, Twofold])
def test_batches_may_differ(module):
    batches = [(torch.randn(SIZE, 4), torch.randint(CLASSES, (SIZE,))) for _ in range(4)]
    for i, (_, y) in enumerate(batches):
        y[0] = 1 - i % 2
    if module is Trimmed:
        batches = [(*batch, torch.tensor([1, 2, 2, 3, 1, 2]).roll(i)) for i, batch in enumerate(batches)]
    assert len(evaluate(module(), StepLoss(), batches, CPU).losses) == 4 * SIZE


class Weighted(Net):
    """A sum whose weights are buffers and attributes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alpha", torch.tensor(0.5))
        self.beta = torch.tensor(2.0)
        self.loss = nn.CrossEntropyLoss(weight=torch.rand(CLASSES) + 0.5)

    def validation_step(self, batch):
        z = self.net(batch[0])
        return self.beta * self.loss(z, batch[1]) + self.alpha * functional.mse_loss(z[:, :4], batch[0])


def test_weights_of_a_sum_may_be_state():
    batches = [(torch.randn(SIZE, 4), torch.randint(CLASSES, (SIZE,))) for _ in range(2)]
    assert len(evaluate(Weighted(), StepLoss(), batches, CPU).losses) == 2 * SIZE


class Own:
    """A batch of a class of the user's own."""

    def __init__(self, x, y):
        self.x, self.y, self.batch_size = x, y, len(x)


class OfOwn(Steps):
    def validation_step(self, batch):
        return super().validation_step((batch.x, (batch.y + 1) % CLASSES))


def test_batches_of_own_classes_are_opened():
    batches = [Own(torch.randn(SIZE, 4), torch.randint(CLASSES, (SIZE,))) for _ in range(2)]
    assert len(evaluate(OfOwn(), StepLoss(), batches, CPU).losses) == 2 * SIZE
    found, complete = picked(batches[0], [1, 1, 2, 3, 4, 5])
    assert complete
    assert (found.x[0] == batches[0].x[1]).all()
    assert found is not batches[0]
