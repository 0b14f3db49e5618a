"""What is said to another package: by its own names, checked before anything starts."""

import json
from pathlib import Path

import pytest

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.errors import ConfigError
from swift.evaluate.external import evalscope, lm_eval, opencompass, vlmevalkit
from swift.evaluate.external.server import Served

# The answers of the packages' own schemas (EvalScope 1.14.1, lm_eval 0.4.13, OpenCompass 0.5.4, ms-vlmeval 0.0.20), shortened.
KNOWN = json.loads((Path(__file__).parent / "external" / "known.json").read_text())
SERVED = Served("http://127.0.0.1:1234/v1", "secret", "tiny", None)


def make(backend, *tasks, **options):
    values = {"models": ["x"], "eval_backend": backend, "eval_dataset": list(tasks)}
    return build(EvalConfig, ("flag", {**values, **options}))


@pytest.mark.parametrize(
    ("spelled", "meant"), [("EvalScope", "evalscope"), ("OpenCompass", "opencompass"), ("VLMEvalKit", "vlmevalkit"), ("lm-eval", "lm_eval")]
)
def test_back_ends_may_be_spelled_as_ms_swift_spells_them(spelled, meant):
    assert make(spelled, "mmlu").eval_backend == meant


def test_evalscope_is_told_by_its_own_names(tmp_path):
    config = make(
        "evalscope",
        "general_mcq",
        "gsm8k",
        eval_limit="5",
        eval_num_proc="3",
        eval_num_fewshot="2",
        max_new_tokens="64",
        stop_words=["\n\n"],
        system="Be brief.",
        enable_thinking="false",
        use_hf="true",
        eval_generation_config={"top_p": 0.9},
        eval_dataset_args={"general_mcq": {"local_path": str(tmp_path), "subset_list": ["example"], "few_shot_num": 0}},
        extra_eval_args={"ignore_errors": True, "python": "/elsewhere/bin/python"},
    )
    assert evalscope.options_of(config) == {
        "datasets": ["general_mcq", "gsm8k"],
        "dataset_args": {
            "general_mcq": {"system_prompt": "Be brief.", "local_path": str(tmp_path), "subset_list": ["example"], "few_shot_num": 0},
            "gsm8k": {"system_prompt": "Be brief.", "few_shot_num": 2},
        },
        "eval_type": "openai_api",
        "eval_batch_size": 3,
        "generation_config": {
            "temperature": 0.0,
            "max_tokens": 64,
            "stop_seqs": ["\n\n"],
            "top_p": 0.9,
            "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
        },
        "limit": 5,
        "seed": 42,
        "dataset_hub": "huggingface",
        "ignore_errors": True,
    }


def test_evalscope_goes_on_in_a_folder_that_it_has_begun(tmp_path):
    assert evalscope.place(tmp_path, SERVED) == {
        "model": "tiny",
        "model_id": "tiny",
        "api_url": "http://127.0.0.1:1234/v1",
        "api_key": "secret",
        "work_dir": str(tmp_path),
        "no_timestamp": True,
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "task_config.yaml").write_text("{}")
    again = evalscope.place(tmp_path, SERVED)
    assert (again["use_cache"], again["rerun_review"]) == (str(tmp_path), True)


JUDGED = {"evalscope": evalscope.judge, "lm_eval": lm_eval.judge, "opencompass": opencompass.judge, "vlmevalkit": vlmevalkit.judge}


@pytest.mark.parametrize(
    ("backend", "task", "options", "message", "hint"),
    [
        ("evalscope", "general_mcqs", {}, "--eval_dataset has general_mcqs, which EvalScope 1.14.1 does not know", "general_mcq?"),
        ("evalscope", "gsm8k", {"extra_eval_args": {"ignore_error": 1}}, "--extra_eval_args has ignore_error", "ignore_errors?"),
        ("evalscope", "gsm8k", {"eval_generation_config": {"max_token": 1}}, "--eval_generation_config has max_token", "max_tokens?"),
        ("evalscope", "gsm8k", {"eval_dataset_args": {"gsm8k": {"subsets": []}}}, "--eval_dataset_args of gsm8k", "subset_list?"),
        ("lm_eval", "mmlu_astronomie", {}, "--eval_dataset has mmlu_astronomie", "mmlu_astronomy?"),
        ("lm_eval", "mmlu", {"extra_eval_args": {"bootstrap_iter": 1}}, "--extra_eval_args has bootstrap_iter", "bootstrap_iters?"),
        ("lm_eval", "mmlu", {"extra_eval_args": {"model_args": {"add_bos": 1}}}, "model_args of hf in --extra_eval_args", "token"),
        ("opencompass", "ceval_genn", {}, "--eval_dataset has ceval_genn", "ceval_gen?"),
        ("opencompass", "ceval_gen", {"extra_eval_args": {"max_num_worker": 2}}, "--extra_eval_args has max-num-", "max-num-workers?"),
        ("vlmevalkit", "MMStar", {"extra_eval_args": {"judges": "x"}}, "--extra_eval_args has judges", "judge?"),
        ("vlmevalkit", "MMStar", {"eval_generation_config": {"min_p": 1}}, "--eval_generation_config has min_p", "it knows"),
    ],
)
def test_a_name_that_the_package_does_not_know_is_refused_with_the_one_that_is_meant(backend, task, options, message, hint):
    with pytest.raises(ConfigError) as found:
        JUDGED[backend](make(backend, task, **options), KNOWN[backend])
    assert found.value.message.startswith(message)
    assert hint in found.value.hint


