"""A model's decoder as a list of instructions, beside transformers' own forward and plain torch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from swift.engine.native import instructions
from swift.engine.native.compiled import kernels
from swift.engine.native.packed import PackedLinear
from swift.engine.native.pages import PagedCache, Pages, Piece
from swift.engine.native.program import Program, program_of
from swift.engine.native.runner import Runner
from swift.engine.native.tape import Untraceable
from tests.families import FAMILIES, build

CPU = torch.device("cpu")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
NO_HEAD = ("opt",)  # its projections of the embedding are not apart from its head
MORE = ("smollm3", "glm4", "starcoder2", "phi", "ernie4_5", "exaone4", "hunyuan_v1_dense")
DENSE = [family for family in (*FAMILIES, *MORE) if family not in (*EXPERTS, *NO_HEAD)]
BLOCKS = ((7, 1, 4, 0, 9, 12), (3, 8, 2, 10, 11, 13))


def in_parts(program, sequences, lengths):
    """Hidden states of two sequences, computed in parts of these lengths, in blocks of 4 in no order."""
    cache = PagedCache(14, 4)
    done, hidden = [0, 0], [[], []]
    for step in lengths:
        pieces, tokens, positions = [], [], []
        for number, length in enumerate(step):
            if length:
                pieces.append(Piece(len(tokens), length, done[number] + length, BLOCKS[number]))
                tokens += sequences[number][done[number] : done[number] + length]
                positions += range(done[number], done[number] + length)
                done[number] += length
        pages = Pages(cache, pieces, CPU, kernels().paged_attention)
        both = program.run(torch.tensor(tokens), torch.tensor(positions), pages).clone().split([length for length in step if length])
        for number, part in zip([number for number, length in enumerate(step) if length], both, strict=True):
            hidden[number].append(part)
    return [torch.cat(parts) for parts in hidden]


@pytest.mark.parametrize("family", DENSE)
def test_parts_in_any_order_give_the_hidden_states_of_the_whole(family):
    model = build(family)
    sequences = [[5, 99, 17, 3, 64, 21, 8, 77, 30, 12, 101, 55, 6, 42, 90, 11, 2], [9, 4, 88, 23, 71, 15, 60, 33]]
    with torch.no_grad():
        wanted = [model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0] for tokens in sequences]
    program = Runner(model, PagedCache(1, 4), "float32").program
    assert program is not None
    for lengths in ([(1, 1), (12, 2), (1, 1), (0, 1), (1, 3), (2, 0)], [(9, 8), (8, 0)], [(1, 0)] * 17 + [(0, 2)] * 4):
        for found, expected in zip(in_parts(program, sequences, lengths), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_are_chosen_by_value_are_left_to_the_model(family):
    runner = Runner(build(family), PagedCache(1, 4), "float32")
    assert runner.program is None
    assert "no instruction for" in runner.why_no_program


def test_a_scaling_that_depends_on_the_longest_sequence_is_left_to_the_model():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    runner = Runner(build("llama", rope_parameters=rope, max_position_embeddings=16), PagedCache(1, 4), "float32")
    assert runner.program is None
    assert "reads values" in runner.why_no_program


def test_a_list_that_does_not_give_the_models_results_is_not_used(monkeypatch):
    monkeypatch.setitem(instructions.CODES, "add", instructions.CODES["sub"])
    runner = Runner(build("llama"), PagedCache(1, 4), "float32")
    assert runner.program is None
    assert runner.why_no_program == "its results are not those of the model"


def test_an_operation_in_an_unknown_form_is_left_to_the_model(monkeypatch):
    monkeypatch.setattr(instructions.Encoder, "_mul", lambda self, step, a: [])
    runner = Runner(build("llama"), PagedCache(1, 4), "float32")
    assert runner.program is None
    assert runner.why_no_program.startswith("it cannot be watched: ")


class Toy(nn.Module):
    """A decoder without layers, whose hidden states are ``act`` of embeddings (1, T, 12) and positions (1, T)."""

    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.act = nn.Embedding(50, 12), act
        self.linear = PackedLinear(torch.randn(12, 12), torch.randn(12), "float32")
        self.norm = nn.LayerNorm(12)
        self.scale = nn.Parameter(torch.randn(12))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, position_ids, **_):
        x = self.act(self, self.embed(input_ids), position_ids)
        return SimpleNamespace(last_hidden_state=x)


def program_of_toy(act):
    toy = Toy(act).requires_grad_(False)
    return toy, Program(SimpleNamespace(decoder=toy, inner=toy))


ACTS = {
    "neg": lambda toy, x, at: -x,
    "silu": lambda toy, x, at: F.silu(30 * x),
    "gelu": lambda toy, x, at: F.gelu(x),
    "gelu_tanh": lambda toy, x, at: F.gelu(3 * x, approximate="tanh"),
    "gates": lambda toy, x, at: F.gelu(x) * (x + 1),
    "gate of itself": lambda toy, x, at: F.silu(x) * F.silu(x),
    "relu": lambda toy, x, at: F.relu(x),
    "tanh": lambda toy, x, at: torch.tanh(5 * x),
    "sigmoid": lambda toy, x, at: torch.sigmoid(-20 * x),
    "powers": lambda toy, x, at: x.pow(2) + x.pow(3) + (x.pow(2) + 1).pow(0.3),
    "rsqrt": lambda toy, x, at: torch.rsqrt(x.pow(2) + 0.1),
    "cos and sin": lambda toy, x, at: torch.cos(9 * x) + torch.sin(x),
    "numbers": lambda toy, x, at: (x * 3 - 0.5 + 1) / 4,
    "alpha": lambda toy, x, at: torch.add(x, x * x, alpha=2.5),
    "rows times columns": lambda toy, x, at: x * toy.scale - at[..., None].float() / toy.scale,
    "shifted positions": lambda toy, x, at: x * (at + 2).float()[..., None],
    "heads": lambda toy, x, at: (x.view(1, -1, 3, 4).transpose(1, 2) * toy.scale[:4]).transpose(1, 2).reshape(1, -1, 12),
    "halves": lambda toy, x, at: torch.cat((-x[..., 6:], x[..., :6]), dim=-1),
    "interleaved": lambda toy, x, at: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2),
    "mean": lambda toy, x, at: x - x.mean(-1, keepdim=True),
    "mean of heads": lambda toy, x, at: (x.view(1, -1, 3, 4) * x.view(1, -1, 3, 4).mean(-1, keepdim=True)).flatten(-2),
    "norm": lambda toy, x, at: toy.norm(x * 7 + 3),
    "linear": lambda toy, x, at: toy.linear(x) + toy.linear(x.view(1, -1, 3, 4).transpose(2, 3).flatten(-2)),
    "in place": lambda toy, x, at: (x * 2).add_(x).mul_(toy.scale),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("num_rows", [1, 2, 17, 3000])
def test_instructions_compute_what_torch_does(name, num_rows):
    toy, program = program_of_toy(ACTS[name])
    ids, at = torch.arange(num_rows) * 7 % 50, torch.arange(num_rows) * 3 % 101
    pages = Pages(PagedCache(0, 4), [], CPU, kernels().paged_attention)
    pages.__dict__["table"] = SimpleNamespace(blocks=torch.zeros(1, 1), context=torch.zeros(1), first=lambda window: at)
    torch.testing.assert_close(program.run(ids, at, pages), toy(ids[None], at[None]).last_hidden_state[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda toy, x, at: x * len(at[0]), "other things|linear function"),
        (lambda toy, x, at: x * float(x.sum()), "reads values"),
        (lambda toy, x, at: x.cumsum(1), "no instruction for cumsum"),
        (lambda toy, x, at: x.half().float(), "float16"),
        (lambda toy, x, at: x + torch.arange(at.shape[1])[:, None].float(), "no instruction for arange|depends on the rows"),
        (lambda toy, x, at: x * toy.embed.weight.sum(), "no instruction for sum"),
        (lambda toy, x, at: x + torch.empty_like(x), "no instruction|nothing was written"),
    ],
)
def test_what_no_list_stands_for_is_said(act, reason):
    with pytest.raises(Untraceable, match=reason):
        program_of_toy(act)


def test_a_model_without_a_head_of_its_own_has_no_program():
    model = build("opt")
    assert program_of(Runner(model, PagedCache(1, 4)).policy) == (None, "its head cannot be told from its decoder")


def test_the_layers_are_as_they_were_after_the_passes_that_are_noted():
    model = build("llama")
    runner = Runner(model, PagedCache(1, 4), "float32")
    assert runner.program is not None
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_the_workspace_grows_with_the_rows_and_not_with_the_layers():
    few, many = (Runner(build("llama", num_hidden_layers=count), PagedCache(1, 4), "float32").program for count in (2, 12))
    assert many.num_instructions > 5 * few.num_instructions
    assert many.workspace_bytes(64) == few.workspace_bytes(64)
    assert many.workspace_bytes(64) <= 64 * many.workspace_bytes(1)
