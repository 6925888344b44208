"""Our training against PyTorch's, in turns: `python -m jaxnorm.bench`."""
