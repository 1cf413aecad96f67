"""From images to training data: run the modules with `python -m preprocessing.<name>`."""
