"""A step waits for nothing: neither it nor the loop around it asks the device what a tensor holds."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helix.data.loader import uploaded
from helix.training.trainer import Fit, fit
from orchestration.grid import VARIANTS
from tests.conftest import with_training

#: Operators whose result, or its shape, the host has only once the device has got there.
WAITS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"),
)


class Unwaited(TorchDispatchMode):
    """Fails where an operator would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        waits = name in WAITS
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):  # which counts what a mask holds
            waits = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(args[1]))
        if name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None:
            waits = isinstance(args[-1], Tensor)
        if waits:
            raise RuntimeError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.repeat_interleave(x, torch.arange(4)),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_what_waits_is_noticed(waiting):
    with Unwaited(), pytest.raises(RuntimeError, match="waits for the device"):
        waiting(torch.arange(4.0))


class Uncopied(TorchFunctionMode):
    """Fails where numbers of Python's become a tensor, which a device gets by a copy that waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor):
            raise RuntimeError(f"torch.{func.__name__} makes a copy that waits")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor])
def test_a_copy_that_waits_is_noticed(make):
    with Uncopied(), pytest.raises(RuntimeError, match="makes a copy that waits"):
        make(3.0)


def within(first: int, last: int, *modes: Any) -> Any:
    """An `on_step` that has modes on from after one step to after another."""
    on = ExitStack()

    def on_step(total_step: int) -> None:
        if total_step == first:
            for mode in modes:
                on.enter_context(mode)
        if total_step == last:
            on.close()

    return on_step


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_no_step_of_the_loop_waits(variant, placement, tiny_spec, tiny_data, storage):
    model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4])
    for protocol in (tiny_spec.protocol, replace(tiny_spec.protocol, pad_mask="clip", mixup_on="features")):
        spec = replace(with_training(tiny_spec, epochs=1, batch_size=12), model=model, protocol=protocol)
        fit(
            spec,
            tiny_data,
            Fit(storage=storage, placement=placement, on_step=within(1, 6, Unwaited(), Uncopied()), save_every_s=1e9),
        )


def test_a_column_of_the_host_is_not_copied_on_the_host():
    column = torch.arange(5).numpy()
    there = uploaded(column, "cpu")
    column[0] = 7
    assert there.tolist() == [7, 1, 2, 3, 4]


class Strict:
    """torch's own alarm: while it is on, whatever synchronises with a GPU raises."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_on_a_gpu_no_step_of_the_loop_waits(variant, placement, graphs, tiny_spec, tiny_data, storage):
    """From the fifth step on: the ones before it record a graph and hold replays against steps, which compares."""
    model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4])
    spec = replace(with_training(tiny_spec, epochs=1, batch_size=4), model=model)
    how = {"device": "cuda", "placement": placement, "graphs": graphs, "save_every_s": 1e9}
    fit(spec, tiny_data, Fit(storage=storage, on_step=within(4, 18, Strict()), **how))
