"""Which attention backends of torch run here and are right: against the float64 softmax, with gradients."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from helix.doctor import Asked, Check
from helix.errors import first_line
from helix.models.agreement import ATTENTION_NAMES, attention_inputs, explicit_attention, relative_errors, run
from helix.registry import CHECKS

#: The relative error, in the Euclidean norm, that an output or a gradient may have.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

#: batch, heads, tokens, channels of a head: tokens that fill no tile of any kernel.
RAGGED = (2, 4, 517, 64)

WRONG = (
    "the numbers are wrong: choose another one around the training with torch.nn.attention.sdpa_kernel, or train with "
    "protocol.attn_impl=weights, and report this with the rows of `helix doctor --json`"
)


@CHECKS.register("attention")
def attention(_: Asked) -> Iterable[Check]:
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        yield judge(f"attention on {device}: choice", chosen, device, torch.float32)
        for name, backend in named_backends().items():
            yield best_dtype(f"attention {name} on {device}", forced(backend), device)
        yield judge_determinism(device)


def named_backends() -> dict[str, SDPBackend]:
    """The backends that this torch has a name for."""
    names = {
        "math": "MATH",
        "flash": "FLASH_ATTENTION",
        "mem-efficient": "EFFICIENT_ATTENTION",
        "cudnn": "CUDNN_ATTENTION",
    }
    return {name: getattr(SDPBackend, known) for name, known in names.items() if hasattr(SDPBackend, known)}


def chosen(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """The attention of the models: torch chooses."""
    return nn.functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)


def forced(backend: SDPBackend) -> Callable[..., Tensor]:
    """Attention by one backend, which raises where it cannot."""

    def attend(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return chosen(*tensors)

    return attend


def best_dtype(name: str, attend: Callable[..., Tensor], device: str) -> Check:
    """float32 or, where the backend has none, the first narrower dtype that it runs in."""
    for dtype in BOUNDS:
        check = judge(name, attend, device, dtype)
        if check.status != "absent":
            return check
    return Check(
        name=name, status="absent", found="torch has none for this device", advice="nothing: torch takes another"
    )


def judge(name: str, attend: Callable[..., Tensor], device: str, dtype: torch.dtype) -> Check:
    """One attention in one dtype; `absent` where torch says that it has no such kernel."""
    needed = name == "attention on cpu: choice"
    inputs = [x.to(dtype) for x in attention_inputs(*RAGGED)]
    try:
        given = run(attend, inputs, dtype=dtype, device=device)
    except RuntimeError as error:
        said = first_line(error)
        if not needed and any(word in said.lower() for word in ("no available kernel", "no viable backend")):
            return Check(name=name, status="absent", found=said)
        return Check(name=name, status="fail", found=said, advice=WRONG, needed=needed)
    wanted = run(explicit_attention, inputs, dtype=torch.float64)
    errors = relative_errors(given, wanted, ATTENTION_NAMES)
    worst = max(errors, key=lambda key: errors[key])
    right = errors[worst] <= BOUNDS[dtype]
    return Check(
        name=name,
        status="ok" if right else "fail",
        found=f"{str(dtype).removeprefix('torch.')}: relative error {errors[worst]:.1e} ({worst}), at most "
        f"{BOUNDS[dtype]:.0e} is right",
        advice="" if right else WRONG,
        needed=needed,
    )


def judge_determinism(device: str) -> Check:
    inputs = attention_inputs(*RAGGED)
    first, second = (run(chosen, inputs, dtype=torch.float32, device=device) for _ in range(2))
    name = f"attention on {device}: same bits again"
    different = [key for key, a, b in zip(ATTENTION_NAMES, first, second, strict=True) if not torch.equal(a, b)]
    if not different:
        return Check(name=name, status="ok", found="equal: a second run")
    advice = (
        "a trial that is killed and resumed will not end with the same bits; protocol.attn_impl=weights may be slower"
    )
    return Check(name=name, status="warn", found=f"different: {', '.join(different)}", advice=advice)
