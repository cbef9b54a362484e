"""A classifier from its spec: frontend, blocks, LayerNorm, mean over tokens, linear head; and what it costs.

Legend: B batch, T samples, L tokens, D width, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helix.models.block import Layer, count, natural_size
from helix.models.frontend import Frontend, Tokenizer
from helix.protocol import Protocol
from helix.registry import BLOCKS, FRONTENDS
from helix.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model costs. FLOPs count the matrix products and the scans; a backward pass is two forward passes."""

    parameters: int
    tokens: int
    forward_flops_per_clip: int
    training_flops_per_clip: int


class Classifier(nn.Module):
    """logits(features(wave)): the two stages are apart because mixup may act between them.

    `recompute` keeps of every block its input alone and runs it again in the backward: less memory, a third more work,
    the same numbers.
    """

    recompute = False

    def __init__(
        self,
        frontend: Tokenizer,
        blocks: list[Layer],
        *,
        width: int,
        classes: int,
        pool: str,
        pool_tokens: int | None,
        protocol: Protocol,
    ):
        super().__init__()
        self.frontend = frontend
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        self.pool, self.pool_tokens = pool, pool_tokens
        self.positions, self.masked = protocol.pos == "sinusoidal", protocol.pad_mask == "clip"

    def forward(self, wave_BT: Tensor, samples_B: Tensor | None = None) -> Tensor:
        return self.logits(self.features(wave_BT), samples_B)

    def features(self, wave_BT: Tensor) -> Tensor:
        """What the frontend computes without parameters, each clip for itself."""
        return self.frontend.features(wave_BT)

    def logits(self, features: Tensor, samples_B: Tensor | None = None) -> Tensor:
        """Logits [B, C] from `features`.

        Under `protocol.pad_mask = clip` what follows the first samples_B samples of a clip is padding, and no token
        without any of them counts; without it, or without `samples_B`, all tokens do.
        """
        x_BLD = self.frontend.embed(features)
        if self.positions:
            x_BLD = x_BLD + sinusoids(*x_BLD.shape[1:], device=x_BLD.device).to(x_BLD.dtype)
        mask_BL = None
        if self.masked and samples_B is not None:
            mask_BL = self.frontend.sounding(samples_B.to(x_BLD.device), x_BLD.shape[1])
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # No block draws random numbers, so there is no generator to keep.
                x_BLD = checkpoint(block, x_BLD, mask_BL, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLD = block(x_BLD, mask_BL)
        return self.classifier(self._pooled(x_BLD, mask_BL))

    def _pooled(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """The mean [B, D] of the normalised tokens, of the first or last `pool_tokens` that count where that is set."""
        tokens = x_BLD.shape[1]
        _check_pooling(self.pool_tokens, tokens)
        if mask_BL is None:
            first = tokens - self.pool_tokens if self.pool_tokens and self.pool == "last" else 0
            last = first + (self.pool_tokens or tokens)
            return self.final_norm(x_BLD[:, first:last]).mean(dim=1)
        if self.pool_tokens is not None:
            number_BL = mask_BL.cumsum(dim=1)
            if self.pool == "last":
                number_BL = number_BL[:, -1:] + 1 - number_BL
            mask_BL = mask_BL & (number_BL <= self.pool_tokens)
        share_BL1 = mask_BL[:, :, None] / mask_BL.sum(dim=1)[:, None, None]
        return (self.final_norm(x_BLD) * share_BL1.to(x_BLD.dtype)).sum(dim=1)


def sinusoids(tokens: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Positions [L, D]: sines in the even channels, cosines in the odd ones. Vaswani et al. 2017, section 3.5."""
    place_L1 = torch.arange(tokens, device=device, dtype=torch.float32)[:, None]
    channel_D = torch.arange(width, device=device)
    angle_LD = place_L1 * 10_000.0 ** (-(channel_D - channel_D % 2) / width)
    return torch.where(channel_D % 2 == 0, angle_LD.sin(), angle_LD.cos())


def build_classifier(model: ModelSpec, protocol: Protocol, *, classes: int) -> Classifier:
    """The classifier, its weights drawn from torch's global generator.

    Every block is sized to the parameter count of the block `model.reference` at its natural size. Raises ValueError
    where the spec names an unknown member or option, or shapes that do not fit together.
    """
    if classes < 1:
        raise ValueError(f"classes is {classes}; wanted 1 or more")
    frontend: Frontend = FRONTENDS.make(model.frontend, model.options.get(model.frontend))
    parameters = natural_size(model.reference, model.options.get(model.reference), width=model.width, protocol=protocol)
    members = [BLOCKS.make(name, model.options.get(name)) for name in model.pattern]
    return Classifier(
        frontend.build(width=model.width, protocol=protocol),
        [member.build(width=model.width, parameters=parameters, protocol=protocol) for member in members],
        width=model.width,
        classes=classes,
        pool=model.pool,
        pool_tokens=model.pool_tokens,
        protocol=protocol,
    )


def count_parameters(model: ModelSpec, protocol: Protocol, *, classes: int) -> int:
    """The exact number of parameters; nothing is allocated and nothing random is drawn."""
    with torch.device("meta"):
        return count(build_classifier(model, protocol, classes=classes))


def cost(model: ModelSpec, protocol: Protocol, *, classes: int, samples: int) -> Cost:
    """What a model costs for clips of so many samples. ValueError where such a clip is too short for it."""
    frontend: Frontend = FRONTENDS.make(model.frontend, model.options.get(model.frontend))
    tokens = frontend.tokens(samples, protocol=protocol)
    _check_pooling(model.pool_tokens, tokens)
    with torch.device("meta"):
        classifier = build_classifier(model, protocol, classes=classes)
    layers = [module for module in classifier.modules() if isinstance(module, Layer)]
    head = 2 * model.width * classes
    flops = classifier.frontend.flops(samples) + sum(layer.flops(tokens) for layer in layers) + head
    return Cost(
        parameters=count(classifier),
        tokens=tokens,
        forward_flops_per_clip=flops,
        training_flops_per_clip=3 * flops,
    )


def decay_exempt(module: nn.Module) -> set[str]:
    """The parameters that `protocol.decay = mamba_groups` does not decay: biases, norms, and marked ones (A_log, D)."""
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
    }


def _check_pooling(pool_tokens: int | None, tokens: int) -> None:
    if pool_tokens is not None and pool_tokens > tokens:
        raise ValueError(f"model.pool_tokens is {pool_tokens}, but the clip has only {tokens} tokens")
