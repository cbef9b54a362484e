"""Checkpoints of the paper's authors as classifiers of ours: github.com/Khushiyant/helix at commit 65a9517, model.py.

    model, spec = load_authors_checkpoint(Path("checkpoints/raw_fold1_best.pt"))
    model.eval()(wave_BT)

Their RawWaveformMamba and SpectrogramMamba hold the same numbers as ours under almost the same names, and they compute
what ours computes under `protocol.profile("authors")`: mel patches that do not fill up are left out, one mel band
comes after the other, each clip's spectrogram is normalised, the feed-forward network is sized as in their code. The
mel front end is inside our classifier and outside theirs; ours is given waves either way.

No tensor tells the number of heads, the mel bins, how many tokens are pooled, nor, of a model of attention alone, which
Mamba block it was matched to. There the authors' defaults hold, which are ours too, and the caller may say otherwise.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix.models.classifier import Classifier, build_classifier
from helix.protocol import profile
from helix.spec import ModelSpec

#: How a name begins: theirs, ours.
PREFIXES = {
    "patch_embed.": "frontend.patch_embed.",
    "input_norm.": "frontend.input_norm.",
    "layers.": "blocks.",
    "final_norm.": "final_norm.",
    "classifier.": "classifier.",
}

#: Where a checkpoint of their training loop keeps the weights.
WEIGHTS = "model_state_dict"

#: What a model sets of each member, by name.
Options = Mapping[str, Mapping[str, Any]]


def load_authors_checkpoint(
    path: Path, *, pool_tokens: int | None = None, options: Options | None = None
) -> tuple[Classifier, ModelSpec]:
    """The classifier in a file that the authors' train.py wrote, on the CPU, and the spec that it has here.

    `pool_tokens` is their n_pool_tokens; `options` sets what no tensor tells, as in `ModelSpec.options`, for example
    {"attention": {"heads": 8}}. Raises OSError, and ValueError where the file holds anything else than such a model.
    """
    weights = read_authors_checkpoint(path)
    try:
        spec = authors_spec(weights, pool_tokens=pool_tokens, options=options)
        state = from_authors(weights, spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn are all replaced
        model = build_classifier(spec, profile("authors"), classes=len(state["classifier.weight"]))
    model.load_state_dict(state)
    return model, spec


def read_authors_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by the authors' names: a checkpoint of their training loop, or a state dict alone.

    Only tensors and plain values are read, so that no code of the file runs; a file that needs more is a ValueError.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # torch.load would take other files for pickles of its early days
            raise ValueError(f"{path} is damaged or was not written by torch.save, whose files are zip archives")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of tensors and plain values, and reading anything else could run code that it brings; "
            f"where it is trusted, load it there and write one with torch.save(model.state_dict(), ...)"
        ) from error
    except (EOFError, LookupError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or was not written by torch.save: {error}") from error
    weights = held.get(WEIGHTS, held) if isinstance(held, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path} holds no state dict; wanted tensors by name, as they are or under {WEIGHTS!r}")
    return {str(name): tensor for name, tensor in weights.items()}


def authors_spec(
    weights: Mapping[str, Tensor], *, pool_tokens: int | None = None, options: Options | None = None
) -> ModelSpec:
    """The spec of a model, from the names and shapes of its weights. ValueError where they are not such a model's."""
    kernel = _tensor(weights, "patch_embed.weight", dimensions=(3, 4))
    width, size = len(kernel), kernel.shape[-1]
    found: dict[str, dict[str, Any]]
    if kernel.ndim == 3:
        frontend, found = "raw", {"raw": {"samples_per_token": size}}
    else:
        frontend, found = "mel", {"mel": {"patch": size}}
    numbers = sorted({int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.", name))})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"the weights are of layers {numbers}; wanted layers 0, 1, 2 and so on without a gap")
    pattern = tuple(
        "attention" if any(name.startswith(f"layers.{number}.attn.") for name in weights) else "mamba"
        for number in numbers
    )
    if "mamba" in pattern:
        layer = f"layers.{pattern.index('mamba')}.mamba_forward"
        inner, state = _tensor(weights, f"{layer}.A_log", dimensions=(2,)).shape
        taps = _tensor(weights, f"{layer}.conv1d.weight", dimensions=(3,)).shape[-1]
        found["mamba"] = {"d_state": state, "d_conv": taps, "expand": inner // width}
    for name, given in (options or {}).items():
        found[name] = {**found.get(name, {}), **given}
    return ModelSpec(frontend=frontend, pattern=pattern, width=width, pool_tokens=pool_tokens, options=found)


def from_authors(weights: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The state dict of our classifier of that spec, float32: every tensor of theirs is in it, and none is missing.

    Raises ValueError with all that does not fit, in the authors' names: missing, unexpected, of another shape.
    """
    classes = len(_tensor(weights, "classifier.weight", dimensions=(2,)))
    with torch.device("meta"):
        wanted = build_classifier(spec, profile("authors"), classes=classes).state_dict()
    theirs = {_their_name(name): tensor.shape for name, tensor in wanted.items()}
    problems = [f"{name} is missing" for name in theirs if name not in weights]
    problems += [f"{name} is not expected" for name in weights if name not in theirs]
    for name, shape in theirs.items():
        given = weights.get(name)
        if given is None:
            continue
        if given.shape != shape:
            problems.append(f"{name} has shape {tuple(given.shape)}, wanted {tuple(shape)}")
        elif not given.is_floating_point():
            problems.append(f"{name} holds {given.dtype}, wanted floating-point numbers")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(
            f"the weights are not those of a model of width {spec.width} with {' '.join(spec.pattern)} on "
            f"{spec.frontend} and options {spec.options}: {shown}. What no tensor tells can be given as options, for "
            f"example {{'mamba': {{'d_state': 32}}}} for the Mamba block that attention was matched to"
        )
    return {name: weights[_their_name(name)].float() for name in wanted}


def _their_name(name: str) -> str:
    for theirs, ours in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"our classifier has a tensor {name}, which theirs could not have")


def _tensor(weights: Mapping[str, Tensor], name: str, *, dimensions: tuple[int, ...]) -> Tensor:
    if name not in weights:
        raise ValueError(
            f"there is no {name}, which every model of the authors has; the first names are {[*weights][:5]}"
        )
    if weights[name].ndim not in dimensions or 0 in weights[name].shape:
        wanted = " or ".join(map(str, dimensions))
        raise ValueError(f"{name} has shape {tuple(weights[name].shape)}; wanted {wanted} dimensions, none of them 0")
    return weights[name]
