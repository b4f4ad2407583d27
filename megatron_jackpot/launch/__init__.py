"""Starting a run: on this machine, on a node, through Slurm. No torch and no Megatron, but for the torchrun
child."""
