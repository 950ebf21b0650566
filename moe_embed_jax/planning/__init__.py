"""What a run needs and how long it takes, from the TPU compiler, before a TPU is rented."""
