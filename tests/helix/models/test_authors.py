"""A checkpoint of the authors' code computes here what it computes there, or is refused with what does not fit."""

import io
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helix.models.authors import authors_spec, from_authors, load_authors_checkpoint, read_authors_checkpoint
from helix.models.block import count
from helix.models.classifier import Classifier, build_classifier
from helix.protocol import profile

PATTERNS = {"mamba": "mmmmmm", "helix": "mmmamm", "attention": "aaaaaa"}
VARIANTS = [(frontend, backbone) for frontend in ("raw", "mel") for backbone in PATTERNS]
WIDTH, STATE, CLASSES = 32, 8, 5

#: What the tensors of a small model of attention alone do not tell.
MATCHED = {"mamba": {"d_state": STATE}}


class TheirScan(nn.Module):
    """One Mamba layer under mamba-ssm's names, computed one token after the other from the equations of its paper."""

    def __init__(self, width: int, state: int, taps: int = 4, expand: int = 2):
        super().__init__()
        inner, self.rank, self.state = expand * width, math.ceil(width / 16), state
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, h_BLD: Tensor) -> Tensor:
        length = h_BLD.shape[1]
        u_BLE, z_BLE = self.in_proj(h_BLD).chunk(2, dim=-1)
        u_BLE = nn.functional.silu(self.conv1d(u_BLE.mT)[..., :length].mT)
        low_BLR, B_BLN, C_BLN = self.x_proj(u_BLE).split([self.rank, self.state, self.state], dim=-1)
        dt_BLE = nn.functional.softplus(self.dt_proj(low_BLR))
        A_EN = -self.A_log.exp()
        h_BEN = torch.zeros(len(u_BLE), *A_EN.shape)
        y_BE = []
        for t in range(length):
            h_BEN = torch.exp(dt_BLE[:, t, :, None] * A_EN) * h_BEN
            h_BEN = h_BEN + (dt_BLE[:, t] * u_BLE[:, t])[:, :, None] * B_BLN[:, t, None, :]
            y_BE.append(torch.einsum("ben,bn->be", h_BEN, C_BLN[:, t]) + self.D * u_BLE[:, t])
        return self.out_proj(torch.stack(y_BE, dim=1) * nn.functional.silu(z_BLE))


class TheirBiMamba(nn.Module):
    def __init__(self, width: int, state: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mamba_forward, self.mamba_backward = TheirScan(width, state), TheirScan(width, state)
        self.out_proj = nn.Linear(2 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLD = self.norm(x_BLD)
        ways = [self.mamba_forward(h_BLD), self.mamba_backward(h_BLD.flip(1)).flip(1)]
        return x_BLD + self.out_proj(torch.cat(ways, dim=-1))


class TheirAttention(nn.Module):
    def __init__(self, width: int, state: int):
        super().__init__()
        fixed = 4 * width**2 + 4 * width + 2 * 2 * width  # attention and two norms
        ffn_width = (count(TheirBiMamba(width, state)) - fixed - width) // (2 * width + 1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLD = self.norm1(x_BLD)
        x_BLD = x_BLD + self.attn(h_BLD, h_BLD, h_BLD, need_weights=True)[0]
        return x_BLD + self.ffn(self.norm2(x_BLD))


class Theirs(nn.Module):
    """Their classifier: from waves [B, 1, T] or normalised log-mel images [B, 1, M, F] to logits."""

    def __init__(self, frontend: str, backbone: str, *, width: int = WIDTH, state: int = STATE, classes: int = CLASSES):
        super().__init__()
        raw = frontend == "raw"
        self.patch_embed = nn.Conv1d(1, width, 160, stride=160) if raw else nn.Conv2d(1, width, 16, stride=16)
        self.input_norm = nn.LayerNorm(width)
        kinds = {"m": TheirBiMamba, "a": TheirAttention}
        self.layers = nn.ModuleList(kinds[letter](width, state) for letter in PATTERNS[backbone])
        self.final_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, given: Tensor, pooled: int | None = None) -> Tensor:
        x_BLD = self.input_norm(self.patch_embed(given).flatten(2).mT)
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return self.classifier(self.final_norm(x_BLD)[:, :pooled].mean(dim=1))


def theirs(frontend: str = "raw", backbone: str = "helix") -> Theirs:
    """With every weight away from the regular values of its initialisation."""
    torch.manual_seed(3)
    model = Theirs(frontend, backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(path: Path, weights: object) -> Path:
    torch.save(weights, path)
    return path


def checkpoint_of(model: nn.Module) -> dict[str, object]:
    """What their training loop puts into a file."""
    optimizer = torch.optim.AdamW(model.parameters())
    history = [{"epoch": 1, "train_loss": 1.5, "train_acc": 2.0, "test_loss": 1.6, "test_acc": 2.5}]
    return {
        "epoch": 1,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5).state_dict(),
        "scaler_state_dict": None,
        "best_acc": 2.5,
        "history": history,
    }


def waves() -> Tensor:
    return 0.1 * torch.randn(3, 24_000, generator=torch.Generator().manual_seed(4))


def loaded(path: Path, backbone: str) -> Classifier:
    return load_authors_checkpoint(path, options=MATCHED if backbone == "attention" else None)[0].eval()


@pytest.mark.parametrize("frontend", ["raw", "mel"])
@pytest.mark.parametrize("backbone", PATTERNS)
def test_a_checkpoint_of_theirs_gives_their_logits(frontend, backbone, tmp_path):
    model = theirs(frontend, backbone)
    ours = loaded(saved(tmp_path / "raw_fold1_best.pt", checkpoint_of(model)), backbone)
    with torch.no_grad():
        wanted = model(waves()[:, None] if frontend == "raw" else ours.features(waves()))
        torch.testing.assert_close(ours(waves()), wanted, rtol=1e-5, atol=1e-5)
    assert float(wanted.std(dim=0).max()) > 1e-3, "logits that do not depend on the clip would show nothing"


def test_it_pools_the_first_tokens_where_they_did(tmp_path):
    model = theirs()
    ours, spec = load_authors_checkpoint(saved(tmp_path / "c.pt", checkpoint_of(model)), pool_tokens=20)
    assert spec.pool_tokens == 20
    with torch.no_grad():
        torch.testing.assert_close(ours(waves()), model(waves()[:, None], pooled=20), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(waves()), model(waves()[:, None]), rtol=1e-3)


def test_a_state_dict_alone_is_read_too(tmp_path):
    model = theirs()
    alone = loaded(saved(tmp_path / "weights.pt", model.state_dict()), "helix").state_dict()
    in_checkpoint = loaded(saved(tmp_path / "c.pt", checkpoint_of(model)), "helix").state_dict()
    assert all(torch.equal(alone[name], in_checkpoint[name]) for name in in_checkpoint)


def test_the_spec_is_read_from_names_and_shapes():
    spec = authors_spec(theirs("mel", "helix").state_dict())
    assert (spec.frontend, spec.width) == ("mel", WIDTH)
    assert spec.pattern == ("mamba", "mamba", "mamba", "attention", "mamba", "mamba")
    assert spec.options == {"mel": {"patch": 16}, "mamba": {"d_state": STATE, "d_conv": 4, "expand": 2}}


@pytest.mark.parametrize(
    ("frontend", "backbone", "parameters"),
    [(*variant, number) for variant, number in zip(
        VARIANTS, (6_394_162, 6_393_657, 6_391_132, 6_418_738, 6_418_233, 6_415_708), strict=True
    )],
)  # fmt: skip
def test_their_published_size_needs_no_options(frontend, backbone, parameters):
    """ESC-50, counted in their code; on the meta device."""
    with torch.device("meta"):
        model = Theirs(frontend, backbone, width=256, state=32, classes=50)
    assert count(model) == parameters
    spec = authors_spec(model.state_dict())
    state = from_authors(model.state_dict(), spec)
    with torch.device("meta"):
        ours = build_classifier(spec, profile("authors"), classes=50)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }


