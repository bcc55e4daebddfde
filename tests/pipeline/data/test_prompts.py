"""Prompts with and without a chat template: where the answer begins, where the question is, which tokens count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.ops.activation_stats import COUNTED, IGNORED, SINK
from pipeline.data.prompts import TOKENS, Encoded, Prompter, batches_by_tokens, roles
from pipeline.errors import UserError

QUESTION, ANSWER = "What do you do on a free evening?", "I read a long book alone."
KINDS = ("plain", "bos", "chat", "no-system", "silent")
TEXTS = [
    (QUESTION, ANSWER),
    ("How?", "No"),
    ("Wie geht's, Zoë? 🙂", "🙂 schön, naïve"),
    ("one\ntwo  three?", "1\n2"),
    ("What do you do? What do you do?", "Answer: Question: user assistant"),
]


@pytest.fixture(params=KINDS)
def prompter(request, tokenizers):
    return Prompter(tokenizers[request.param])


def decode(prompter, ids):
    return prompter.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(("question", "answer"), TEXTS)
def test_the_answer_begins_where_its_text_begins(prompter, question, answer):
    encoded = prompter.encode(question, answer)
    lead = "" if prompter.chat else " "
    assert decode(prompter, encoded.ids[encoded.answer :]) == lead + answer
    assert decode(prompter, encoded.ids[: encoded.answer]).removeprefix("<s>") == prompter.prompt(question)


@pytest.mark.parametrize(("question", "answer"), TEXTS)
def test_the_question_span_holds_the_question_and_nothing_else(prompter, question, answer):
    encoded = prompter.encode(question, answer)
    assert decode(prompter, [encoded.ids[i] for i in encoded.question]).strip() == question
    assert encoded.question.stop <= encoded.answer


@pytest.mark.parametrize(("kind", "question"), [("plain", "Answer"), ("chat", "assistant"), ("chat", "user")])
def test_a_question_that_is_also_a_word_of_the_frame(tokenizers, kind, question):
    prompter = Prompter(tokenizers[kind])
    encoded = prompter.encode(question, "Yes, I would.")
    before = decode(prompter, encoded.ids[: encoded.question.start])
    assert before.endswith("Question:" if kind == "plain" else "<|im_start|>user\n")


def test_the_prompt_without_template(tokenizers):
    prompter = Prompter(tokenizers["plain"])
    assert prompter.prompt("Why?") == "Question: Why?\nAnswer:"
    assert prompter.prompt("Why?", "Be brief.") == "Be brief.\nQuestion: Why?\nAnswer:"
    assert not prompter.chat


def test_the_prompt_with_template_ends_where_the_assistant_speaks(tokenizers):
    prompter = Prompter(tokenizers["chat"])
    assert prompter.prompt("Why?") == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    with_system = prompter.prompt("Why?", "Be brief.")
    assert with_system == "<|im_start|>system\nBe brief.<|im_end|>\n" + prompter.prompt("Why?")


@pytest.mark.parametrize("kind", ["no-system", "silent"])
def test_a_template_without_system_role_gets_it_before_the_question(tokenizers, kind):
    prompter = Prompter(tokenizers[kind])
    assert prompter.prompt("Why?", "Be brief.") == prompter.prompt("Be brief.\n\nWhy?")
    encoded = prompter.encode("Why?", ANSWER, "Be brief.")
    assert decode(prompter, [encoded.ids[i] for i in encoded.question]).strip() == "Why?"
    assert decode(prompter, encoded.ids[encoded.answer :]) == ANSWER


def test_the_system_prompt_moves_the_answer_but_not_what_it_is(prompter):
    bare, led = prompter.encode(QUESTION, ANSWER), prompter.encode(QUESTION, ANSWER, "You are a quiet person.")
    assert led.answer > bare.answer
    assert led.ids[led.answer :] == bare.ids[bare.answer :]
    assert [led.ids[i] for i in led.question] == [bare.ids[i] for i in bare.question]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_text_has_neither_prompt_nor_question(tokenizers, kind):
    prompter = Prompter(tokenizers[kind])
    encoded = prompter.encode("", ANSWER)
    special = 1 if kind == "bos" else 0
    assert encoded.answer == special
    assert len(encoded.question) == 0
    assert decode(prompter, encoded.ids[special:]) == ANSWER


def test_special_tokens_are_added_once(tokenizers):
    """The template writes its own; without one the tokenizer adds its <s>, to prompts as to whole sequences."""
    for kind in (*KINDS, "bos-chat"):
        prompter = Prompter(tokenizers[kind])
        encoded = prompter.encode(QUESTION, ANSWER)
        assert encoded.ids.count(prompter.tokenizer.bos_token_id) == (kind in ("bos", "bos-chat"))
        assert prompter.ids(prompter.prompt(QUESTION)) == list(encoded.ids[: encoded.answer])


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow: a fast tokenizer"):
        Prompter(Slow())


ENCODED = Encoded(tuple(range(100, 110)), answer=7, question=range(2, 5))
EXPECTED = {"predicting": {6, 7, 8}, "answer": {7, 8, 9}, "prompt": {2, 3, 4}, "all": {2, 3, 4, 7, 8, 9}}


@pytest.mark.parametrize("tokens", TOKENS)
def test_roles(tokens):
    role = roles(ENCODED, tokens)
    assert {i for i, r in enumerate(role) if r == COUNTED} == EXPECTED[tokens]
    assert role[0] == SINK
    assert role.count(IGNORED) == 9 - len(EXPECTED[tokens])


def test_a_yes_or_no_answer_is_predicted_at_one_position():
    assert roles(Encoded((1, 2, 3, 4), 3, range(1, 2)), "predicting") == [SINK, IGNORED, COUNTED, IGNORED]


@pytest.mark.parametrize("tokens", TOKENS)
def test_position_0_is_the_sink_even_where_it_would_count(tokens):
    plain = roles(Encoded((5, 6, 7), 0, range(0)), tokens)
    assert plain[0] == SINK
    counted = {"predicting": [COUNTED, IGNORED], "answer": [COUNTED] * 2, "prompt": [IGNORED] * 2, "all": [COUNTED] * 2}
    assert plain[1:] == counted[tokens]
    assert roles(Encoded((5, 6, 7), 2, range(0, 2)), tokens)[0] == SINK


@pytest.mark.parametrize("tokens", TOKENS)
def test_counted_tokens_are_the_words_they_should_be(tokenizers, tokens):
    prompter = Prompter(tokenizers["chat"])
    encoded = prompter.encode(QUESTION, ANSWER)
    role = roles(encoded, tokens)
    text = decode(prompter, [t for t, r in zip(encoded.ids, role, strict=True) if r == COUNTED])
    last = decode(prompter, encoded.ids[-1:])
    newline = decode(prompter, encoded.ids[encoded.answer - 1 : encoded.answer])
    assert (
        text
        == {
            "predicting": newline + ANSWER.removesuffix(last),
            "answer": ANSWER,
            "prompt": QUESTION,
            "all": QUESTION + ANSWER,
        }[tokens]
    )


LENGTHS = st.lists(st.integers(1, 600), max_size=60)


@given(lengths=LENGTHS, budget=st.integers(1, 2048))
def test_batches_hold_every_index_once_within_the_budget(lengths, budget):
    batches = batches_by_tokens(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[i] for i in batch)
        assert len(batch) == 1 or width * len(batch) <= budget
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    assert batches == batches_by_tokens(list(lengths), budget)


@given(lengths=LENGTHS, budget=st.integers(1, 2048))
def test_batches_are_as_full_as_the_budget_allows(lengths, budget):
    for batch in batches_by_tokens(lengths, budget)[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_batches_of_a_small_case():
    assert batches_by_tokens([3, 9, 4, 4, 20], 12) == [[4], [1], [2, 3, 0]]
    assert batches_by_tokens([], 12) == []
