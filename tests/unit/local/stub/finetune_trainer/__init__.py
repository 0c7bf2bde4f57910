"""Stands for the trainer where only the processes around it are tested."""
