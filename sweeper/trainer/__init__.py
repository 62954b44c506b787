"""The trainer process: the warm server it is forked from, and the `Run` its training gets."""
