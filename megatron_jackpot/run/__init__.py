"""The run folder's contract, for launcher and ranks: what was run, how it is asked to stop, what it is
doing."""
