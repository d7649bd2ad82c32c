"""Graph networks of PyTorch Geometric: batches that count themselves, and layers whose rows are nodes."""

import lightning.pytorch as pl
import pytest
import torch
from small_modules import QUICK, trainer
from torch import nn
from torch.nn import functional

from lrf_lightning import LowRankCompression, compress, load_compressed

torch_geometric = pytest.importorskip("torch_geometric")

from torch_geometric.data import Data, HeteroData  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.nn import GCNConv, GINConv, SAGEConv, global_mean_pool  # noqa: E402

CLASSES, FEATURES = 3, 16


def graphs(count, seed):
    """Graphs of 5 to 14 nodes whose features lie around the centre of the graph's class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for position in range(count):
        nodes = int(torch.randint(5, 15, (1,), generator=generator))
        x = torch.randn(nodes, FEATURES, generator=generator)
        x[:, position % CLASSES] += 1
        edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
        made.append(Data(x=x, edge_index=edges, y=torch.tensor([position % CLASSES])))
    return made


class GraphNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = GCNConv(FEATURES, 48)
        self.second = GINConv(nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)))
        self.head = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, CLASSES))

    def forward(self, batch):
        nodes = self.first(batch.x, batch.edge_index).relu()
        nodes = self.second(nodes, batch.edge_index).relu()
        return self.head(global_mean_pool(nodes, batch.batch))


class GraphClassifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = GraphNetwork()

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.net(batch), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.3)


@pytest.mark.filterwarnings("error:a batch was counted")
def test_graphs_are_compared_one_by_one(tmp_path):
    compression = LowRankCompression(objective="budget", keep=0.5, strict=True, dirpath=tmp_path, **QUICK)
    module = GraphClassifier()
    run = trainer(callbacks=[compression])
    run.fit(module, DataLoader(graphs(300, 0), 32, shuffle=True), DataLoader(graphs(200, 1), 32))
    result = compression.result
    predicted = {layer.name for layer in result.layers if layer.curve is not None}
    assert predicted == {"net.first.lin", "net.second.nn.0", "net.second.nn.2", "net.head.0", "net.head.2"}
    assert result.ranks.keys() & {"net.second.nn.0", "net.second.nn.2"}
    assert sum(result.samples.values()) == 200
    assert result.certificate.dense.samples == result.samples["verification"]
    assert result.score_name == "accuracy"
    loaded = load_compressed(GraphClassifier(), tmp_path).eval()
    (batch,) = DataLoader(graphs(9, 2), 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.net(batch), result.model.eval().net(batch), rtol=0, atol=0)


def test_predictions_for_nodes_are_those_of_graphs_given_one_by_one():
    """Batches of one graph leave nothing to assign; the predictions for batches of many are close to theirs."""
    torch.manual_seed(0)
    model = GraphNetwork()
    data, optimizer = graphs(400, 0), torch.optim.Adam(model.parameters(), 3e-3)
    for batch in DataLoader(data, 50):
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), batch.y).backward()
        optimizer.step()

    def loss(model, batch):
        return functional.cross_entropy(model(batch), batch.y, reduction="none")

    options = {"objective": "budget", "keep": 0.5, "speed": "none", "refinements": 0, "range_factor": 1e9}
    found = {
        size: compress(
            model, loss, *(list(DataLoader(part, size)) for part in (data[:200], data[200:300], data[300:])), **options
        )
        for size in (1, 50)
    }
    curves = [
        {layer.name: layer.curve for layer in result.layers if layer.curve is not None} for result in found.values()
    ]
    assert {"first.lin", "second.nn.0", "second.nn.2", "head.0"} <= curves[0].keys() & curves[1].keys()
    for name, expected in curves[0].items():
        for predictions in ("first_order", "curvature"):
            one, many = (torch.tensor(getattr(curve, predictions)) for curve in (expected, curves[1][name]))
            assert (one - many).norm() < 0.25 * one.norm(), (name, predictions)


def test_heterogeneous_graphs_keep_their_types():
    """A store of such a batch comes into being when it is asked for."""
    data = []
    for each in graphs(60, 0):
        hetero = HeteroData()
        hetero["item"].x, hetero["item", "to", "item"].edge_index, hetero.y = each.x, each.edge_index, each.y
        data.append(hetero)
    convolution = SAGEConv(FEATURES, 48)

    class Hetero(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.head = convolution, nn.Linear(48, CLASSES)

        def forward(self, batch):
            assert batch.node_types == ["item"]
            nodes = self.convolution(batch["item"].x, batch["item", "to", "item"].edge_index).relu()
            return self.head(global_mean_pool(nodes, batch["item"].batch))

    def loss(model, batch):
        return functional.cross_entropy(model(batch), batch.y, reduction="none")

    parts = [list(DataLoader(part, 10)) for part in (data[:20], data[20:40], data[40:])]
    result = compress(Hetero(), loss, *parts, objective="budget", keep=0.6, speed="none", **QUICK)
    assert sum(result.samples.values()) == 60
    assert any(name.startswith("convolution.") for name in result.ranks)
