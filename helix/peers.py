"""Selective scans that others wrote, under our argument names, imported where they are installed; none is copied.

- mamba-ssm's `selective_scan_ref`, the reference of Mamba's authors. Its module imports CUDA code, for other functions;
  stand-ins for that while it is loaded make the source alone enough, without a GPU and without a build.
- Hugging Face transformers' `mamba_selective_scan`: the loop that its Mamba takes without kernels.
- mambapy's parallel scan.

All take forward scans only: a reversed one flips the tokens. Legend: B batch, L tokens, E channels, N state.
"""

import importlib
import importlib.util
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Scan = Callable[..., Tensor]

#: The file of mamba-ssm with the reference, inside its package.
INTERFACE = "ops/selective_scan_interface.py"

#: What that file imports and the reference does not call, with the names that are imported from it.
STAND_INS = {
    "mamba_ssm": (),
    "mamba_ssm.utils": (),
    "mamba_ssm.utils.torch": ("custom_bwd", "custom_fwd"),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.layer_norm": ("_layer_norm_fwd",),
    "selective_scan_cuda": (),
    "causal_conv1d": ("causal_conv1d_fn",),
    "causal_conv1d.cpp_functions": (
        *("causal_conv1d_fwd_function", "causal_conv1d_bwd_function"),
        "causal_conv1d_update_function",
    ),
    "einops": ("rearrange", "repeat"),
}


class MissingPeerError(Exception):
    """A peer is not here; says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One implementation. `load` returns a function with the arguments of `selective_scan_sequential`.

    Beyond `forward_tokens` and `training_tokens` it is not run, because of `limit`.
    """

    name: str
    load: Callable[[], Scan]
    forward_tokens: int
    training_tokens: int
    limit: str


def peers(mamba_ssm: str) -> list[Peer]:
    """All of them. `mamba_ssm` is a folder with the unpacked source of mamba-ssm or its .tar.gz, or "" for neither."""
    loop = (
        "materialises (B, E, L, N), of which each token's slice then gets a zero gradient of full size: quadratic in L"
    )
    return [
        Peer(
            name="mamba-ssm selective_scan_ref",
            load=lambda: load_mamba_ssm_reference(mamba_ssm),
            forward_tokens=3000,
            training_tokens=500,
            limit=loop,
        ),
        Peer(name="transformers loop", load=load_transformers, forward_tokens=3000, training_tokens=500, limit=loop),
        Peer(
            name="mambapy pscan",
            load=load_mambapy,
            forward_tokens=3000,
            training_tokens=3000,
            limit="materialises (B, L, E, N) several times: ten times the memory of 3,000 tokens, about 20 GB",
        ),
    ]


def load_mambapy() -> Scan:
    try:
        block = importlib.import_module("mambapy.mamba").MambaBlock
    except ImportError as error:
        raise MissingPeerError(f"pip install -c constraints.txt mambapy ({error})") from error

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        # The method uses nothing of its block.
        return block.selective_scan(None, u, nn.functional.softplus(dt + bias), A, B, C, D) * nn.functional.silu(z)

    return _both_ways(scan)


def load_transformers() -> Scan:
    try:
        loop = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    except (ImportError, AttributeError) as error:
        raise MissingPeerError(f"pip install -c constraints.txt transformers ({error})") from error
    return _both_ways(_channels_first(loop))


def load_mamba_ssm_reference(folder: str) -> Scan:
    """From the folder, or from where mamba-ssm is installed. Raises MissingPeerError, also for a folder without it."""
    source, place = _interface_source(folder)
    module = ModuleType("selective_scan_interface")
    with _stand_ins():
        exec(compile(source, place, "exec"), module.__dict__)
    return _both_ways(_channels_first(module.selective_scan_ref))


def _interface_source(folder: str) -> tuple[str, str]:
    """The text of INTERFACE and the place that it is from."""
    if not folder:
        spec = importlib.util.find_spec("mamba_ssm")
        for place in (spec.submodule_search_locations or []) if spec else []:
            path = Path(place, INTERFACE)
            if path.is_file():
                return path.read_text(encoding="utf-8"), str(path)
    else:
        root = Path(folder).expanduser()
        for path in sorted(root.rglob(INTERFACE)):
            return path.read_text(encoding="utf-8"), str(path)
        for path in sorted(root.glob("mamba_ssm*.tar.gz")):
            with tarfile.open(path) as archive:
                for name in archive.getnames():
                    file = archive.extractfile(name) if name.endswith(f"mamba_ssm/{INTERFACE}") else None
                    if file is not None:
                        return file.read().decode(), f"{path}:{name}"
    raise MissingPeerError(
        f"{f'{folder} does not hold it; ' if folder else ''}MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps "
        "--no-binary :all: --no-build-isolation -d peers mamba-ssm, then mamba_ssm=peers"
    )


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules that have the names that INTERFACE imports, for as long as it is loaded."""
    before = {name: sys.modules.get(name) for name in STAND_INS}
    for name, wanted in STAND_INS.items():
        module = ModuleType(name)
        for attribute in wanted:
            setattr(module, attribute, _rearrange if attribute == "rearrange" else _not_needed)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _rearrange(x: Tensor, pattern: str) -> Tensor:
    """The one pattern of einops that the reference asks for when B and C have three dimensions."""
    if pattern != "d -> d 1":
        raise NotImplementedError(f"the reference of this mamba-ssm wants einops for {pattern!r}")
    return x[:, None]


def _not_needed(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator that changes nothing; as anything else it is not called."""
    return function


def _channels_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scan with the layout and the arguments of mamba-ssm's."""

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        return function(u.mT, dt.mT, A, B.mT, C.mT, D=D, z=z.mT, delta_bias=bias, delta_softplus=True).mT

    return scan


def _both_ways(scan: Callable[..., Tensor]) -> Scan:
    """A forward scan under our names, with `reverse` by flipping."""

    def both(
        u_BLE: Tensor,
        dt_BLE: Tensor,
        A_EN: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D_E: Tensor,
        z_BLE: Tensor,
        *,
        dt_bias_E: Tensor,
        reverse: bool = False,
    ) -> Tensor:
        along = [u_BLE, dt_BLE, B_BLN, C_BLN, z_BLE]
        u, dt, B, C, z = (x.flip(1) if reverse else x for x in along)
        y_BLE = scan(u, dt, A_EN, B, C, D_E, z, dt_bias_E)
        return torch.flip(y_BLE, (1,)) if reverse else y_BLE

    return both
