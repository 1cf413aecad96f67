"""Everything that turns images into training data: run its modules with `python -m preprocessing.<name>`."""
