"""A process that is to give the same bits again, also on a GPU."""

import os

import torch


def ask_for_the_same_bits() -> None:
    """From here on this process takes deterministic kernels only, and an operation that has none raises RuntimeError.

    Before CUDA starts: cuBLAS reads where its sums go once. The scan asks torch whether this was called.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Torch would fill all new memory too, for those who read what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
