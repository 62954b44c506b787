"""Run directories copied into an object store after each commit, and found again by another machine."""
