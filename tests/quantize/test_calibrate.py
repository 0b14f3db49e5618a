"""The documents that calibrate and those that measure."""

import pytest

from swift.config.commands import QuantizeConfig
from swift.config.options import build as build_config
from swift.model.tokenizer import load_tokenizer
from swift.quantize.calibrate import documents
from tests.quantize.runs import wide
from tests.tiny import CHATML


def test_calibration_and_measuring_share_no_document(tmp_path, rows):
    model = wide(tmp_path / "m")
    given = {
        "model": str(model),
        "quant_method": "gptq",
        "dataset": [str(rows)],
        "quant_n_samples": 20,
        "quant_eval_samples": 6,
        "max_length": 64,
    }
    config = build_config(QuantizeConfig, ("argument", given))
    found = documents(config, load_tokenizer(model))
    again = documents(build_config(QuantizeConfig, ("argument", given | {"quant_n_samples": 3})), load_tokenizer(model))
    assert len(found.held_out) == 6
    assert len(found.calibration) == 20
    assert again.held_out == found.held_out
    assert not {tuple(piece[:30]) for piece in found.held_out} & {tuple(piece[:30]) for piece in found.calibration}
    assert found.calibration[0][:3] == load_tokenizer(model)("<|im_start|>user\n").input_ids[:3]  # the chat template


@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_the_built_in_text_serves_models_with_and_without_a_chat_template(chat_template, tmp_path):
    model = wide(tmp_path / "m", chat_template=chat_template)
    given = {"model": str(model), "quant_method": "gptq", "quant_n_samples": 40, "quant_eval_samples": 8, "max_length": 64}
    found = documents(build_config(QuantizeConfig, ("argument", given)), load_tokenizer(model))
    assert (len(found.calibration), len(found.held_out)) == (40, 8)
    begins = load_tokenizer(model)("<|im_start|>").input_ids
    assert any(piece[: len(begins)] == begins for piece in found.calibration) is (chat_template is not None)


def test_rows_that_cannot_be_rendered_are_counted(tmp_path, rows, capsys):
    template = "{% if messages[0].content == 'What about day 3?' %}{{ raise_exception('not this day') }}{% endif %}" + CHATML
    model = wide(tmp_path / "m", chat_template=template)
    given = {"model": str(model), "quant_method": "gptq", "dataset": [str(rows)], "quant_n_samples": 36, "quant_eval_samples": 3}
    found = documents(build_config(QuantizeConfig, ("argument", given | {"max_length": 128})), load_tokenizer(model))
    assert (len(found.held_out), len(found.calibration)) == (3, 36)
    assert "1 rows are left out, since they cannot be rendered: the first because" in capsys.readouterr().err