@pytest.mark.parametrize("backend", JUDGED)
def test_what_a_package_knows_is_accepted(backend):
    task = {"evalscope": "gsm8k", "lm_eval": "mmlu", "opencompass": "ceval_gen", "vlmevalkit": "MMStar"}[backend]
    extra = {"evalscope": "ignore_errors", "lm_eval": "bootstrap_iters", "opencompass": "max_num_workers", "vlmevalkit": "judge"}[backend]
    JUDGED[backend](make(backend, task, temperature="0.5", extra_eval_args={extra: 2}), KNOWN[backend])


def test_what_evalscopes_schema_says_is_passed_on():
    with pytest.raises(ConfigError, match=r"EvalScope 1\.14\.1 refuses limit: Value error"):
        evalscope.judge(make("evalscope", "gsm8k"), KNOWN["evalscope"] | {"problem": "limit: Value error, it is below 0\nmore"})


@pytest.mark.parametrize(
    ("module", "extra", "option"),
    [
        (evalscope, {"limit": 3}, "--eval_limit"),
        (evalscope, {"api_key": "k"}, "--eval_api_key"),
        (lm_eval, {"num_fewshot": 3}, "--eval_num_fewshot"),
        (opencompass, {"work-dir": "x"}, "--eval_output_dir"),
        (vlmevalkit, {"base_url": "x"}, "--eval_url"),
    ],
)
def test_what_an_option_of_ours_says_is_not_said_twice(module, extra, option):
    name = module.__name__.rpartition(".")[2]
    config = make(name, "mmlu", extra_eval_args=extra | {"python": "/elsewhere/bin/python"})
    with pytest.raises(ConfigError, match=rf"--extra_eval_args has [\w-]+, which {option} says"):
        module.check(config)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (evalscope, {"eval_mode": "letter"}, "--eval_mode letter is not EvalScope's"),
        (evalscope, {"use_chat_template": "false"}, "--use_chat_template false is not EvalScope's"),
        (evalscope, {"eval_dataset_args": {"ceval": {}}}, "--eval_dataset_args has ceval, which is not among --eval_dataset"),
        (evalscope, {"eval_dataset_args": {"mmlu": 5}}, "--eval_dataset_args has mmlu: 5"),
        (evalscope, {"eval_dataset_args": {"mmlu": {"local_path": "/no/such"}}}, "/no/such, which holds the data of mmlu, does not exist"),
        (lm_eval, {"eval_mode": "letter"}, "--eval_mode has no effect with lm_eval"),
        (lm_eval, {"weight_format": "int8"}, "--weight_format has no effect with lm_eval's own model"),
        (lm_eval, {"extra_eval_args": {"model": "gguf"}}, "--extra_eval_args has model gguf"),
        (lm_eval, {"eval_dataset_args": {"mmlu": {"subset_list": ["astronomy"]}}}, "subset_list of mmlu needs its local_path"),
        (lm_eval, {"eval_num_proc": "3"}, "--eval_num_proc has no effect with lm_eval's own model"),
        (lm_eval, {"quant_bits": "4"}, "--quant_bits has no effect with lm_eval's own model"),
        (opencompass, {"eval_num_fewshot": "3"}, "--eval_num_fewshot has no effect with OpenCompass"),
        (vlmevalkit, {"system": "x"}, "--system has no effect with VLMEvalKit"),
    ],
)
def test_what_a_package_cannot_do_is_refused_before_it_is_started(module, options, message):
    given = {"python": "/elsewhere/bin/python"} | options.pop("extra_eval_args", {})
    with pytest.raises(ConfigError) as found:
        module.check(make(module.__name__.rpartition(".")[2], "mmlu", extra_eval_args=given, **options))
    assert found.value.message.startswith(message)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (opencompass, {"top_p": "0.5"}, "--top_p has no effect with --eval_backend opencompass"),
        (vlmevalkit, {"stop_words": ["x"]}, "--stop_words has no effect with --eval_backend vlmevalkit"),
    ],
)
def test_an_option_of_generation_that_a_package_does_not_have_is_refused(module, options, message):
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(ConfigError, match=message):
        module.generation(make(name, "x", **options), module.NAMES)


