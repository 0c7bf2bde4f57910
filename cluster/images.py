"""stub"""

from cluster.settings import Settings


def build(settings: Settings, target: str, build_args: list[str]) -> str:
    raise NotImplementedError


def load(settings: Settings, reference: str) -> None:
    raise NotImplementedError
