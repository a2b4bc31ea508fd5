"""The fixtures of `tests/realign`, for tests of whole programs."""

from tests.realign.conftest import make_reference, model_dir, records

__all__ = ["make_reference", "model_dir", "records"]
