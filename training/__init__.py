"""What the loop in `train.py` factors out: its options, its averages, its checkpoints, its records."""
