"""Kubernetes quantities, as far as they are read here: CPUs; and sizes of files."""

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


_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def file_size(text: str) -> int:
    """The bytes that a file size such as `5GB` stands for (its form was checked by the model)."""
    number = text.rstrip("KMGiB")
    return int(number) * _BYTES[text[len(number) :]]
