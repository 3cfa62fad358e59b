"""Steps, clocks, files and randomness: mutators, trainers, checkpoints."""
