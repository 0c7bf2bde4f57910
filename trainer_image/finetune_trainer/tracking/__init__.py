"""Where the course of training is shown: one interface, a thread for each tracker, and Weights & Biases and TensorBoard."""
