"""Chat templates are other people's programs: they run in a sandbox, and end in a sentence where they leave it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_recipe
from tests.security.hostile import edit_json, run

ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by a filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "the environment's": "{{ self._TemplateReference__context.environment.loader.x }}",
    "of the loop": "{% for a in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "of a namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__init__.__globals__.os }}",
    "import": "{% import 'os' as os %}{{ os.mkdir('MARK') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '../../secret.jinja' %}",
    "changes of what it is given": "{{ messages.append({}) }}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "no end of calls": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "no Jinja": "{% for %}",
    "division": "{{ 1 / 0 }}",
}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_template_of_the_recipe_does_not_leave_the_sandbox(
    template: str, recipe_file: Path, tmp_path: Path, mark: Path, capfd
) -> None:
    (tmp_path / "t.jinja").write_text(template.replace("MARK", str(mark)))
    assert run("preview", recipe_file, "data.chat_template=t.jinja") == 2
    said = capfd.readouterr().err
    assert f"the chat template {tmp_path / 't.jinja'}" in said and "root:" not in said and "Traceback" not in said
    assert not mark.exists()


@pytest.mark.parametrize("name", ["classes", "no end of calls", "include"])
def test_neither_does_a_models_own(name: str, tiny_folder: Path, tmp_path: Path, capfd) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(ESCAPES[name])
    recipe = write_recipe(tmp_path, model)
    assert run("train", recipe) == 2
    assert "the model's chat template" in capfd.readouterr().err and not (tmp_path / "run").exists()
    assert run("chat", model, "--prompt", "hi") == 2
    assert "the chat template of" in capfd.readouterr().err
    for row in ("train", "heldout"):  # of plain text, so that the template is first used for the text of the base's own
        path = tmp_path / f"{row}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{n} and more of it"}) + "\n" for n in range(9)))
    assert run("train", recipe, "evaluation.metric=none") == 2
    assert "this model's chat template fails" in capfd.readouterr().err


def test_a_template_in_json_is_one_too(tiny_folder: Path, tmp_path: Path, capfd) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    edit_json(model / "tokenizer_config.json", chat_template=ESCAPES["classes"])
    assert run("preview", write_recipe(tmp_path, model)) == 2
    assert "the model's chat template fails" in capfd.readouterr().err


def test_an_adapters_is_one_too(tiny_folder: Path, tiny_adapter: Path, tmp_path: Path, capfd) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    (adapter / "chat_template.jinja").write_text(ESCAPES["classes"])
    assert run("chat", adapter, "--prompt", "hi") == 2
    assert "the chat template of" in capfd.readouterr().err
