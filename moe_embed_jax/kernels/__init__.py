"""Every Pallas kernel, and the products that run on a TPU's matrix units."""
