"""Hyperparameter sweeps that survive anything.

Importing this package costs nothing: no torch, wandb, optuna, sqlalchemy, hydra, submitit or
numpy is loaded. The commands are in `sweeper.cli`; what a training script imports is in
`sweeper.torch`.
"""

__version__ = "0.1.0"
