from collections import deque

import pytest
import torch
from lightning.pytorch import LightningModule
from small_modules import CLASSES, Classifier, clouds, loader, trainer
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lrf_lightning.steps.step_record import run_step


class Eager(Classifier):
    """Keeps everything that a step can keep."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES, average="micro")
        self.many = MetricCollection({"mean": MeanMetric()}, prefix="val/")
        self.outputs, self.nested, self.seen, self.queue = [], {"a": [1]}, set(), deque(maxlen=2)
        self.register_buffer("count", torch.zeros(()))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.outputs.append(logits)
        self.nested["a"].append(logits)
        self.nested["b"] = logits
        self.seen.add(batch_idx)
        self.queue.append(logits)
        self.latest = logits
        self.count = self.count + 1
        self.accuracy(logits, y)
        self.many["mean"].update(logits.mean())
        self.log("val/acc", self.accuracy, on_epoch=True, prog_bar=True)
        self.log_dict({"val/loss": logits.mean(), "val/other": 2.0})
        self.log_dict(self.many)
        return logits.mean()


def test_everything_is_undone():
    module, batch = Eager(), clouds(8)
    module.accuracy.update(*(t[:1] for t in (torch.zeros(8, CLASSES), batch[1])))
    attributes, state = set(module.__dict__), module.accuracy.metric_state
    record = run_step(module, "validation_step", batch)
    assert record.returned.requires_grad
    assert set(module.__dict__) == attributes
    assert (module.outputs, module.nested, module.seen, list(module.queue)) == ([], {"a": [1]}, set(), [])
    assert module.count == 0
    assert module.queue.maxlen == 2
    torch.testing.assert_close(module.accuracy.metric_state, state)
    assert module.accuracy._update_count == 1
    assert "log" not in module.__dict__


def test_everything_is_undone_after_an_exception():
    class Fails(Eager):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise RuntimeError("stop")

    module = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        run_step(module, "validation_step", clouds(8))
    assert module.outputs == []
    assert "log" not in module.__dict__


def test_logged_values_and_metric_objects():
    module, batch = Eager(), clouds(8)
    module.accuracy.update(torch.zeros(8, CLASSES), batch[1])
    record = run_step(module, "validation_step", batch, compute=lambda logged: "val/acc")
    assert set(record.logged) == {"val/acc", "val/loss", "val/other", "val/mean"}
    expected = (module.net(batch[0]).argmax(1) == batch[1]).float().mean()
    torch.testing.assert_close(record.logged["val/acc"], expected)
    assert record.logged["val/other"] == 2.0


def test_submodules_log_as_well():
    class Outer(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Classifier()

        def validation_step(self, batch):
            return self.inner.validation_step(batch, 0)

    record = run_step(Outer(), "validation_step", clouds(8))
    assert list(record.logged) == ["val/loss"]
    assert len(record.calls) == 1


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("self, batch", ()),
        ("self, batch, batch_idx", (1,)),
        ("self, batch, batch_idx, dataloader_idx", (1, 0)),
        ("self, batch, batch_idx, dataloader_idx=5", (1, 5)),
        ("self, batch, batch_idx=3", (1,)),
        ("self, batch, other=3", (3,)),
        ("self, batch, *args", (1,)),
        ("self, batch, *, key=1", (1,)),
    ],
)
def test_indices_that_a_step_asks_for(signature, expected):
    names = [part.split("=")[0].strip() for part in signature.split(",")[2:]]
    values = [name for name in names if name != "*"]
    body = "args" if "*args" in names else f"({''.join(name + ', ' for name in values)})"
    namespace = {}
    exec(f"def validation_step({signature}): return {body}", namespace)
    module = type("Module", (LightningModule,), {"validation_step": namespace["validation_step"]})()
    assert run_step(module, "validation_step", None).returned == expected


def test_metrics_in_containers_are_reset_and_restored():
    module, batch = Classifier(), clouds(8)
    metric = MulticlassAccuracy(num_classes=CLASSES, average="micro")
    metric.update(torch.zeros(8, CLASSES), batch[1])
    module.meters, state = {"val": [metric]}, metric.metric_state

    def validation_step(batch, batch_idx):
        metric.update(module.net(batch[0]), batch[1])
        return metric.compute()

    module.validation_step = validation_step
    expected = (module.net(batch[0]).argmax(1) == batch[1]).float().mean()
    torch.testing.assert_close(run_step(module, "validation_step", batch).returned, expected)
    torch.testing.assert_close(metric.metric_state, state)
    assert metric._update_count == 1


def test_optimizers_and_schedulers_can_be_read_but_do_not_step():
    class Steps(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def training_step(self, batch, batch_idx):
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
            scheduler.step()
            optimizer.zero_grad()
            optimizer.step()
            return self.loss(batch) * optimizer.param_groups[0]["lr"]

    module = Steps()
    run = trainer()
    run.fit(module, loader())
    (scheduler,) = (config.scheduler for config in run.lr_scheduler_configs)
    before = scheduler.state_dict(), [p.clone() for p in module.parameters()]
    module._trainer = run
    record = run_step(module, "training_step", clouds(8))
    assert record.returned.item() > 0
    assert scheduler.state_dict() == before[0]
    torch.testing.assert_close(list(module.parameters()), before[1], rtol=0, atol=0)
    assert "optimizers" not in module.__dict__


def test_own_layers_may_change_themselves():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    module = Classifier(Counts(12, CLASSES))
    run_step(module, "validation_step", clouds(8))
    assert module.net.calls == 0
