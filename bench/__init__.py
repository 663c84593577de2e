"""Measurements. Figures in the documentation come from files under `bench/results` and from nowhere else."""
