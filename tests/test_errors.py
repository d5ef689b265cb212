"""The error tree: one base, and what each error carries for the layers above."""

from __future__ import annotations

import pickle

import pytest

from serve import errors
from serve.errors import InvalidInput, ModelNotFound, NotReady, Overloaded, RoundhouseError

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def test_every_error_is_drawn_in_the_docstring_and_has_the_one_base():
    assert len(ALL) >= 14
    for kind in ALL:
        assert issubclass(kind, RoundhouseError)
        assert kind.__name__ in (errors.__doc__ or ""), f"{kind.__name__} is missing from the tree"


def test_the_place_of_a_wrong_input_comes_first():
    error = InvalidInput("is empty", place="inputs[0].data")
    assert (str(error), error.place, error.message) == ("inputs[0].data: is empty", "inputs[0].data", "is empty")
    assert str(InvalidInput("is empty")) == "is empty"


@pytest.mark.parametrize("kind", [errors.UnsupportedParameter, errors.PayloadTooLarge, errors.UnsupportedMedia])
def test_what_a_caller_got_wrong_is_an_invalid_input(kind: type[InvalidInput]):
    assert issubclass(kind, InvalidInput)


def test_a_model_that_is_not_declared_names_the_near_ones():
    assert str(ModelNotFound("minlm", near=["minilm", "mini"])) == (
        "model 'minlm' is not declared; did you mean 'minilm' or 'mini'?"
    )
    assert str(ModelNotFound("x")) == "model 'x' is not declared"
    assert len(str(ModelNotFound("x" * 10**6))) < 200, "what was sent does not come back whole"


def test_errors_that_pass_say_when_to_ask_again():
    assert Overloaded("full", retry_after_s=1.5).retry_after_s == 1.5
    error = NotReady("is loading", phase="loading", retry_after_s=2.0)
    assert (error.phase, error.retry_after_s) == ("loading", 2.0)


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("is empty", place="inputs[0]"),
        ModelNotFound("x", near=["y"]),
        NotReady("is loading", phase="loading", retry_after_s=2.0),
        Overloaded("full", retry_after_s=1.5),
    ],
)
def test_an_error_crosses_to_another_process_unchanged(error: RoundhouseError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
