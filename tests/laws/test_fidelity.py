import numpy as np
import pytest

from llmmix.laws.fidelity import assess, similarity
from tests.laws.test_trajectory import A, run, write


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_domain_whose_share_stays_is_not_made_up(tmp_path, share):
    def mixture(r, rng):
        p = rng.integers(0, 71 if share else 101) / 100
        return np.array([p, share, 1 - share - p])

    entries = run(mixture=mixture, decided=lambda r, rng: A)
    found = assess(write(tmp_path, entries))
    assert found.unidentified == ("b",) == found.fitted.unidentified
    values = found.fitted.matrix
    assert np.isnan(values[:, 1]).all() and np.isnan(found.fitted.errors[:, 1]).all()
    difference = values[:, 0] - values[:, 2]
    assert np.allclose(difference, A[:, 0] - A[:, 2], atol=1e-9)
    assert any("says nothing of b" in note for note in found.notes)
    assert found.similarity_of_mean == pytest.approx(1.0, abs=0.01)


def test_similarity_by_hand():
    implied = np.array([[1.0, 0.0, 2.0], [0.0, 2.0, 2.0]])  # sums 1 2 4
    fitted = np.array([[3.0, 0.0, 1.0], [0.0, 1.0, 1.0]])  # sums 3 1 2
    cosine = (1 * 3 + 2 * 1 + 4 * 2) / np.sqrt((1 + 4 + 16) * (9 + 1 + 4))
    assert similarity(implied, fitted) == pytest.approx(0.5 * cosine + 0.5 * -0.5)
    assert similarity(fitted, implied) == pytest.approx(similarity(implied, fitted))
    assert similarity(7 * implied, fitted) == pytest.approx(similarity(implied, fitted))
    assert similarity(implied, implied) == pytest.approx(1)
    # The second target alone: sums 0 2 2 and 0 1 1
    assert similarity(implied, fitted, [0, 5]) == pytest.approx(1)
    square = np.array([[1.0, 5.0], [0.0, 1.0]])
    assert similarity(square, square.T) < 0.5 < similarity(square, square)


def test_similarity_refuses_what_has_none():
    with pytest.raises(ValueError, match=r"shapes \(3, 2\) and \(2, 3\)"):
        similarity(A.T, A)
    with pytest.raises(ValueError, match="must be finite"):
        similarity(A * np.nan, A)
    with pytest.raises(ValueError, match="`target_weights` must be 2 numbers"):
        similarity(A, A, [1, 2, 3])
    assert np.isnan(similarity(np.ones((2, 3)), A)) and np.isnan(similarity(A * 0, A))
    assert np.isnan(similarity(A[:, :1], A[:, :1]))


def test_a_faithful_method_is_told_from_one_that_is_not(tmp_path):
    def faithful(r, rng):
        return 40 * A * (1 + 0.05 * rng.normal(size=A.shape))

    def wrong(r, rng):
        return 40 * A[:, [1, 2, 0]] * (1 + 0.05 * rng.normal(size=A.shape))

    found = {}
    for name, decided in {"faithful": faithful, "wrong": wrong}.items():
        found[name] = assess(write(tmp_path, run(noise=4e-4, decided=decided)), first_step=0)
    good, bad = found["faithful"], found["wrong"]
    assert good.decisions == 30 and good.intervals == 30 and good.foretold == 29
    assert good.similarity > 0.95 and good.similarity_of_mean > 0.99 > bad.similarity_of_mean
    assert good.interval[0] > good.chance and good.notes == ()
    assert good.implied_r2 > 0.9 and good.fitted_r2 > good.implied_r2 > bad.implied_r2
    assert good.implied_mse < bad.implied_mse and good.fitted_mse < good.implied_mse
    assert good.scale == pytest.approx(np.linalg.norm(A), rel=0.05)
    assert bad.similarity < bad.chance + 0.1 and any("shows nothing" in n for n in bad.notes)


