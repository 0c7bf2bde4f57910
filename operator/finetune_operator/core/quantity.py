"""Kubernetes quantities, as far as they are read here: CPUs."""

from decimal import Decimal, InvalidOperation

_SUFFIXES = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(1000)}


def cpus(quantity: str | int) -> Decimal | None:
    """The number of CPUs that a quantity such as `4` or `1500m` stands for; None if it is none."""
    text = str(quantity)
    factor = _SUFFIXES.get(text[-1:], Decimal(1))
    try:
        return Decimal(text[:-1] if text[-1:] in _SUFFIXES else text) * factor
    except InvalidOperation:
        return None
