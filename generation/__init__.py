"""What `generate.py` factors out: its flags, the labels, the file of samples, the pictures."""
