"""A training script that is launched as users launch theirs; see ``test_launchers.py``.

Training takes no steps of any length, so that the trained model is the same for all numbers of processes.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from small_modules import QUICK, Classifier, clouds, trainer
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lrf_lightning import LowRankCompression
from lrf_lightning.callbacks import tracking


class Data(pl.LightningDataModule):
    """Samples that the first process writes to disk; batches may be larger on the second process."""

    def __init__(self, folder, uneven):
        super().__init__()
        self.folder, self.uneven = folder, uneven

    def prepare_data(self):
        torch.save(clouds(83, seed=1), self.folder / f"data{os.environ.get('GROUP_RANK', 0)}.pt")

    def loader(self):
        data = torch.load(self.folder / f"data{os.environ.get('GROUP_RANK', 0)}.pt")
        size = 16 + 4 * self.trainer.global_rank if self.uneven else 16
        return DataLoader(TensorDataset(*data), batch_size=size)

    train_dataloader = val_dataloader = loader


class Frozen(Classifier):
    """A classifier that stays as it was made."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Frozen):
    """Weights that FSDP2 spreads over the processes: some layer by layer, the others together."""

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Notes(pl.Callback):
    """Writes what every process ended with into a file."""

    def __init__(self, folder, compression):
        self.folder, self.compression = folder, compression

    def on_fit_end(self, trainer, pl_module):
        result = self.compression.result
        digest = {name: float(value.double().sum()) for name, value in result.model.state_dict().items()}
        noted = {"ranks": result.ranks, "samples": result.samples, "sums": digest, "world": trainer.world_size}
        noted["backend"] = dist.get_backend() if dist.is_initialized() else None
        (self.folder / f"process{trainer.global_rank}.json").write_text(json.dumps(noted))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--weights", default="last")
    parser.add_argument("--shards", action="store_true", help="whether checkpoints are folders of shards")
    options = parser.parse_args()
    tracking._draw_pictures = lambda *_: {}  # takes longer than everything else here, and has its own tests
    torch.manual_seed(0)
    compression = LowRankCompression(
        objective="budget", dirpath=options.folder / "compressed", strict=True, weights=options.weights, **QUICK
    )
    callbacks = [compression, Notes(options.folder, compression)]
    if options.weights == "best":
        callbacks.append(ModelCheckpoint(options.folder / "checkpoints", monitor="val/loss"))
    fsdp2 = options.strategy == "fsdp2"
    runner = trainer(
        callbacks=callbacks,
        accelerator=options.accelerator,
        max_epochs=1,
        enable_checkpointing=options.weights == "best",
        strategy=ModelParallelStrategy(options.devices, 1, options.shards) if fsdp2 else options.strategy,
        devices=options.devices,
        num_nodes=options.nodes,
    )
    module = Sharded() if fsdp2 else Frozen()
    runner.fit(module, datamodule=Data(options.folder, options.uneven))
    if fsdp2:
        for weight in module.parameters():
            assert isinstance(weight, DTensor), "the live module stays sharded"
        assert not any(isinstance(weight, DTensor) for weight in compression.result.model.parameters())
        for model in (module, compression.result.model):
            runner.validate(model, datamodule=Data(options.folder, options.uneven), verbose=False)
            assert any(isinstance(weight, DTensor) for weight in model.parameters()), (
                "the compressed one can be as well"
            )


if __name__ == "__main__":
    main()
