"""The training code of the paper's authors, imported from a clone that the user has; none of it is copied.

    git clone https://github.com/Khushiyant/helix && git -C helix checkout 65a9517

Its model.py wants mamba-ssm, its dataset.py torchaudio and pandas. Where mamba-ssm is not installed, a Mamba layer of
ours, with the same parameters, can stand in for theirs: what their loop and their loader cost can be measured still,
their model's own pace cannot.

Legend: B batch, T samples.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from helix.models.blocks.mamba import Mamba
from helix.models.scan import kernels
from helix.peers import MissingPeerError

CLONE = (
    "git clone https://github.com/Khushiyant/helix && git -C helix checkout 65a9517, then authors=PATH of that folder"
)
#: Modules of theirs by their names there, in the order in which they import each other.
MODULES = ("model", "dataset", "train")

#: Their optimiser, as their train_fold makes it.
LR, WEIGHT_DECAY, CLIP_NORM = 3e-4, 0.05, 1.0


class StandIn(nn.Module):
    """Our forward Mamba layer with the arguments of mamba-ssm's `Mamba`."""

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2):
        super().__init__()
        self.layer = Mamba(d_model, expand * d_model, d_state, d_conv, reverse=False)

    def forward(self, h_BLD: Tensor) -> Tensor:
        return self.layer(h_BLD)


@dataclass(frozen=True, kw_only=True)
class AuthorsCode:
    """Their modules. `own_mamba`: whether Mamba in them is mamba-ssm's and not a layer of ours."""

    model: ModuleType
    train: ModuleType
    dataset: ModuleType
    own_mamba: bool

    def classifier(self, frontend: str, attention_at: tuple[int, ...], *, classes: int, device: torch.device) -> Any:
        """Their model of the paper's size."""
        kind = self.model.RawWaveformMamba if frontend == "raw" else self.model.SpectrogramMamba
        return kind(num_classes=classes, attention_at=attention_at).to(device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def epoch(self, model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Their loop once over `batches`, pairs of inputs and labels."""
        self.train.train_one_epoch(model, batches, optimizer, nn.CrossEntropyLoss(), device)

    def evaluation(self, model: nn.Module, batches: Any, device: torch.device) -> None:
        """Their evaluation of `batches`."""
        self.train.evaluate(model, batches, nn.CrossEntropyLoss(), device)

    def loaders(self, root: Path, *, fold: int, batch: int, frontend: str) -> tuple[Iterable[Any], Iterable[Any]]:
        """Their loaders of ESC-50, of the training and of the test clips."""
        with contextlib.redirect_stdout(sys.stderr):
            return self.dataset.get_dataloaders(root=str(root), test_fold=fold, batch_size=batch, mode=frontend)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, label_B: Tensor) -> Callable[[], Any]:
    """Forward, loss, backward, clipping and AdamW of their model on a batch that is there, and nothing that waits."""
    criterion = nn.CrossEntropyLoss()

    def step() -> Tensor:
        loss = criterion(model(inputs), label_B)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def clone_at(folder: str) -> Path:
    """The folder of a clone of theirs. Raises MissingPeerError where none is named or a module of theirs is missing."""
    if not folder:
        raise MissingPeerError(CLONE)
    root = Path(folder).expanduser()
    absent = [f"{name}.py" for name in MODULES if not (root / f"{name}.py").is_file()]
    if absent:
        raise MissingPeerError(f"{folder} has no {', '.join(absent)}; {CLONE}")
    return root


def load_authors_code(folder: str) -> AuthorsCode:
    """From a clone of their repository. Raises MissingPeerError where there is none or where it cannot be imported."""
    root = clone_at(folder)
    own = kernels("mamba_ssm") is not None
    with _as_there(None if own else _stand_in()):
        try:
            model, dataset, train = (_module(root, name) for name in MODULES)
        except Exception as error:  # code of others, with libraries of others
            raise MissingPeerError(f"{folder} cannot be imported ({type(error).__name__}: {error})") from error
    return AuthorsCode(model=model, dataset=dataset, train=train, own_mamba=own)


def _module(root: Path, name: str) -> ModuleType:
    """One of theirs under the name that the others import it by."""
    spec = importlib.util.spec_from_file_location(name, root / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _stand_in() -> ModuleType:
    module = ModuleType("mamba_ssm")
    module.Mamba = StandIn  # type: ignore[attr-defined]
    return module


@contextlib.contextmanager
def _as_there(mamba_ssm: ModuleType | None) -> Iterator[None]:
    """While their modules are imported their names mean theirs."""
    names = (*MODULES, *(["mamba_ssm"] if mamba_ssm else []))
    before = {name: sys.modules.get(name) for name in names}
    if mamba_ssm is not None:
        sys.modules["mamba_ssm"] = mamba_ssm
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
