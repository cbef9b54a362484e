"""The checks of `helix doctor`, one file for each part of what a sweep stands on."""
