"""What an error looks like that says that memory ran out, of a device or of the machine. Needs no torch.

torch raises OutOfMemoryError only where its own allocator found nothing. What else asks a GPU for memory raises a plain
RuntimeError (a library's handle or workspace, a kernel that is loaded, pinned memory, a collective), and so does torch
where a CPU has no more; Python and NumPy raise MemoryError.
"""

#: In the text of a RuntimeError: of CUDA's runtime and driver, Triton and NCCL; of cuBLAS and cuDNN; of torch on a CPU.
SAID = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the same work in smaller parts may succeed where this was raised."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"}:
        return True
    return "RuntimeError" in names and any(said in str(error) for said in SAID)
