"""Programs that a model wrote, against the tests of a row: processes that can compute and nothing else."""
