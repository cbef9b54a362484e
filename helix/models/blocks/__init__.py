"""The blocks, one file each; dropping in a file adds one."""
