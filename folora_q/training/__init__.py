"""The Trainer: fault tolerance, checkpoints, resume, step guards, schedules, packing."""
