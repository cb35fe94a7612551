"""Training: `deepspeed train/run.py RECIPE` turns a recipe into a checkpoint."""
