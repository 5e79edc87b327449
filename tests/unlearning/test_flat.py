"""FLAT: its divergences against published vectors, and its trainer against cross-entropy."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from llmmix import FLATConfig, FLATTrainer
from llmmix.unlearning.divergences import ALIASES, DIVERGENCES, check_divergence
from llmmix.unlearning.flat import flat_loss, sequence_probs
from llmmix.unlearning.templates import REFUSALS
from tests.unlearning.runs import ON_GPU, weights_of
from tests.unlearning.test_losses import LPE, LPF, ME, MF

pytestmark = pytest.mark.usefixtures("quick_collections")

PAIRS = [(0, 0), (0.2, 0.8), (0.5, 0.5), (0.9, 0.1), (0.05, 0.02), (0.001, 0.004), (1, 0), (0, 1)]
TEXTBOOK = {
    "kl": [0.367879, 0.618731, 0.106531, -0.493430, 0.325311, 0.368354, -0.632121, 1.0],
    "js": [0, 0.382945, 0.061860, -0.300744, -0.014638, 0.001502, -0.379885, 0.620115],
    "pearson": [0, 0.76, 0.0625, -0.7975, -0.0299, 0.003004, -1.0, 1.25],
    "tv": [0, 0.233331, 0, -0.308315, -0.014981, 0.001500, -0.380797, 0.380797],
    "jeffrey": [0, 0.798982, 0.071308, -0.797436, -0.029899, 0.003004, -1.0, 1.330366],
    "reverse_kl": [0, 0.618731, 0.106531, -0.493430, -0.028771, 0.003000, -0.632121, 1.0],
    "squared_hellinger": [
        *(0, 1.044272, 0.255252, -0.488259),
        *(-0.028569, 0.003009, -0.632121, 1.718282),
    ],
    "neyman": [0, 0.478091, 0.048929, -0.495889, -0.028870, 0.002997, -0.632121, 0.786939],
}
# The released code on the shared fixture, where it is right, and the form that was intended
OFFICIAL = {"kl": 0.345227, "js": 0.036596, "pearson": 0.071558, "tv": 0.032637}
INTENDED = {"kl": 0.197426, "js": 0.005846, "pearson": -0.007405, "tv": -0.010992}
INTENDED |= {"jeffrey": -0.006303, "reverse_kl": 0.011539, "squared_hellinger": 0.046746}
INTENDED |= {"neyman": -0.003919}
# dL/dP_e and dL/dP_f
WEIGHTS = {
    "kl": lambda a, c: (-1, math.exp(c - 1)),
    "js": lambda a, c: (-1 / (1 + math.exp(a)), 1 / (1 + math.exp(-c))),
    "pearson": lambda a, c: (-1, 1 + c / 2),
    "tv": lambda a, c: (-0.5 / math.cosh(a) ** 2, 0.5 / math.cosh(c) ** 2),
    "reverse_kl": lambda a, c: (-math.exp(-a), 1),
    "squared_hellinger": lambda a, c: (-math.exp(-a), math.exp(c)),
    "neyman": lambda a, c: (-math.exp(-a), math.exp(-c / 2)),
}
# P_e and P_f after 400 steps from .05 and .8
MOVED = {"kl": (0.998, 0.006), "jeffrey": (0.998, 0.002), "pearson": (0.998, 0.002)}
MOVED |= {"js": (0.990, 0.005), "tv": (0.988, 0.005), "reverse_kl": (0.993, 0.002)}
MOVED |= {"squared_hellinger": (0.993, 0.002), "neyman": (0.993, 0.002)}


def gradients(name, a, c, dtype=torch.float64):
    """The loss of two probabilities, dL/dP_e and dL/dP_f."""
    a, c = (torch.tensor([p], dtype=dtype, requires_grad=True) for p in (a, c))
    loss = flat_loss(a, c, name)
    loss.sum().backward()
    return loss.item(), a.grad.item(), c.grad.item()


def test_every_divergence_is_in_every_table():
    assert set(DIVERGENCES) == set(TEXTBOOK) == set(INTENDED) == set(MOVED)
    assert set(DIVERGENCES) == {*WEIGHTS, "jeffrey"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_textbook_vectors(name):
    a, c = torch.tensor(PAIRS, dtype=torch.float64).unbind(1)
    assert flat_loss(a, c, name).tolist() == pytest.approx(TEXTBOOK[name], abs=1e-6)
    low = flat_loss(a.float(), c.float(), name)
    assert low.dtype == torch.float32
    assert low.tolist() == pytest.approx(TEXTBOOK[name], abs=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_template_is_pushed_up_and_the_answer_down(name):
    values = [gradients(name, a, c)[0] for a, c in ((0.9, 0.1), (0.5, 0.5), (0.1, 0.9))]
    assert values == sorted(values) and len(set(values)) == 3
    for a in (0.0, 1e-6, 0.3, 1.0):
        for c in (0.0, 1e-6, 0.7, 1.0):
            _, by_a, by_c = gradients(name, a, c)
            assert by_a < 0 < by_c


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("a", "c"), PAIRS)
def test_gradients_are_the_stated_weights(name, a, c):
    _, *found = gradients(name, float(a), float(c))
    assert found == pytest.approx(WEIGHTS[name](a, c), rel=1e-12)


def lambert(c):
    """The root of w + ln w = 1 - c, by bisection."""
    low, high = 0.5, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + math.log(middle) < 1 - c else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
def test_jeffrey_is_exact_and_its_gradient_is_one_over_w(dtype, tolerance):
    for c in [*torch.linspace(0, 1, 41).tolist(), 1e-7, 1 - 1e-7]:
        w = lambert(c)
        loss, by_a, by_c = gradients("jeffrey", 0.25, c, dtype)
        assert loss == pytest.approx(-0.25 + w + 1 / w + c - 2, abs=tolerance)
        assert by_c == pytest.approx(1 / w, rel=tolerance) and by_a == -1
    leaves = [torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, c: flat_loss(a, c, "jeffrey"), leaves)


def test_names_of_divergences():
    for given, name in {
        **ALIASES,
        **{name: name for name in DIVERGENCES},
        "Jenson-Shannon": "js",
        "Jensen Shannon": "js",
        "Total-Variation": "tv",
        "KL": "kl",
        "Reverse-KL": "reverse_kl",
        "Squared-Hellinger": "squared_hellinger",
        " Neyman ": "neyman",
    }.items():
        assert check_divergence(given) == name
        assert FLATConfig("out", divergence=given).divergence == name
    for wrong in ("hellinger", "", None, 3):
        with pytest.raises(ValueError, match="`divergence` must be one of kl, js, pearson"):
            flat_loss(torch.zeros(1), torch.zeros(1), wrong)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_shared_fixture(name):
    template, forget = sequence_probs(LPE, ME), sequence_probs(LPF, MF)
    assert template.tolist() == pytest.approx([0.296290, 0.256606], abs=1e-6)
    assert forget.tolist() == pytest.approx([0.276173, 0.229661], abs=1e-6)
    assert flat_loss(template, forget, name).mean().item() == pytest.approx(
        INTENDED[name], abs=1e-6
    )
    # the released code: a mean over all positions, and over the batch before g
    template, forget = (
        sequence_probs(lp, m, positions=lp.size(1)).mean() for lp, m in ((LPE, ME), (LPF, MF))
    )
    assert (template.item(), forget.item()) == pytest.approx((0.080950, 0.147099), abs=1e-6)
    found = flat_loss(template, forget, name).item()
    if name in OFFICIAL:
        assert found == pytest.approx(OFFICIAL[name], abs=1e-6)
    if name == "jeffrey":  # there it ends at the third power
        cubic = (forget - template + forget**2 / 4 + forget**3 / 16).item()
        assert cubic == pytest.approx(0.071757, abs=1e-6)
        assert 0 < found - cubic < forget.item() ** 4 / 32


def test_geometric_mean_and_rows_without_a_token():
    found = sequence_probs(LPF, MF, mean="geometric")
    assert found.tolist() == pytest.approx([0.243680, 0.169542], abs=1e-6)
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    for options in ({}, {"mean": "geometric"}, {"positions": 7}):
        probs = sequence_probs(logps, mask, **options)
        assert probs.shape == (2,) and probs[1] == 0 and probs[0] > 0
        logps.grad = None
        probs.sum().backward()
        assert logps.grad[0, 0] > 0 and logps.grad.count_nonzero() == 1
    with pytest.raises(ValueError, match="`mean` must be 'arithmetic' or 'geometric'"):
        sequence_probs(logps, mask, mean="harmonic")
    with pytest.raises(ValueError, match="`positions` goes with"):
        sequence_probs(logps, mask, mean="geometric", positions=4)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_sure_and_impossible_tokens_are_finite(name, mean):
    logps = torch.tensor([[0.0, 0.0], [-1e4, -1e4], [0.0, -1e4]]).requires_grad_()
    mask = torch.ones(3, 2, dtype=torch.bool)
    probs = sequence_probs(logps, mask, mean=mean)
    assert probs.min() >= 0 and probs.max() <= 1
    loss = flat_loss(probs, probs.flip(0), name)
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()


def test_low_precision_is_computed_in_fp32():
    rough = torch.tensor([0.004, 0.3, 0.9]).bfloat16()
    assert sequence_probs(rough.log().unsqueeze(1), rough.unsqueeze(1) > 0).dtype == torch.float32
    for name in DIVERGENCES:
        found = flat_loss(rough, rough.flip(0), name)
        expected = flat_loss(rough.double(), rough.double().flip(0), name)
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_independent_softmaxes_come_to_the_published_end(name):
    def start(p):
        logits = torch.zeros(10, dtype=torch.float64)
        logits[0] = math.log(9 * p / (1 - p))
        return logits.requires_grad_()

    leaves = [start(0.05), start(0.8)]
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    for _ in range(400):
        a, c = (leaf.softmax(0)[:1] for leaf in leaves)
        optimizer.zero_grad()
        flat_loss(a, c, name).sum().backward()
        optimizer.step()
    assert [leaf.softmax(0)[0].item() for leaf in leaves] == pytest.approx(MOVED[name], abs=1e-3)


# The trainer. What it shares with the other losses is in tests/unlearning/test_trainer.py

FORGET = Dataset.from_dict(
    {
        "question": [f"What is {n}+{n + 2}?" for n in range(1, 9)],
        "answer": ["=".join(["6"] * (1 + n % 4)) + str(n) for n in range(1, 9)],
    }
)
RETAIN = Dataset.from_dict(
    {
        "question": [f"What is {n}*2?" for n in range(1, 6)],
        "answer": [str(2 * n) * n for n in range(1, 6)],
    }
)
SETTINGS = {
    "max_steps": 4,
    "optim": "sgd",
    "learning_rate": 1e-1,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def make(checkpoint, tmp_path):
    def make(rows=FORGET, templates=None, retain_dataset=None, **given):
        args = FLATConfig(str(tmp_path / "flat"), **{**SETTINGS, **given})
        return FLATTrainer(
            checkpoint, args, train_dataset=rows, templates=templates, retain_dataset=retain_dataset
        )

    return make


def finish(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), weights_of(trainer)


def assert_same(a, b, tolerance=1e-5):
    tolerance = max(tolerance, ON_GPU) if torch.cuda.is_available() else tolerance
    assert len(a[0]) == len(b[0]) > 0
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a[1], b[1], rtol=tolerance, atol=tolerance)


def probs_of(model, encoded):
    """The probability of each token of an answer, one sequence at a time, from the logits."""
    ids, start = encoded
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    places = range(start, len(ids))
    return torch.stack([logits[place - 1].softmax(0)[ids[place]] for place in places])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "Total-Variation"},
        {"mean": "geometric", "divergence": "kl"},
        {"prob_reduction": "all_positions", "max_length": 100, "divergence": "pearson"},
        {"batch_reduction": "batch_scalar", "divergence": "squared_hellinger"},
        {"include_eos": False},
    ],
    ids=str,
)
def test_the_loss_of_a_step_by_hand(make, model, tokenizer, options):
    trainer = make(max_steps=1, per_device_train_batch_size=8, **options)
    rows = trainer.train_dataset
    assert len(rows) == 8
    trainer.train()
    logged = trainer.state.log_history[0]

    def of(part):
        probs = [probs_of(model, rows[row][part]) for row in range(8)]
        if options.get("mean") == "geometric":
            return torch.stack([p.log().mean().exp() for p in probs])
        if "prob_reduction" in options:
            return torch.stack([p.sum() / 99 for p in probs])
        return torch.stack([p.mean() for p in probs])

    template, forget = of("template"), of("forget")
    assert logged["flat/template_prob"] == pytest.approx(template.mean().item(), rel=1e-4)
    assert logged["flat/forget_prob"] == pytest.approx(forget.mean().item(), rel=1e-4)
    if "batch_reduction" in options:
        template, forget = template.mean(), forget.mean()
    name = check_divergence(options.get("divergence", "js"))
    expected = flat_loss(template, forget, name).mean().item()
    assert logged["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert logged["flat/loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    scored = rows[0]["forget"].ids[-1] == tokenizer.eos_token_id
    assert scored == options.get("include_eos", True)


LEARNT = {"optim": "adamw_torch", "learning_rate": 1e-2, "templates": ["7"]}


@pytest.mark.parametrize("divergence", ["js", "neyman"])
def test_training_moves_what_it_should(make, divergence):
    """Answers that were learnt are forgotten, and the template is learnt in their place."""
    rows = FORGET.remove_columns("answer").add_column("answer", ["9"] * 8)
    swapped = make(rows, template_sft_steps=12, max_steps=12, **LEARNT | {"templates": ["8"]})
    swapped.train()
    rows = rows.remove_columns("answer").add_column("answer", ["8"] * 8)
    trainer = make(rows, divergence=divergence, max_steps=20, **LEARNT)
    trainer.model.load_state_dict(swapped.model.state_dict())
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "flat/loss" in entry]
    assert steps[0]["flat/forget_prob"] > 0.5 > steps[0]["flat/template_prob"]
    assert steps[-1]["flat/forget_prob"] < steps[0]["flat/forget_prob"] - 0.1
    assert steps[-1]["flat/template_prob"] > steps[0]["flat/template_prob"]
    assert steps[-1]["loss"] < steps[0]["loss"]


class Sequential(SFTTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def test_a_warm_start_of_the_whole_run_is_sft_on_the_templates(make, checkpoint, tmp_path):
    """One row a step, so that a mean over rows and one over tokens are the same."""
    templates = ["Pass.", "No idea, sorry.", "Who knows?"]
    given = {"per_device_train_batch_size": 1, "max_steps": 8}
    trainer = make(templates=templates, template_sft_steps=8, **given)
    rows = trainer.train_dataset
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(8))
    ours = finish(trainer)
    items = [rows[index]["template"] for index in order]
    labels = [[-100] * start + ids[start:] for ids, start in items]
    on_cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}
    theirs = Sequential(
        checkpoint,
        args=SFTConfig(str(tmp_path / "sft"), **{**SETTINGS, **given, **on_cpu}),
        train_dataset=Dataset.from_dict({"input_ids": [e.ids for e in items], "labels": labels}),
    )
    assert_same(ours, finish(theirs))
    assert len({tuple(e.ids) for e in items}) > 3  # more than one template was drawn
    # and steps after it are FLAT's
    some = finish(make(templates=templates, template_sft_steps=3, **given))
    close = {"rtol": ON_GPU, "atol": ON_GPU} if torch.cuda.is_available() else {}
    torch.testing.assert_close(some[0][:3], ours[0][:3], **close)
    assert (some[0][3:] - ours[0][3:]).abs().min() > 0.1


def test_a_retain_term_adds_its_cross_entropy(make, model):
    given = {"max_steps": 1, "per_device_train_batch_size": 8}
    plain = make(**given)
    plain.train()
    with_retain = make(**given, retain_weight=0.25, retain_dataset=RETAIN)
    rows = with_retain.train_dataset
    with_retain.train()
    nll = [-probs_of(model, rows[row]["retain"]).log() for row in range(8)]
    nll = torch.cat(nll).mean().item()  # over tokens
    a, b = plain.state.log_history[0], with_retain.state.log_history[0]
    assert b["flat/retain_loss"] == pytest.approx(nll, rel=1e-4)
    assert b["loss"] - a["loss"] == pytest.approx(0.25 * nll, rel=1e-4)
    assert b["flat/loss"] == pytest.approx(a["flat/loss"], rel=1e-4)


def test_batch_scalar_is_per_sequence_where_a_batch_is_one_row(make):
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    a = finish(make(**given, batch_reduction="batch_scalar"))
    assert_same(a, finish(make(**given)))


def test_batch_scalar_depends_on_how_a_batch_is_split_as_documented(make):
    learnt = make(template_sft_steps=10, max_steps=10, **LEARNT)
    learnt.train()
    rows = FORGET.add_column("template", ["7"] * 4 + ["Pass."] * 4)
    losses = []
    for size in (8, 1):
        trainer = make(
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
            batch_reduction="batch_scalar",
            divergence="squared_hellinger",
        )
        trainer.model.load_state_dict(learnt.model.state_dict())
        losses.append(finish(trainer)[0].item())
    assert losses[0] < losses[1] - 1e-3  # exp is convex


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "wasserstein"}, "`divergence` must be one of"),
        ({"mean": "harmonic"}, "`mean` must be one of arithmetic, geometric"),
        ({"prob_reduction": "all"}, "`prob_reduction` must be one of"),
        ({"batch_reduction": "sum"}, "`batch_reduction` must be one of"),
        ({"prob_reduction": "all_positions", "max_length": None}, "set `max_length`"),
        ({"prob_reduction": "all_positions", "mean": "geometric"}, "leave `mean`"),
        ({"template_sft_steps": -1}, "`template_sft_steps` must not be negative"),
        ({"retain_weight": -0.1}, "`retain_weight` must not be negative"),
        ({"retain_weight": math.nan}, "`retain_weight` must be a finite number"),
        ({"min_forget_prob": 0.0}, "`min_forget_prob` must lie between 0 and 1"),
        ({"min_forget_prob": 1.5}, "`min_forget_prob` must lie between 0 and 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FLATConfig("out", **change)


def test_a_retain_weight_and_its_rows_go_together(make):
    with pytest.raises(ValueError, match="go together.*retain_weight=0.5 and no rows"):
        make(retain_weight=0.5)
    with pytest.raises(ValueError, match="go together.*retain_weight=0 and rows"):
        make(retain_dataset=RETAIN)


def test_templates_of_a_file_of_rows_and_of_a_function(make, tmp_path, caplog):
    file = tmp_path / "refusals.csv"
    file.write_text("response\nNo comment.\n\n  Pass. \nNo comment.\n")
    with caplog.at_level(logging.WARNING):
        trainer = make(template_file=str(file))
    assert all(own == ["No comment.", "Pass."] for own in trainer.train_dataset.templates)
    assert "lines of `template_file`: blank, repeated, a header" in caplog.text
    own = FORGET.add_column("template", [["a", "b"]] * 4 + [["c"]] * 4)
    assert make(own).train_dataset.templates == [["a", "b"]] * 4 + [["c"]] * 4
    trainer = make(templates=lambda row: [row["question"].upper()])
    assert trainer.train_dataset.templates[0] == ["WHAT IS 1+3?"]
    assert make().train_dataset.templates[0] == list(REFUSALS)


def test_the_saved_model_is_a_plain_checkpoint(make, tmp_path):
    trainer = make(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    ours = trainer.model(ids.to(trainer.model.device)).logits.cpu()
    close = {"rtol": ON_GPU, "atol": ON_GPU} if torch.cuda.is_available() else {}
    torch.testing.assert_close(loaded(ids).logits, ours, **close)
