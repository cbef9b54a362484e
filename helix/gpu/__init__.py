"""The parts of `helix bench gpu`: clocks of a device, what each section measures, the device's limits."""
