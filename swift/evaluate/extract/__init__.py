"""What is taken out of a written answer, by rules with names. ``EXTRACTORS`` is their table; a member is made by ``make(setting)``."""

from swift.registry import Registry

EXTRACTORS = Registry(
    "extractor",
    {
        "letter": "swift.evaluate.extract.letter:make",
        "number": "swift.evaluate.extract.number:make",
        "math": "swift.evaluate.extract.number:make_math",
        "text": "swift.evaluate.extract.parts:make_text",
        "first_line": "swift.evaluate.extract.parts:make_first_line",
        "regex": "swift.evaluate.extract.parts:make_regex",
        "code": "swift.evaluate.extract.parts:make_code",
        "yes_no": "swift.evaluate.extract.parts:make_yes_no",
        "json": "swift.evaluate.extract.parts:make_json",
    },
    group="swift.extractor",
)
