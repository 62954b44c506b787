"""The Hydra configuration that is shipped, installed as the package `sweeper_conf`."""
