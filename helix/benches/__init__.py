"""The members of BENCHES, one file each."""
