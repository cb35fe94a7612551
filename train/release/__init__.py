"""`python -m train.release RUN_DIR --out DIR`: makes a finished run's model releasable, and proves that it loads."""
