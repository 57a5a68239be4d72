"""What help() shows: every loss says the shapes that it takes and what its options mean."""
import inspect
import pydoc

import pytest

import relkd.losses
from relkd.distributed import Gathered
from relkd.docs import described
from relkd.features import Features

CLASSES = [*(getattr(relkd.losses, name) for name in relkd.losses.__all__), Features, Gathered]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_shows_what_stands_beside_the_parameters(cls):
    """The fault: from an installed wheel neither help() nor ? showed a shape."""
    said = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    assert inspect.getdoc(cls) == cls.__doc__ and "returns: " in cls.__doc__ and cls.__doc__.splitlines()[0] in said
    for name, function in (("made with", cls.__init__), ("forward", cls.forward)):
        for parameter in list(inspect.signature(function).parameters)[1:]:
            assert f"{parameter}: " in cls.__doc__ or name == "made with" and cls is Gathered, (cls, parameter)


@described
class Two:
    """A class of its own.
    In two lines."""
    def __init__(self,
        a,      # what a is
        b=(1,   # in the middle
           2),  # what b is
        *more,  # others
    ):
        def inner(x): # not a parameter
            return x

    def forward(self, x, y:dict[str, int]={"a": 1}, z=3): # in one line
        "Nothing."


def test_forms_of_signatures():
    assert Two.__doc__ == ("A class of its own.\nIn two lines.\n\nmade with:\n    a: what a is\n    b: in the middle\n    *more: others\n\n"
                           "forward:\n    x, y, z: in one line")
    assert Two(1).__doc__ == Two.__doc__


def test_without_a_source_the_docstring_stays():
    space = {}
    exec("class Bare:\n    'One line.'\n    def __init__(self, a): pass # a", space)
    assert described(space["Bare"]).__doc__ == "One line."
    assert described(type("None_", (), {})).__doc__ is None
