"""docs/architecture.md lists every module as its docstring says."""

from docs.make_architecture import TARGET, page


def test_the_list_of_modules_is_up_to_date() -> None:
    current = TARGET.read_text("utf-8")
    assert page(current) == current, "run docs/make_architecture.py"
