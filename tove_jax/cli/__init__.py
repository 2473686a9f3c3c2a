"""The `tove` command, one small file a sub-command: they parse and call, nothing else."""
