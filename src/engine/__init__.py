"""Training of any Method: device, optimiser, schedule, training step, loop, evaluation, checkpoints, logs."""
