"""The authors' code is imported from a clone, under names that go again; what is missing is said in one line."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helix.models.block import count
from helix.peers import MissingPeerError
from helix.training_peers import MODULES, StandIn, bare_step, load_authors_code

#: Not their text: modules that are called alike, import each other alike and have the functions that are called.
MODEL = """
from torch import nn
from mamba_ssm import Mamba

class RawWaveformMamba(nn.Module):
    def __init__(self, num_classes=50, attention_at=()):
        super().__init__()
        self.embed = nn.Conv1d(1, 8, 160, stride=160)
        self.layer = Mamba(d_model=8, d_state=4, d_conv=4, expand=2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x, n_pool_tokens=None):
        return self.head(self.layer(self.embed(x).mT).mean(1))

class SpectrogramMamba(RawWaveformMamba):
    def forward(self, x, n_pool_tokens=None):
        return super().forward(x.flatten(1)[:, None])
"""
DATASET = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def get_dataloaders(root, test_fold, batch_size, mode):
    print("loaded")
    shape = (1, 800) if mode == "raw" else (1, 16, 64)
    clips = TensorDataset(torch.randn(8, *shape), torch.randint(50, (8,)))
    return DataLoader(clips, batch_size=batch_size, drop_last=True), DataLoader(clips, batch_size=batch_size)
"""
TRAIN = """
import torch
from model import RawWaveformMamba, SpectrogramMamba
from dataset import get_dataloaders

def train_one_epoch(model, loader, optimizer, criterion, device):
    total = 0
    for inputs, targets in loader:
        loss = criterion(model(inputs.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total

@torch.no_grad()
def evaluate(model, loader, criterion, device):
    return sum(criterion(model(inputs.to(device)), targets.to(device)).item() for inputs, targets in loader)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name, text in zip(MODULES, (MODEL, DATASET, TRAIN), strict=True):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.skipif("mamba_ssm" in sys.modules, reason="mamba-ssm is here")
def test_their_modules_find_each_other_and_a_layer_of_ours_where_mamba_ssm_is_missing(clone: Path):
    before = set(sys.modules)
    code = load_authors_code(str(clone))
    assert not {*MODULES, "mamba_ssm"} & (set(sys.modules) - before), "their names are free again"
    model = code.classifier("raw", (), classes=50, device=torch.device("cpu"))
    if not code.own_mamba:
        assert isinstance(model.layer, StandIn)
    train, test = code.loaders(clone, fold=1, batch=4, frontend="raw")
    optimizer = code.optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    code.epoch(model, train, optimizer, torch.device("cpu"))
    code.evaluation(model, test, torch.device("cpu"))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_they_print_does_not_stand_among_the_figures(clone: Path, capsys: pytest.CaptureFixture):
    load_authors_code(str(clone)).loaders(clone, fold=1, batch=4, frontend="mel")
    assert capsys.readouterr().out == ""


def test_without_a_clone_it_says_how_to_get_one(tmp_path: Path):
    with pytest.raises(MissingPeerError, match="git clone"):
        load_authors_code("")
    with pytest.raises(MissingPeerError, match=r"has no model\.py, dataset\.py, train\.py"):
        load_authors_code(str(tmp_path))


def test_a_clone_that_cannot_be_imported_says_why(clone: Path):
    (clone / "dataset.py").write_text("import a_library_that_is_not_here")
    with pytest.raises(MissingPeerError, match="a_library_that_is_not_here"):
        load_authors_code(str(clone))
    assert "model" not in sys.modules


def test_the_stand_in_has_the_parameters_of_mamba_ssms_layer():
    # Of the paper's layer: facts of mamba-ssm's Mamba with d_model 256, d_state 32, d_conv 4 and expand 2.
    assert count(StandIn(256, d_state=32, d_conv=4, expand=2)) == 462_336


def test_a_bare_step_is_one_step_of_their_optimiser():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = bare_step(model, optimizer, torch.randn(8, 4), torch.randint(3, (8,)))
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters()), "gradients do not add up from step to step"
