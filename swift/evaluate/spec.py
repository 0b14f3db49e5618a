"""A task as data: where its rows are, how they are asked, and how answers are judged. One YAML file a task."""

import msgspec

# The declaration that the room `tasks` fills in; a sketch of its shape:
#
#   name: mmlu                        title, licence, homepage, language (en, zh), about
#   source:
#     hub: [hf::cais/mmlu]            references of data sets, tried in order of --use_hf
#     splits:                         split -> patterns below a folder, tried in order; {category} stands for a subject
#       dev: ["dev/{category}_dev.csv", ...]
#       test: ["test/{category}_test.csv", ...]
#     header: [question, A, B, C, D, answer]     of CSV files that have none
#   split: test                       which one is evaluated
#   fewshot: {split: dev, count: 5}
#   groups: {STEM: [abstract_algebra, ...]}
#   fields: {subject: "{{ category | replace('_', ' ') }}"}     derived columns (Jinja, sandboxed)
#   drop: [{when: "label == '-'", because: "no majority"}]
#   modes:                            the first is the default
#     letter: {description, prompt, choices, gold, delimiter, separator, metric}
#     generate: {..., stop, max_new_tokens, extract, metrics}


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the sketch above."""

    name: str
    title: str
    licence: str
