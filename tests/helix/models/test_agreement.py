"""What is right for a scan is the recurrence in float64, or where that takes too long what agrees with it."""

from dataclasses import replace

import pytest
import torch

import helix.models.agreement as agreement
import helix.models.scan as scan
from helix.models.agreement import SCAN_NAMES, exact_scan, relative_errors, scan_inputs


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_right_for_many_tokens_is_what_the_recurrence_says(reverse, monkeypatch):
    inputs = scan_inputs(2, 150, 6, 4)
    slow = exact_scan(inputs, reverse=reverse)
    monkeypatch.setattr(agreement, "SEQUENTIAL_TOKENS", 149)
    fast = exact_scan(inputs, reverse=reverse)
    assert all(x.dtype == torch.float64 for x in fast)
    assert not all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True)), "computed in another order"
    assert max(relative_errors(fast, slow, SCAN_NAMES).values()) < 1e-12


def test_no_scan_that_is_tested_says_itself_what_is_right(monkeypatch):
    def none() -> None:
        raise AssertionError("asked for what is right")

    for name in ("numba", "triton"):
        monkeypatch.setitem(scan.BACKENDS, name, replace(scan.BACKENDS[name], device="cpu", load=none))
        monkeypatch.setenv("HELIX_SCAN", name)
        scan._import.cache_clear()
        monkeypatch.setattr(scan, "_kernels", {})
        for tokens in (agreement.SEQUENTIAL_TOKENS, agreement.SEQUENTIAL_TOKENS + 1):
            exact_scan(scan_inputs(1, tokens, 2, 2))
    scan._import.cache_clear()
