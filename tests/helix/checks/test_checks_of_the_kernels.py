"""A kernel that returns wrong numbers, that raises or that is never twice the same is found and named."""

import pytest
import torch
from torch import Tensor, nn

from helix.checks import attention, scan
from helix.doctor import Asked, Check
from helix.models.agreement import (
    conv_inputs,
    explicit_attention,
    explicit_conv_silu,
    relative_errors,
    run,
    scan_inputs,
    scanned,
)
from helix.models.scan import selective_scan


def rows(found) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_the_backends_of_this_machine_pass_their_own_tests():
    found = rows(scan.scan(Asked(storage="runs")))
    assert {
        "scan reference on cpu, float32",
        "scan reference on cpu, float64",
        "conv reference on cpu, float32",
    } <= set(found)
    assert {name for name, check in found.items() if check.status == "fail"} == set()


@pytest.mark.parametrize("off", [1e-4, float("nan")])
def test_a_scan_that_returns_wrong_numbers_fails_with_its_error(off: float, monkeypatch: pytest.MonkeyPatch):
    def wrong(*tensors: Tensor, **options) -> Tensor:
        y_BLE = selective_scan(*tensors, **options)
        return y_BLE * (1 + off) if options["reverse"] else y_BLE

    monkeypatch.setattr(scan, "selective_scan", wrong)
    row = rows(scan.self_tests("reference", "cpu"))["scan reference on cpu, float32"]
    assert row.status == "fail"
    assert row.needed
    assert "wrong" in row.advice
    assert ("1.0e-04" if off == 1e-4 else "inf") in row.found


def test_a_scan_with_one_wrong_gradient_fails_and_the_gradient_is_named(monkeypatch: pytest.MonkeyPatch):
    def wrong(*tensors: Tensor, **options) -> Tensor:
        (*others, D_E, z_BLE) = tensors
        return selective_scan(*others, D_E.detach() + 0.5 * (D_E - D_E.detach()), z_BLE, **options)

    monkeypatch.setattr(scan, "selective_scan", wrong)
    row = rows(scan.self_tests("reference", "cpu"))["scan reference on cpu, float64"]
    assert row.status == "fail"
    assert "5.0e-01 (D)" in row.found


def test_a_convolution_that_looks_the_wrong_way_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        scan, "conv_silu", lambda u, weight, bias, *, reverse: explicit_conv_silu(u, weight, bias, reverse=False)
    )
    assert rows(scan.self_tests("reference", "cpu"))["conv reference on cpu, float32"].status == "fail"


def test_a_kernel_that_raises_fails_with_what_it_said(monkeypatch: pytest.MonkeyPatch):
    def raises(*_: Tensor, **__) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(scan, "selective_scan", raises)
    row = rows(scan.self_tests("reference", "cpu"))["scan reference on cpu, float32"]
    assert row.status == "fail"
    assert "no kernel image" in row.found
    assert "build mamba-ssm" in row.advice


def test_a_scan_that_differs_from_run_to_run_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    calls = iter(range(100))

    def drifting(*tensors: Tensor, **options) -> Tensor:
        return selective_scan(*tensors, **options) + 1e-6 * next(calls)

    monkeypatch.setattr(scan, "selective_scan", drifting)
    row = scan.judge_determinism("cpu")
    assert row.status == "warn"
    assert "a second run (y)" in row.found
    assert "4 threads" in row.found


def test_looking_leaves_threads_and_settings_as_they_were(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HELIX_SCAN", "reference")
    threads = torch.get_num_threads()
    assert scan.judge_choice("cpu").found == "reference, as HELIX_SCAN=reference asks"
    list(scan.scan(Asked(storage="runs")))
    assert torch.get_num_threads() == threads
    assert scan.judge_choice("cpu").found == "reference, as HELIX_SCAN=reference asks"


def test_the_attention_of_this_machine_is_right_and_what_is_not_there_is_absent():
    found = rows(attention.attention(Asked(storage="runs")))
    assert found["attention on cpu: choice"].status == "ok"
    assert found["attention math on cpu"].status == "ok"
    assert found["attention cudnn on cpu"].status == "absent"


def test_an_attention_with_wrong_numbers_fails():
    row = attention.judge(
        "attention on cpu: choice", lambda q, k, v: explicit_attention(q, k, v) * 1.001, "cpu", torch.float32
    )
    assert (row.status, row.needed) == ("fail", True)
    assert "1.0e-03" in row.found


def test_the_wanted_convolution_is_that_of_torch():
    u_BLE, weight_E1K, bias_E = (x.double() for x in conv_inputs(2, 19, 5, 4))
    padded_BEL = nn.functional.pad(u_BLE.mT, (3, 0))
    wanted = nn.functional.silu(nn.functional.conv1d(padded_BEL, weight_E1K, bias_E, groups=5)).mT
    assert torch.allclose(explicit_conv_silu(u_BLE, weight_E1K, bias_E, reverse=False), wanted, atol=1e-14)
    backwards = explicit_conv_silu(u_BLE.flip(1), weight_E1K, bias_E, reverse=True).flip(1)
    assert torch.allclose(backwards, wanted, atol=1e-14)


def test_an_error_is_relative_and_what_is_not_finite_is_infinitely_far():
    wanted = [torch.tensor([3.0, 4.0])]
    assert relative_errors([torch.tensor([3.0, 4.5])], wanted, ("y",)) == {"y": 0.1}
    assert relative_errors([torch.tensor([3.0, float("nan")])], wanted, ("y",)) == {"y": float("inf")}


def test_inputs_are_laid_out_as_in_a_layer_and_the_same_each_time():
    first, again = scan_inputs(1, 9, 4, 2), scan_inputs(1, 9, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not first[0].is_contiguous()
    assert not first[3].is_contiguous()
    assert len(run(scanned(selective_scan), first, dtype=torch.float64)) == 9
