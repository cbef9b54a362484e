"""The written questions, one file each; dropping in a file adds one."""
