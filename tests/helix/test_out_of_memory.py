"""Who runs out of memory says so in many ways, and other trouble says something else."""

import pickle

import numpy as np
import pytest
import torch

from helix.out_of_memory import is_out_of_memory

RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the docs."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("NCCL error: unhandled cuda error: Cuda failure 'out of memory'"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]

OTHER = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    ValueError("1,000,000 tokens would run out of memory; ask for fewer"),
    OSError(12, "Cannot allocate memory"),
    KeyError("out of memory"),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}")
def test_running_out_of_memory_is_known_in_every_way_it_is_said(error: Exception):
    assert is_out_of_memory(error)


def test_it_is_known_where_numpy_and_torch_meet_it():
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**60, dtype=np.uint8)
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(numpys.value) and is_out_of_memory(torchs.value)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}")
def test_other_trouble_is_not_taken_for_it(error: Exception):
    assert not is_out_of_memory(error)


def test_an_error_of_another_process_is_known_by_its_class():
    class OutOfMemoryError(Exception):
        """As Ray calls its own."""

    assert is_out_of_memory(OutOfMemoryError("a worker was killed"))
    assert is_out_of_memory(pickle.loads(pickle.dumps(MemoryError("no more"))))
