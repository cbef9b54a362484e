"""CUDA's autocast on a CPU: what it computes in float32, and only then."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from helix.training.autocast import FLOAT32, FLOAT32_RESULT, CudaAutocast

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


def table(name: str) -> set[str]:
    """The functions of a list in torch's header, less the overloads."""
    if not HEADER.is_file():
        pytest.skip("this torch came without its headers")
    entries = re.search(rf"#define {name}\(_\)(.*?)\n\n", HEADER.read_text(), re.DOTALL)
    assert entries is not None
    return set(re.findall(r"_\((\w+)[,)]", entries[1]))


def test_the_tables_are_those_of_torch():
    assert {name for name in table("AT_FORALL_FP32") if "upsample" not in name} == FLOAT32
    assert table("AT_FORALL_FP32_SET_OPT_DTYPE") | {"norm"} == FLOAT32_RESULT


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.softmax(x, dim=-1),
        lambda x: x.softmax(-1),
        lambda x: F.layer_norm(x, (4,), torch.ones(4), torch.zeros(4)),
        lambda x: x.sum(dim=1),
        lambda x: torch.sum(input=x),
        lambda x: x.exp(),
        lambda x: x**2,
        lambda x: 2.0**x,
    ],
)
def test_under_autocast_it_is_in_float32_as_on_cuda(function):
    half = torch.ones(3, 4, dtype=torch.bfloat16)
    without = function(half).dtype
    with torch.autocast("cpu", dtype=torch.bfloat16), CudaAutocast():
        assert function(half).dtype == torch.float32
    with CudaAutocast():
        assert function(half).dtype == without


def test_products_and_a_dtype_that_is_named_stay_as_they_are():
    x = torch.ones(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), CudaAutocast():
        assert (x @ x).dtype == F.linear(x, x).dtype == torch.bfloat16
        assert torch.softmax(x @ x, -1, dtype=torch.float64).dtype == torch.float64
        assert F.gelu(x @ x).dtype == torch.bfloat16
        assert torch.arange(3).sum().dtype == torch.long
    with CudaAutocast():
        assert x.bfloat16().softmax(-1).dtype == torch.bfloat16
