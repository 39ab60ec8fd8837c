"""Several processes, one for each GPU, that compute one run together: what a launcher may set, and who does what."""
