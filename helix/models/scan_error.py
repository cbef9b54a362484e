"""The error of a scan that is installed and cannot run on this machine. Needs no torch."""


class UnusableScanError(Exception):
    """A backend that is installed lacks something of this machine. Another would be slower, and hold more memory than
    was predicted, so none is taken in its place. No RuntimeError: as such it would be taken for a kernel's."""

    def __init__(self, backend: str, found: str, advice: str):
        super().__init__(backend, found, advice)
        self.backend, self.found, self.advice = backend, found, advice

    def __str__(self) -> str:
        return f"the scan {self.backend!r} cannot run on this machine: {self.found}; {self.advice}"
