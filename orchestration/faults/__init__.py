"""The faults that `python -m orchestration.chaos` causes, by what they strike; a function each."""
