import json

import numpy as np
import pytest

from llmmix.laws.trajectory import fit_dynamics, read_trajectory

# 2 targets by 3 domains: transposed it has another shape, and its column sums another order
A = np.array([[4.0, 1.0, 0.5], [0.5, 1.0, 3.0]]) / 1000
DOMAINS, TARGETS = ["a", "b", "c"], ["u", "v"]


def write(folder, entries, domains=DOMAINS, targets=TARGETS, method="Method", draws=100):
    header = {"domains": domains, "targets": targets, "method": method, "draws_a_step": draws}
    lines = [json.dumps(entry) for entry in [header, *entries]]
    (folder / "mixture.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(matrix=A, intervals=30, every=4, noise=0.0, seed=0, decided=None, mixture=None, speed=None):
    """Lines of a run: counts of every step, then losses, then what was decided."""
    rng = np.random.default_rng(seed)
    m, k = matrix.shape
    losses, step = np.full(m, 5.0), 0
    entries = [{"step": 0, "measured": {"losses": losses.tolist()}}]
    entries.append({"step": 0, "weights": [1 / k] * k, "matrix": None})
    for r in range(intervals):
        p = rng.dirichlet(np.ones(k)) if mixture is None else mixture(r, rng)
        for _ in range(every):
            counts = rng.multinomial(100, p) if mixture is None else np.round(100 * p).astype(int)
            step += 1
            fast = 1.0 if speed is None else speed((step - 0.5) / (intervals * every))
            losses = losses - fast * matrix @ (counts / counts.sum())
            entries.append({"step": step, "counts": counts.tolist()})
        losses = losses + noise * rng.normal(size=m) * fast
        entries.append({"step": step, "measured": {"losses": losses.tolist()}})
        if decided is not None:
            found = decided(r, rng)
            matrix_line = None if found is None else np.asarray(found).tolist()
            entries.append({"step": step, "weights": [1 / k] * k, "matrix": matrix_line})
    return entries


def fitted(folder):
    return fit_dynamics(read_trajectory(folder))


def test_intervals_are_what_was_drawn_and_shed_between_measurements(tmp_path):
    entries = [
        {"step": 0, "measured": {"losses": [3.0, 2.0]}},
        {"step": 1, "counts": [6, 2, 0]},
        {"step": 2, "counts": [0, 8, 0]},
        {"step": 2, "measured": {"excess": [1.0, 1.0, 1.0]}},
        {"step": 3, "counts": [0, 0, 8]},
        {"step": 3, "measured": {"losses": [2.5, 1.0]}},
        {"step": 3, "weights": [1, 0, 0], "matrix": [[1, 2, 3], [4, 5, 6]]},
        {"step": 3, "measured": {"losses": [2.5, 1.0]}},
        {"step": 4, "counts": [8, 0, 0]},
        {"step": 4, "measured": {"losses": [None, 0.5]}},
        {"step": 4, "weights": [1, 0, 0], "matrix": [[1, 2, 3], [4, 5, 6]]},
        {"step": 5, "counts": [4, 4, 0]},
        {"step": 5, "final": [2.0, 1.5]},
        {"step": 5, "weights": [1, 0, 0], "matrix": [[1, 2, 3], [4, 5, 7]]},
        {"step": 5, "spent": {"steps": 0}},
    ]
    t = read_trajectory(write(tmp_path, entries, draws=8))
    assert (t.method, t.domains, t.targets) == ("Method", ("a", "b", "c"), ("u", "v"))
    assert t.start.tolist() == [0, 3] and t.steps.tolist() == [3, 2]
    assert np.allclose(t.shares, [[6 / 24, 10 / 24, 8 / 24], [12 / 16, 4 / 16, 0]])
    assert np.allclose(t.drops, [[0.5, 1.0], [0.5, -0.5]])
    assert t.decided.tolist() == [3, 5] and t.matrices.shape == (2, 2, 3)
    assert t.matrices[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert len(t.notes) == 1 and "steps 4," in t.notes[0]
    assert read_trajectory(tmp_path, first_step=3).start.tolist() == [3]


def test_draws_lost_from_the_record_cost_their_interval_alone(tmp_path):
    entries = [e for e in run(intervals=5) if not ("counts" in e and e["step"] == 6)]
    t = read_trajectory(write(tmp_path, entries), first_step=0)
    assert t.start.tolist() == [0, 8, 12, 16]
    assert "1 intervals are left out" in t.notes[0]


@pytest.mark.parametrize("decay", [(0.0, 0.0), None])
def test_a_matrix_without_noise_is_found_to_the_digit(tmp_path, decay):
    t = read_trajectory(write(tmp_path, run()))
    fit = fit_dynamics(t, decay=decay)
    assert fit.decay == (0.0, 0.0)
    assert np.allclose(fit.matrix, A, atol=1e-9)
    assert fit.matrix[fit.targets.index("u"), fit.domains.index("a")] == pytest.approx(4e-3)
    assert fit.matrix[fit.targets.index("v"), fit.domains.index("c")] == pytest.approx(3e-3)
    assert fit.r2 == pytest.approx(1) and fit.r2_out == pytest.approx(1)
    assert fit.unidentified == () and fit.mse_out < 1e-18


def test_decay_is_found_and_its_mean_is_the_matrix(tmp_path):
    def speed(t):
        return 3 * t**-0.5 * (1 - t)

    entries = run(intervals=80, every=2, noise=1e-4, speed=speed)
    fit = fit_dynamics(read_trajectory(write(tmp_path, entries)))
    flat = fit_dynamics(read_trajectory(tmp_path), decay=(0.0, 0.0))
    assert fit.decay[0] in (0.25, 0.5, 0.75) and fit.decay[1] in (0.5, 1.0, 1.5)
    ratio = fit.matrix / A
    assert np.ptp(ratio) < 0.15 * ratio.mean()
    after = np.arange(16, 160) / 160 + 0.5 / 160
    assert ratio.mean() == pytest.approx(speed(after).mean(), rel=0.1)
    assert fit.r2_out > 0.95 > flat.r2_out + 0.2


def test_standard_errors_are_those_of_repeated_runs(tmp_path):
    found, errors = [], []
    for seed in range(60):
        entries = run(noise=2e-3, seed=seed)
        t = read_trajectory(write(tmp_path, entries))
        # Noise of the losses enters this run's drops once, since `run` carries it on
        fit = fit_dynamics(t, decay=(0.0, 0.0))
        found.append(fit.matrix)
        errors.append(fit.errors)
    scores = (np.array(found) - A) / np.array(errors)
    assert 0.8 < scores.std() < 1.25 and abs(scores.mean()) < 0.2
    assert fit.errors.shape == (2, 3)


def test_intervals_left_out_are_those_of_refits(tmp_path):
    t = read_trajectory(write(tmp_path, run(intervals=9, noise=3e-3)))
    for ridge in (0.0, 0.2):
        fit = fit_dynamics(t, decay=(0.0, 0.0), ridge=ridge)
        x = t.shares * t.steps[:, None]
        penalty = ridge * np.mean(x**2) * len(x) * np.eye(3)
        left, null = [], []
        for r in range(len(x)):
            rest = np.arange(len(x)) != r
            gram = x[rest].T @ x[rest] + penalty
            left.append(t.drops[r] - x[r] @ np.linalg.solve(gram, x[rest].T @ t.drops[rest]))
            null.append(t.drops[r] - t.drops[rest].mean(0))
        assert np.allclose(fit.residuals, left)
        expected = np.mean(1 - np.square(left).sum(0) / np.square(null).sum(0))
        assert fit.r2_out == pytest.approx(expected) and fit.r2_out < fit.r2
        assert fit.mse < fit.mse_out == pytest.approx(np.square(left).mean())


def test_a_mixture_that_does_not_matter_explains_nothing(tmp_path):
    same = np.full((2, 3), 1e-3)
    t = read_trajectory(write(tmp_path, run(same, intervals=60, noise=1e-3)))
    fit = fit_dynamics(t)
    assert fit.r2_out < 0.1
    assert np.abs(fit.matrix / fit.errors).mean() > 1  # they all help, none more


def test_domains_in_lockstep_are_not_told_apart(tmp_path):
    def mixture(r, rng):
        p = rng.integers(0, 51) / 100
        return np.array([p, p, 1 - 2 * p])

    fit = fit_dynamics(read_trajectory(write(tmp_path, run(mixture=mixture))))
    assert fit.unidentified == ("a", "b")
    assert np.isfinite(fit.matrix[:, 2]).all()


def test_runs_that_identify_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no mixture.jsonl"):
        fitted(tmp_path)
    with pytest.raises(ValueError, match="measured at 0 steps"):
        fitted(write(tmp_path, [{"step": s, "counts": [1, 1, 1]} for s in range(1, 9)]))
    once = [*({"step": s, "counts": [1, 1, 1]} for s in range(1, 9)), {"step": 8, "final": [1, 2]}]
    with pytest.raises(ValueError, match="measured at 1 steps, and it takes two.*Fixed may not"):
        fitted(write(tmp_path, once, method="Fixed"))
    with pytest.raises(ValueError, match="2 intervals for 3 domains"):
        fitted(write(tmp_path, run(intervals=2)))
    entries = run(mixture=lambda r, rng: np.array([0.5, 0.3, 0.2]))
    with pytest.raises(ValueError, match=r"identifies nothing.*a 0.500, b 0.300, c 0.200"):
        fitted(write(tmp_path, entries))
    with pytest.raises(ValueError, match="targets by domains, 2 x 3, got 3 x 2"):
        fitted(write(tmp_path, run(decided=lambda r, rng: A.T)))
    t = read_trajectory(write(tmp_path, run()))
    with pytest.raises(ValueError, match="`ridge` must be 0 or more"):
        fit_dynamics(t, ridge=-1)


def test_as_many_intervals_as_domains_have_no_errors(tmp_path):
    t = read_trajectory(write(tmp_path, run(intervals=3)), first_step=0)
    fit = fit_dynamics(t)
    assert np.allclose(fit.matrix, A, atol=1e-9)
    assert np.isnan(fit.errors).all() and np.isnan(fit.r2_out)