def test_the_similaritys_interval_grows_with_noise(tmp_path):
    widths = []
    for noise in (1e-5, 3e-3):
        found = assess(write(tmp_path, run(noise=noise, decided=lambda r, rng: A)))
        low, high = found.interval
        widths.append(high - low)
    assert 0 < widths[0] < 0.01 and widths[1] > 0.1


def test_mean_over_decisions_last_one_and_target_weights(tmp_path):
    turned = A[:, ::-1]
    # Matrices count alike, however large: those of the first, large drops would decide the mean
    entries = run(decided=lambda r, rng: turned if r >= 20 else 50 * A)
    found = assess(write(tmp_path, entries), target_weights=[1, 0])
    u = [1, 0]
    each = [similarity(A, A, u), similarity(turned, A, u)]
    assert found.decisions == 2
    assert found.similarity == pytest.approx(np.mean(each), abs=1e-6)
    assert found.similarity_of_last == pytest.approx(each[1], abs=1e-6)
    assert found.similarity_of_mean == pytest.approx(
        similarity((A + turned) / 2, A, u), abs=1e-6, nan_ok=True
    )


def test_chance_is_the_mean_over_all_permutations(tmp_path):
    from itertools import permutations

    found = assess(write(tmp_path, run(decided=lambda r, rng: A + 1e-3)))
    fitted = found.fitted.matrix
    shuffled = [similarity((A + 1e-3)[:, list(p)], fitted) for p in permutations(range(3))]
    assert found.chance == pytest.approx(np.mean(shuffled))


def test_the_law_foretold_is_of_the_matrix_known_then(tmp_path):
    """A matrix that is right from step 60 on, after one that was wrong."""
    wrong = A[:, [1, 2, 0]]
    late = assess(write(tmp_path, run(decided=lambda r, rng: A if r >= 14 else None)))
    assert late.foretold == 15 and late.implied_r2 == pytest.approx(1)
    both = assess(write(tmp_path, run(decided=lambda r, rng: A if r >= 14 else wrong)))
    assert both.foretold == 27 > late.foretold and both.implied_r2 < 0.7


def test_a_method_without_matrices_has_the_fitted_law_alone(tmp_path):
    found = assess(write(tmp_path, run(noise=1e-4), method="SkillIt"))
    assert found.decisions == 0 and found.fitted.r2_out > 0.9
    for name in ("similarity", "similarity_of_mean", "similarity_of_last", "scale", "implied_r2"):
        assert np.isnan(getattr(found, name)), name
    assert found.notes == ("SkillIt recorded no matrix: there is the fitted one alone.",)


def test_matrices_that_rank_nothing_or_are_not_finite_are_said(tmp_path):
    def decided(r, rng):
        if r == 3:
            return [[None, 1.0, 2.0], [1.0, 1.0, 2.0]]
        return np.ones((2, 3)) if r < 10 else A

    entries = run(noise=1e-5)
    for r, at in enumerate(i for i, e in enumerate(entries) if "measured" in e and e["step"]):
        found = decided(r, None)
        found = found.tolist() if isinstance(found, np.ndarray) else found
        entries[at] = [entries[at], {"step": entries[at]["step"], "matrix": found}]
    entries = [e for part in entries for e in (part if isinstance(part, list) else [part])]
    found = assess(write(tmp_path, entries))
    assert found.decisions == 3  # ones, ones anew after the broken one, A
    assert found.similarity == pytest.approx(1, abs=1e-3)
    text = " ".join(found.notes)
    assert "1 of its matrices were not finite" in text and "2 of 3 matrices rank no domain" in text


def test_a_run_that_matters_not_is_said_to_show_nothing(tmp_path):
    same = np.full((2, 3), 1e-3)
    entries = run(same, noise=1e-2, decided=lambda r, rng: A)
    notes = " ".join(assess(write(tmp_path, entries)).notes)
    assert "no better than one without a mixture" in notes


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no mixture.jsonl"):
        assess(tmp_path)
