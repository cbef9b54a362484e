"""The data sets, one file each; dropping in a file adds one."""
