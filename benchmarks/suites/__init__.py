"""What can be measured: suite name -> function(settings) -> jobs. A new family adds its module and a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from ..measure import Job


@dataclass(frozen=True)
class Settings:
    """Sizes shared by the contenders of all suites."""

    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    vocab_size: int = 4096
    lengths: tuple[int, ...] = ()  # empty: the suite's own
    slices: int = 1  # models are built with this part of the depth, and a run of it counts as many tokens less
    dtype: str = "float32"  # of weights and activations, for the suites of DANet


# The encoders of the DANet suites. A row of 16,384 tokens takes the large BERT three minutes: an eighth of its equal layers
# is timed instead.
SIZES = {"30m": Settings(384, 10, 6, 30528), "330m": Settings(1024, 24, 16, 30528, slices=8)}


def _leap_train(settings: Settings) -> list[Job]:
    from .leap import training_jobs

    return training_jobs(settings)


def _leap_decode(settings: Settings) -> list[Job]:
    from .leap import decoding_jobs

    return decoding_jobs(settings)


def _leap_contexts(settings: Settings) -> list[Job]:
    from .leap import context_jobs

    return context_jobs(settings)


def _danet_forward(settings: Settings) -> list[Job]:
    from .danet import jobs

    return jobs(settings, training=False)


def _danet_train(settings: Settings) -> list[Job]:
    from .danet import jobs

    return jobs(settings, training=True)


SUITES: dict[str, Callable[[Settings], list[Job]]] = {
    "leap-train": _leap_train,
    "leap-decode": _leap_decode,
    "leap-contexts": _leap_contexts,
    "danet-forward": _danet_forward,
    "danet-train": _danet_train,
}
