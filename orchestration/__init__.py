"""The science, many times, on machines that fail: grids, sweeps, workers, ledger, tracking."""
