"""torch.distributed only: every function takes its group and works with one rank."""
