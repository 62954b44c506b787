"""Launchers start workers and show progress; they own nothing a sweep needs to survive."""
