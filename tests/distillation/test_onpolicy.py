"""On-policy distillation of causal models: what is drawn, what counts, what is learned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shohin.data import Call, Data
from shohin.distillation import Teacher, continuations, distillation_objective, losses, on_policy_objective
from shohin.errors import DataError
from shohin.training import TrainConfig, train
from sweep.torchvision_schemas import torchvision_models

torch.set_num_threads(1)
if find_spec("torchvision"):
    torchvision_models()  # transformers imports torchvision, which may need help
WORDS = 5


class Bigrams(nn.Module):
    """The next word depends on the last one alone."""

    def __init__(self, seed: int, words: int = WORDS, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(words, words)
        self.table.weight.data = scale * torch.randn(words, words, generator=torch.Generator().manual_seed(seed))
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.table(tokens))


def llama(seed: int, words: int = 11) -> nn.Module:
    tf = pytest.importorskip("transformers")

    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    net: nn.Module = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=words, max_position_embeddings=64, initializer_range=0.6, **size))
    return net.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_words_follow_the_models_distribution(temperature: float) -> None:
    """Chi-square of pairs of words, in evaluation mode though the model is in training mode."""
    net = Bigrams(1).train()
    prompts = torch.full((4000, 1), 3)
    said = continuations(net, prompts, generator(2), max_new=2, temperature=temperature)
    table = F.softmax(net.table.weight.detach().double() / temperature, 1)
    expected = (table[3][:, None] * table).flatten()
    seen = torch.bincount(said.tokens[:, 1] * WORDS + said.tokens[:, 2], minlength=WORDS**2)
    assert scipy.stats.chisquare(seen.numpy(), (expected / expected.sum() * 4000).numpy()).pvalue > 1e-3
    assert net.training and net.dropout.training
    again = continuations(net, prompts, generator(2), max_new=2, temperature=temperature)
    assert torch.equal(said.tokens, again.tokens)
    assert not torch.equal(said.tokens, continuations(net, prompts, generator(3), max_new=2, temperature=temperature).tokens)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [lambda: Bigrams(4, 11), lambda: llama(4)])
def test_padding_of_prompts_changes_nothing(side: str, make: Callable[[], nn.Module]) -> None:
    """Likeliest words, so that rows can be compared with each alone."""
    net = make()
    rows = [torch.tensor(r) for r in ([1, 2, 3, 4], [5], [6, 7])]
    pads = [torch.full((4 - len(r),), 9) for r in rows]
    padded = torch.stack([torch.cat([p, r] if side == "left" else [r, p]) for r, p in zip(rows, pads, strict=True)])
    real = torch.tensor([[1] * len(r) + [0] * len(p) for r, p in zip(rows, pads, strict=True)])
    mask = real.flip(1) if side == "left" else real
    said = continuations(net, padded, generator(), mask=mask, max_new=5, temperature=0.0, pad=9)
    for i, row in enumerate(rows):
        alone = continuations(net, row[None], generator(), max_new=5, temperature=0.0)
        own = said.tokens[i][said.mask[i]]
        assert torch.equal(own, alone.tokens[0]) and torch.equal(own[: len(row)], row)
        assert torch.equal(said.tokens[i][said.written[i]], alone.tokens[0, len(row) :])
        assert bool((said.tokens[i][~said.mask[i]] == 9).all())


def test_equals_generate_of_transformers() -> None:
    net = llama(7)
    prompts = torch.randint(0, 11, (3, 4), generator=generator(1))
    theirs = net.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )  # type: ignore[operator]
    assert torch.equal(continuations(net, prompts, generator(), max_new=6, temperature=0.0).tokens, theirs)


@pytest.mark.parametrize("end", [0, 2])
def test_nothing_after_the_end_token(end: int) -> None:
    """Also where the end token is the padding, and in prompts it ends nothing."""
    net = Bigrams(3)
    prompts = torch.full((64, 3), end)
    said = continuations(net, prompts, generator(), max_new=12, end=end, pad=0)
    assert torch.equal(said.tokens[:, :3], prompts) and not bool(said.written[:, :3].any())
    for tokens, written, mask in zip(said.tokens, said.written, said.mask, strict=True):
        words = tokens[written]
        assert end not in words[:-1] and (len(words) == 12 or words[-1] == end)
        assert bool(written[3 : 3 + len(words)].all()) and int(mask.sum()) == 3 + len(words)
    assert len({int(w.sum()) for w in said.written}) > 2

    # the loss: words behind the end do not count, whatever the models say there
    student, teacher = torch.randn(2, *said.tokens.shape, WORDS, generator=generator(5)).unbind()
    value = losses.tokens(student, teacher, said.counts, beta=1.0)
    by_hand = []
    for i in range(64):
        for j in range(said.tokens.shape[1] - 1):
            if bool(said.written[i, j + 1]):
                s, t = student[i, j].log_softmax(0), teacher[i, j].log_softmax(0)
                by_hand.append((s.exp() * (s - t)).sum())
    assert torch.allclose(value, torch.stack(by_hand).mean(), atol=1e-5)


def batches(n: int = 12, named: bool = False, words: int = 11) -> list[object]:
    """Sequences of 6 words, right padded; with labels."""
    made: list[object] = []
    g = generator(8)
    for _ in range(3):
        x = torch.randint(1, words, (n // 3, 6), generator=g)
        mask = torch.ones_like(x)
        mask[0, 4:] = 0
        labels = torch.where(mask.bool(), x.roll(-1, 1), -100)
        made.append({"input_ids": x, "attention_mask": mask, "labels": labels} if named else (x, labels))
    return made


@pytest.mark.parametrize("named", [True, False])
def test_fraction_zero_is_the_off_policy_loss(named: bool) -> None:
    student, teacher = llama(1), llama(2)
    ours = on_policy_objective(teacher, prompt=2, fraction=0.0, beta=0.0, temperature=2.0)
    plain = distillation_objective(teacher, loss="tokens", temperature=2.0)
    for call in Data(batches(named=named)).calls("train"):
        a, terms = ours(student, call, generator())
        b, _ = plain(student, call, generator())
        assert torch.equal(a, b) and terms["on_policy"] == 0.0


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_on_policy_loss_by_hand(named: bool, beta: float) -> None:
    student, teacher = llama(1), llama(2)
    objective = on_policy_objective(teacher, prompt=2, fraction=1.0, beta=beta, max_new=4, end=3, temperature=1.5)
    call = next(Data(batches(named=named)).calls("train"))
    value, terms = objective(student, call, generator(4))
    g = generator(4)
    torch.rand((), generator=g)  # the choice between the student's and the data's sequences
    said = continuations(student, (call.args or tuple(call.kwargs.values()))[0][:, :2], g, max_new=4, end=3)
    s, t = student(said.tokens).logits, teacher(said.tokens).logits
    assert torch.allclose(value, losses.tokens(s, t, said.counts, 1.5, beta), atol=1e-6)
    assert terms == {"tokens": pytest.approx(value.item()), "on_policy": 1.0}
    value.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_prompts_by_a_function_and_the_share_of_batches() -> None:
    student, teacher = Bigrams(1), Bigrams(2)
    seen: list[Tensor] = []

    class Spy(Bigrams):
        def forward(self, tokens: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(tokens)
            return super().forward(tokens)

    spy = Spy(1)
    spy.load_state_dict(student.state_dict())
    x = torch.arange(4).repeat(2, 2)[:, :6] + 1
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    objective = on_policy_objective(teacher, prompt=lambda call: mask, fraction=0.3, max_new=2)
    call = next(Data([x % WORDS]).calls("train"))
    g = generator(1)
    own = [objective(spy, call, g)[1]["on_policy"] for _ in range(200)]
    assert 0.2 < sum(own) / 200 < 0.4
    for flag, tokens in zip(own, seen, strict=True):
        if flag:
            assert tokens.shape == (2, 5) and torch.equal(tokens[0, :3], call.args[0][0, :3]) and tokens[1, 0] == call.args[0][1, 0]
        else:
            assert torch.equal(tokens, call.args[0])


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_training_lowers_the_reverse_divergence_on_own_samples(beta: float) -> None:
    """A narrow student of a Llama-like teacher: its own continuations become what the teacher would say."""
    teacher = llama(2)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    prompts = torch.randint(0, 11, (48, 3), generator=generator(6))

    def reverse() -> float:
        said = continuations(student, prompts.repeat(4, 1), generator(9), max_new=6)
        with torch.no_grad():
            return float(losses.tokens(student(said.tokens), teacher(said.tokens).logits, said.counts, beta=1.0))

    before = reverse()
    objective = on_policy_objective(Teacher(teacher, cache_bytes=0), prompt=3, fraction=1.0, beta=beta, max_new=6)
    train(student, Data(list(prompts.split(12))), objective, TrainConfig(epochs=25, lr=0.02, weight_decay=0.0))
    assert reverse() < 0.75 * before


def test_resume_is_exact(tmp_path: Path) -> None:
    """The words are drawn with the generator of the epoch; dropout and the check of the vocabularies do not interfere."""

    def run(stop: int, path: Path | None) -> Tensor:
        net, seen = Bigrams(1), 0

        def callback(record: object) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt

        objective = on_policy_objective(Bigrams(2), prompt=2, fraction=0.6, max_new=3)
        data = Data([torch.randint(0, WORDS, (4, 5), generator=generator(i)) for i in range(4)])
        with contextlib.suppress(KeyboardInterrupt):
            train(net, data, objective, TrainConfig(epochs=4, lr=0.05), checkpoint=path, callbacks=[callback])
        return net.table.weight.detach()

    path = tmp_path / "c.safetensors"
    run(3, path)
    assert torch.equal(run(9, path), run(9, None))


def test_bad_input_is_said() -> None:
    student, wide = Bigrams(1), Bigrams(2, 9)
    data = Data([torch.zeros(2, 4, dtype=torch.long)])
    for fraction in (0.0, 1.0):
        objective = on_policy_objective(student, prompt=2, fraction=fraction, max_new=8)
        with pytest.raises(DataError, match=r"9 classes \(or words, or features\) in the student and 5 in the teacher"):
            objective(wide, next(data.calls("train")), generator())
    with pytest.raises(DataError, match="row 1 of the prompts is empty"):
        continuations(student, torch.zeros(2, 3, dtype=torch.long), generator(), mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(DataError, match=r"whole numbers \[N, P\]"):
        continuations(student, torch.zeros(2, 3), generator())
    with pytest.raises(DataError, match="max_new must be >= 1"):
        continuations(student, torch.zeros(2, 3, dtype=torch.long), generator(), max_new=0)
    with pytest.raises(DataError, match=r"logits \[N, L, V\]"):
        continuations(nn.Sequential(nn.Embedding(5, 5), nn.Flatten()), torch.zeros(2, 3, dtype=torch.long), generator())
    student.table.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="hold NaN"):
        continuations(student, torch.zeros(2, 3, dtype=torch.long), generator())
    with pytest.raises(DataError, match=r"fraction must be in \[0, 1\]"):
        on_policy_objective(student, prompt=1, fraction=1.5)
    objective = on_policy_objective(student, prompt=2)
    with pytest.raises(
        DataError, match="one positional tensor, or input_ids and attention_mask; got 0 positional and input_ids, position_ids"
    ):
        x = torch.zeros(2, 4, dtype=torch.long)
        objective(student, Call((), {"input_ids": x, "position_ids": x}, None, None), generator())