def test_training_data_are_not_looked_for_in_the_data_of_a_package():
    with pytest.raises(ConfigError, match="--eval_train_dataset has no effect with --eval_backend lm_eval"):
        make("lm_eval", "mmlu", eval_train_dataset=["snow-alerts"])


def test_a_system_message_may_lie_in_a_file(tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.")
    said = {"system": str(tmp_path / "system.txt")}
    assert lm_eval.options_of(make("lm_eval", "mmlu", **said))["system_instruction"] == "Be brief."
    assert evalscope.options_of(make("evalscope", "gsm8k", **said))["dataset_args"] == {"gsm8k": {"system_prompt": "Be brief."}}


def test_lm_eval_is_told_by_its_own_names():
    config = make(
        "lm_eval", "ceval", "arc", eval_limit="5", max_batch_size="4", max_new_tokens="64", repetition_penalty="1.5", system="Be."
    )
    assert lm_eval.options_of(config) == {
        "tasks": ["ceval-valid", "arc_easy", "arc_challenge"],
        "num_fewshot": None,
        "limit": 5,
        "batch_size": 4,
        "system_instruction": "Be.",
        "apply_chat_template": False,
        "gen_kwargs": {"max_gen_toks": 64, "repetition_penalty": 1.5},
    }


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, "hf"),
        ({"eval_url": "http://127.0.0.1:1/v1"}, "local-completions"),
        ({"eval_url": "http://127.0.0.1:1/v1", "use_chat_template": "true"}, "local-chat-completions"),
        ({"extra_eval_args": {"model": "local-completions"}}, "local-completions"),
    ],
)
def test_lm_eval_reads_the_weights_or_asks_a_server(options, model):
    assert lm_eval.model_of(make("lm_eval", "mmlu", **options)) == model


def test_lm_eval_takes_one_number_of_shots_for_all_tasks():
    config = make("lm_eval", "mmlu", "ceval", eval_dataset_args={"mmlu": {"few_shot_num": 5}, "ceval": {"few_shot_num": 0}})
    with pytest.raises(ConfigError, match="few_shot_num differs between tasks"):
        lm_eval.shots_of(config)


def test_opencompass_gets_words_and_a_config_without_the_key():
    config = make(
        "opencompass",
        "ceval_gen",
        eval_num_proc="3",
        max_new_tokens="64",
        extra_eval_args={"max_num_workers": 2, "debug": True, "lark": False, "stop-words": ["a", "b"]},
    )
    assert opencompass.words_of(config) == ["--max-num-workers", "2", "--debug", "--stop-words", "a", "b"]
    model = opencompass.model_of(config, SERVED, "/models/tiny")
    assert (model["path"], model["openai_api_base"], model["max_out_len"], model["batch_size"]) == ("tiny", SERVED.url, 64, 3)
    assert "secret" not in json.dumps(model)


def test_vlmevalkit_asks_no_judge_elsewhere_unless_it_is_told():
    config = make("vlmevalkit", "MMStar", eval_limit="4", temperature="0.5", enable_thinking="true")
    assert vlmevalkit.options_of(config) | vlmevalkit.place(Path("/out"), SERVED) == {
        "data": ["MMStar"],
        "model": ["tiny"],
        "base_url": SERVED.url,
        "key": "secret",
        "work_dir": "/out",
        "api_nproc": 16,
        "judge": "exact_matching",
        "reuse": True,
        "temperature": 0.5,
        "max_tokens": 2048,
        "limit": 4,
        "extra_body": '{"chat_template_kwargs": {"enable_thinking": true}}',
    }
    assert vlmevalkit.options_of(make("vlmevalkit", "MMStar", extra_eval_args={"judge": "gpt-4o"}))["judge"] == "gpt-4o"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_url": "http://127.0.0.1:1/v1", "weight_format": "int8"}, "--weight_format has no effect with --eval_url"),
        ({"eval_url": "http://127.0.0.1:1/v1", "quant_bits": "4"}, "--quant_bits has no effect with --eval_url"),
        ({"eval_num_proc": "3"}, "--eval_num_proc has no effect without --eval_url"),
    ],
)
def test_an_option_of_what_does_not_run_here_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make("native", "gsm8k", **options)
