"""What a user does: train, evaluate, predict, export, plan; the modules that see every layer."""
