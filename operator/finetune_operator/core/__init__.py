"""What to do about a job: pure functions over frozen values. No clock, environment, logging, randomness or network."""
