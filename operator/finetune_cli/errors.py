"""What a command says when it cannot do what it is asked: exit status 2."""


class CliError(Exception):
    """The message says why, and what to do."""
