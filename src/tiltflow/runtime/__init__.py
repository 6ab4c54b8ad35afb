"""What every run needs: processes, checkpoints, tracking and random numbers."""
