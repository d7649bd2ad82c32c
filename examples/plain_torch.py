"""No framework: train a network with a plain loop, compress it, save it, load it again.

Run with ``python examples/plain_torch.py``; the data is scikit-learn's digits.
"""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lrf_lightning import StepOutput, compress, load_compressed


def network() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepOutput:
    """One loss and one score per sample; a plain Tensor of losses is enough."""
    inputs, labels = batch
    logits = model(inputs)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return StepOutput(losses, score=(logits.argmax(1) == labels).float())


def main() -> None:
    """Train, compress, save, load."""
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    parts = random_split(data, [597, 250, 350, 600])
    train, calibration, selection, verification = (DataLoader(part, batch_size=50) for part in parts)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=3.0)
    for _ in range(30):
        for inputs, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    result = compress(model, loss, calibration, selection, verification, objective="compact", score_margin=0.01)
    print(f"{result.params_model[0]:,} -> {result.params_model[1]:,} parameters: {result.certificate.verdict}")

    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        loaded = load_compressed(network(), folder)
    inputs = data.tensors[0]
    print("reloaded outputs are equal:", torch.equal(loaded(inputs), result.model(inputs)))


if __name__ == "__main__":
    main()
