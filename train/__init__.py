"""Reference trainers on real data, installed as the package `sweeper_train`."""
