"""Choose after training how much of an adapter's update stays: shrink it, measure task loss and KL, save the result."""
