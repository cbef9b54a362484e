"""The kernels for CUDA compile for an H100 or H200, which need not be here: Triton brings its own assembler.

What is counted are registers and spills, which decide how fast such kernels are.
"""

import importlib
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

#: The paper's sizes.
SIZES = {"N": 32, "ROWS": 32, "WIDTH": 32, "REVERSE": True}
CONV = {"TAPS": 4, "REVERSE": False}

#: Kernel -> the sizes that it is compiled for, the registers of a lane, and the bytes that it keeps on a stack for
#: want of more, at most.
COMPILED: dict[str, tuple[dict[str, Any], int, int]] = {
    "_walk": ({**SIZES, "ADJOINT": True, "KEEP": False, "STARTED": False}, 128, 0),
    "_walk that keeps": ({**SIZES, "ADJOINT": False, "KEEP": True, "STARTED": True}, 128, 256),
    "_read": (SIZES, 128, 128),
    "_join": ({"ADJOINT": False}, 168, 0),
    "_backward": ({**SIZES, "REVERSE": False}, 255, 0),
    "_backward that is reversed": (SIZES, 255, 0),
    "_conv_forward": (CONV, 64, 0),
    "_conv_backward": (CONV, 168, 0),
}

#: What holds activations; everything else is float32.
ACTIVATIONS = (
    "x_ptr",
    "u_ptr",
    "z_ptr",
    "dt_ptr",
    "BC_ptr",
    "y_ptr",
    "dout_ptr",
    "dy_ptr",
    "du_ptr",
    "dz_ptr",
    "ddt_ptr",
)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return importlib.import_module("helix.models.scan_triton")


def resources(kernels: ModuleType, name: str, dtype: str) -> tuple[int, int]:
    """The registers of a lane and the bytes of its stack."""
    triton = importlib.import_module("triton")
    compiler, backend = (importlib.import_module(f"triton.{part}") for part in ("compiler", "backends.compiler"))
    kernel, sizes = getattr(kernels, name.split(" ")[0]), dict(COMPILED[name][0])
    options = {"num_warps": 1}
    if name.startswith(("_walk", "_read")):
        options["maxnreg"] = kernels.REGISTERS
    if name == "_join":
        sizes |= {"WIDTH": kernels.JOINED, "AHEAD": kernels.AHEAD}
    if name.startswith("_backward"):
        sizes |= {"WIDTH": kernels.PAIRS, "ROWS": kernels.ABREAST}
    if name.startswith("_conv"):
        sizes |= {"WIDTH": kernels.CONV_LANES, "HEIGHT": kernels.CONV_TILE}
        options["num_warps"] = 4
    if name == "_conv_backward":
        sizes["SPAN"] = kernels.CONV_SPAN
    kinds = {
        argument: "constexpr"
        if argument in sizes
        else f"*{dtype if argument in ACTIVATIONS else 'fp32'}"
        if argument.endswith("_ptr")
        else "i32"
        for argument in kernel.arg_names
    }
    made = compiler.compile(
        compiler.ASTSource(kernel, kinds, sizes), target=backend.GPUTarget("cuda", 90, 32), options=options
    )
    file = Path(triton.knobs.cache.dir) / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("name", COMPILED)
def test_a_kernel_for_sm_90_has_registers_enough(kernels, name):
    _, most_registers, most_stack = COMPILED[name]
    registers, stack = resources(kernels, name, "fp32")
    print(f"{name}: {registers} registers, {stack} bytes of stack")  # noqa: T201  (for pytest -rP)
    assert registers <= most_registers
    assert stack <= most_stack


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("_read", "fp16"), ("_backward", "bf16"), ("_backward that is reversed", "bf16"), ("_conv_backward", "bf16")],
)
def test_kernels_compile_for_half_precision_too(kernels, name, dtype):
    _, most_registers, most_stack = COMPILED[name]
    registers, stack = resources(kernels, name, dtype)
    assert registers <= most_registers
    assert stack <= 2 * most_stack
