"""How operator, command and trainer say the same thing to people."""


def say_ranks(count: int) -> str:
    """A number of ranks, such as `1 rank` and `2 ranks`."""
    return "1 rank" if count == 1 else f"{count} ranks"