def test_loading_leaves_the_global_generator_alone(tmp_path):
    path = saved(tmp_path / "c.pt", checkpoint_of(theirs()))
    before = torch.get_rng_state()
    load_authors_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_everything_that_does_not_fit_is_named_at_once():
    weights = theirs().state_dict()
    del weights["layers.1.mamba_backward.D"]
    weights["layers.3.attn.bias_k"] = torch.zeros(3)
    weights["final_norm.weight"] = torch.zeros(7)
    weights["classifier.bias"] = torch.zeros(CLASSES, dtype=torch.int64)
    with pytest.raises(ValueError) as caught:
        from_authors(weights, authors_spec(weights))
    for part in (
        "layers.1.mamba_backward.D is missing",
        "layers.3.attn.bias_k is not expected",
        "final_norm.weight has shape (7,), wanted (32,)",
        "classifier.bias holds torch.int64, wanted floating-point numbers",
    ):
        assert part in str(caught.value)


def test_attention_that_was_matched_to_another_block_says_what_to_give():
    weights = theirs("raw", "attention").state_dict()
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.0\.weight has shape .*'mamba': \{'d_state': 32\}"):
        from_authors(weights, authors_spec(weights))
    from_authors(weights, authors_spec(weights, options=MATCHED))


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: x for name, x in weights.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("patch_embed.weight"), "there is no patch_embed.weight"),
        (without("classifier.weight"), "there is no classifier.weight"),
        (without("layers.2."), r"layers \[0, 1, 3, 4, 5\]; wanted layers 0, 1, 2 and so on"),
        (without("layers."), r"layers \[\]; wanted"),
        (without("layers.0.mamba_forward.A_log"), "there is no layers.0.mamba_forward.A_log"),
        (lambda weights: {**weights, "patch_embed.weight": torch.zeros(5)}, "wanted 3 or 4 dimensions"),
        (lambda weights: {f"module.{name}": x for name, x in weights.items()}, r"names are \['module.patch_embed"),
    ],
)
def test_weights_of_something_else_are_refused_with_the_file(change, message, tmp_path):
    path = saved(tmp_path / "other.pt", change(theirs().state_dict()))
    with pytest.raises(ValueError, match=message) as caught:
        load_authors_checkpoint(path)
    assert str(caught.value).startswith(str(path))


class RunsCode:
    """Unpickled as anything, this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    path = saved(tmp_path / "c.pt", checkpoint_of(theirs()) | {"history": RunsCode(tmp_path / "ran")})
    with pytest.raises(ValueError, match=r"reading anything else could run code .*torch\.save\(model\.state_dict\(\)"):
        load_authors_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("held", [[1, 2], {"epoch": 3}, {}, {"model_state_dict": {"weight": 1.0}}])
def test_a_file_without_a_state_dict_is_refused(held, tmp_path):
    with pytest.raises(ValueError, match="holds no state dict; wanted tensors by name"):
        read_authors_checkpoint(saved(tmp_path / "c.pt", held))


def test_a_damaged_file_is_refused(tmp_path):
    path = saved(tmp_path / "c.pt", checkpoint_of(theirs()))
    whole = path.read_bytes()
    archive = io.BytesIO()
    np.savez(archive, weight=np.zeros(3))
    for damaged in (b"", b"not a file of torch", whole[:100], whole[: len(whole) // 2], archive.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c\.pt is"):
            read_authors_checkpoint(path)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_authors_checkpoint(tmp_path / "nothing.pt")
