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
    """logits(features(wave)): the two stages are apart because mixup may act between them."""

    def __init__(self, frontend: Tokenizer, blocks: list[Layer], *, width: int, classes: int, pool_tokens: int | None):
        super().__init__()
        self.frontend = frontend
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        self.pool_tokens = pool_tokens
        #: Whether each block keeps only its input for the backward and is computed again there.
        self.recompute = False

    def forward(self, wave_BT: Tensor) -> Tensor:
        return self.logits(self.features(wave_BT))

    def features(self, wave_BT: Tensor) -> Tensor:
        """What the frontend computes without parameters, each clip for itself."""
        return self.frontend.features(wave_BT)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, C] from `features`."""
        x_BLD = self.frontend.embed(features)
        _check_pooling(self.pool_tokens, x_BLD.shape[1])
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator to put back for the second time.
                x_BLD = checkpoint(block, x_BLD, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLD = block(x_BLD)
        return self.classifier(self.final_norm(x_BLD[:, : self.pool_tokens]).mean(dim=1))


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
        pool_tokens=model.pool_tokens,
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
