from swift.data.collate import flat_batch
from swift.model.noise import add_noise
from swift.model.policy import Policy, packing_fault
from tests.families import build


def test_rows_side_by_side_get_the_noise_of_their_own_lengths():
    model = build("llama")
    assert packing_fault(model) is None
    embedding = model.get_input_embeddings()
    given = {}
    embedding.register_forward_hook(lambda module, args, out: given.update(plain=out.detach()))
    add_noise(model, 5.0)
    embedding.register_forward_hook(lambda module, args, out: given.update(noisy=out.detach()))
    model.train()
    lengths = [400, 25]
    rows = [{"input_ids": [7] * length, "labels": [7] * length} for length in lengths]
    Policy(model).cross_entropy(flat_batch(rows, share=False))
    noise = (given["noisy"] - given["plain"])[0]
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert part.abs().max() <= bound * 1.001
        assert part.abs().mean() > 0.45 * bound  # uniform: the mean is half of the largest
