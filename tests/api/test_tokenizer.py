from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.model.small_tokenizers import DEMO_FOLDER, add_bos, byte_fallback, byte_level, write_folder

from disagg.api.text.template import ChatTemplate, TemplateError
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.engine.model.weights import ModelRefused

BOS = 2  # of the byte-level tokenizer
WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
WITHOUT_BOS = WITH_BOS.removeprefix("{{ bos_token }}")
USER = [{"role": "user", "content": "hello"}]


def chat_ids(folder: Path, *, add_special_tokens: bool = False) -> tuple[int, ...]:
    tokenizer = ModelTokenizer.load(folder)
    assert tokenizer.template is not None
    return tokenizer.encode_chat(tokenizer.template.render(USER), add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("add_special_tokens", [False, True])
@pytest.mark.parametrize("template", [WITH_BOS, WITHOUT_BOS])
def test_a_chat_has_one_bos_whether_template_tokenizer_or_both_add_it(
    tmp_path: Path, template: str, add_special_tokens: bool
) -> None:
    config = {"bos_token": "<bos>", "chat_template": template}
    ids = chat_ids(
        write_folder(tmp_path, add_bos(byte_level(), "<bos>"), config=config), add_special_tokens=add_special_tokens
    )
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


def test_a_chat_has_the_templates_bos_when_the_tokenizer_adds_none(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<bos>"}, "chat_template": WITH_BOS}
    assert chat_ids(write_folder(tmp_path, byte_level(), config=config)).count(BOS) == 1


def test_a_model_without_a_bos_of_its_own_gets_none(tmp_path: Path) -> None:
    config = {"bos_token": "<bos>", "chat_template": WITHOUT_BOS}
    assert BOS not in chat_ids(write_folder(tmp_path, byte_level(), config=config))


@pytest.mark.parametrize("explicit", [True, False])
def test_the_configs_own_word_on_bos_overrides_the_post_processor(tmp_path: Path, explicit: bool) -> None:
    config = {"bos_token": "<bos>", "add_bos_token": explicit}
    tokenizer = ModelTokenizer.load(write_folder(tmp_path, add_bos(byte_level(), "<bos>"), config=config))
    assert tokenizer.encode("hello", add_special_tokens=True).count(BOS) == int(explicit)


def test_prompts_get_special_tokens_only_if_asked(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, add_bos(byte_fallback(), "<s>"), config={"bos_token": "<s>"})
    tokenizer = ModelTokenizer.load(folder)
    with_bos = tokenizer.encode("hello", add_special_tokens=True)
    assert with_bos == (1, *tokenizer.encode("hello", add_special_tokens=False))


@pytest.mark.parametrize("form", ["jinja file", "string", "list", "processor file"])
def test_the_template_is_found_wherever_the_hub_ships_it(tmp_path: Path, form: str) -> None:
    config: dict[str, object] = {"bos_token": "<bos>"}
    files = {}
    if form == "jinja file":
        config["chat_template"] = "not this one"
        files["chat_template.jinja"] = WITH_BOS
    elif form == "processor file":
        files["chat_template.json"] = json.dumps({"chat_template": WITH_BOS})
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": WITH_BOS}]
        config["chat_template"] = WITH_BOS if form == "string" else named
    template = ModelTokenizer.load(write_folder(tmp_path, byte_level(), config=config, files=files)).template
    assert template is not None
    assert template.render(USER) == "<bos>[user]hello"


def test_the_bundled_model_loads_with_its_template() -> None:
    tokenizer = ModelTokenizer.load(DEMO_FOLDER)
    assert tokenizer.vocab_size == 2048
    assert tokenizer.template is not None
    ids = tokenizer.encode_chat(tokenizer.template.render(USER))
    assert (ids[0], ids.count(BOS)) == (BOS, 1)


def test_templates_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = (
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}<{{ m.role }}> {{ m.content | trim }}{% endgeneration %} {{ {'ü<': m.content} | tojson }}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}"
    )
    config = {"bos_token": "<bos>", "chat_template": source, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_folder(tmp_path, byte_level(), config=config)
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": " <héllo> "}]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, extra="!")
    template = ModelTokenizer.load(folder).template
    assert template is not None
    assert template.render(messages, arguments={"extra": "!"}) == expected


def test_text_parts_are_joined_for_templates_that_know_only_strings() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    strings = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    parts = ChatTemplate("{% for m in messages %}{% for p in m['content'] %}<{{ p.text }}>{% endfor %}{% endfor %}", {})
    assert strings.render([message]) == "a\nb"
    assert parts.render([message]) == "<a><b>"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages + 1 }}", "list"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_what_a_template_refuses_it_refuses_in_its_own_words(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        ChatTemplate(source, {}).render(USER)


def test_a_template_that_is_none_is_refused_at_the_start() -> None:
    with pytest.raises(ModelRefused, match="line 1"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_usable_tokenizer_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text("{}")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelRefused, match=r"tokenizer\.json"):
        ModelTokenizer.load(tmp_path)
